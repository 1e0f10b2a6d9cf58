//! The words of GPT-2's pattern, found without a regular expression, and a cache of their ids. Where digits are split, each is a
//! word of its own, and the pattern applies to the text between them.
//!
//! A byte-level tokenizer cuts a text into words and encodes each by itself. The `tokenizers` library is the definition of both,
//! and spends nearly all of its time on the first and on words it has seen. So the words are found here in one pass, and the
//! library is only asked for those that the cache does not hold, which is some fifty times faster. The tests compare both.

use std::sync::{LazyLock, Mutex, PoisonError};

use ahash::AHashMap;
use regex_syntax::hir::{Class as Set, HirKind};

use crate::Result;

/// Words of one cache: English books have no more in common use. A cache that is full starts anew, so that it follows the text.
const CACHED_WORDS: usize = 1 << 17;
/// Longer words do not come again.
const CACHED_LEN: usize = 64;

/// What the pattern tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
}

/// The class of each code point, by the tables of the regular expressions that the library uses.
static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let mut classes = vec![Class::Other; char::MAX as usize + 1];
    for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)] {
        let parsed = regex_syntax::parse(pattern).map(regex_syntax::hir::Hir::into_kind);
        let Ok(HirKind::Class(Set::Unicode(set))) = parsed else { unreachable!("{pattern} is a class") };
        for range in set.ranges() {
            classes[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    classes
});

/// The words of a text, which make up all of it: the matches of
/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
pub(super) struct Words<'t> {
    classes: &'static [Class],
    /// Up to the next digit, where digits are split.
    rest: &'t str,
    /// What comes after it.
    later: &'t str,
    digits: Digits,
}

/// What becomes of digits, which are all characters with a number's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Digits {
    /// They are characters like any other: those of a number are one word.
    #[default]
    Together,
    /// Each is a word.
    Single,
}

impl<'t> Words<'t> {
    pub(super) fn of(text: &'t str, digits: Digits) -> Self {
        let (rest, later) = match digits {
            Digits::Together => (text, ""),
            Digits::Single => ("", text),
        };
        Self { classes: &CLASSES, rest, later, digits }
    }

    /// Goes on behind the text that has been cut: with a digit, or with what is before the next one.
    fn refill(&mut self) -> Option<()> {
        let first = self.later.chars().next()?;
        let end = match first.is_numeric() {
            true => first.len_utf8(),
            false => self.later.find(char::is_numeric).unwrap_or(self.later.len()),
        };
        (self.rest, self.later) = self.later.split_at(end);
        Some(())
    }

    /// The class and the length of the character at `at`.
    fn at(&self, at: usize) -> Option<(Class, usize)> {
        let byte = *self.rest.as_bytes().get(at)?;
        if byte < 0x80 {
            return Some((self.classes[usize::from(byte)], 1));
        }
        let c = self.rest[at..].chars().next()?;
        Some((self.classes[c as usize], c.len_utf8()))
    }

    /// Where the run of characters of this class that has begun before `at` ends.
    fn run(&self, class: Class, mut at: usize) -> usize {
        while let Some((next, len)) = self.at(at)
            && next == class
        {
            at += len;
        }
        at
    }

    /// The length of the next word.
    fn len(&self) -> Option<usize> {
        let (class, len) = self.at(0)?;
        let bytes = self.rest.as_bytes();
        if bytes[0] == b'\'' {
            match bytes.get(1..) {
                Some([b's' | b't' | b'm' | b'd', ..]) => return Some(2),
                Some([b'r' | b'v', b'e', ..] | [b'l', b'l', ..]) => return Some(3),
                _ => {}
            }
        }
        if class != Class::Space {
            return Some(self.run(class, len));
        }
        if bytes[0] == b' '
            && let Some((class, len)) = self.at(1)
            && class != Class::Space
        {
            return Some(self.run(class, 1 + len));
        }
        let end = self.run(Class::Space, len);
        // Before a word its last space is left, be it to the word or to itself.
        let last = self.rest[..end].chars().next_back().map_or(0, char::len_utf8);
        Some(if end == self.rest.len() || end == last { end } else { end - last })
    }
}

impl<'t> Iterator for Words<'t> {
    type Item = &'t str;

    fn next(&mut self) -> Option<&'t str> {
        if self.rest.is_empty() && self.digits == Digits::Single {
            self.refill()?;
        }
        let (word, rest) = self.rest.split_at(self.len()?);
        self.rest = rest;
        Some(word)
    }
}

/// Caches of the ids of words. A thread takes one for as long as it encodes a text.
pub(super) struct WordCaches {
    digits: Digits,
    caches: Mutex<Vec<Cache>>,
}

#[derive(Default)]
struct Cache {
    /// Where in `ids` a word's are.
    words: AHashMap<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
}

impl WordCaches {
    pub(super) fn new(digits: Digits) -> Self {
        Self { digits, caches: Mutex::default() }
    }

    /// The ids of `text`, where `encode` gives those of a word.
    pub(super) fn encode(&self, text: &str, encode: impl Fn(&str) -> Result<Vec<u32>>) -> Result<Vec<u32>> {
        // Whoever panicked with the lock held was between two caches, which are whole.
        let pool = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cache = pool().pop().unwrap_or_default();
        // A token of English has some four bytes.
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        for word in Words::of(text, self.digits) {
            match cache.words.get(word) {
                Some(&(start, end)) => ids.extend_from_slice(&cache.ids[start as usize..end as usize]),
                None => {
                    let found = encode(word)?;
                    ids.extend_from_slice(&found);
                    cache.add(word, &found);
                }
            }
        }
        pool().push(cache);
        Ok(ids)
    }
}

impl Cache {
    fn add(&mut self, word: &str, ids: &[u32]) {
        if word.len() > CACHED_LEN {
            return;
        }
        if self.words.len() == CACHED_WORDS {
            self.words.clear();
            self.ids.clear();
        }
        // Fits: a word has at most CACHED_LEN ids.
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.words.insert(word.into(), (start, self.ids.len() as u32));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::digits;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    /// The words that the library finds.
    fn theirs(text: &str, digits: Digits) -> Vec<&str> {
        let mut cut = PreTokenizedString::from(text);
        if digits == Digits::Single {
            digits::Digits::new(true).pre_tokenize(&mut cut).unwrap();
        }
        ByteLevel::new(false, true, true).pre_tokenize(&mut cut).unwrap();
        let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (start, end), _)| &text[start..end]).collect()
    }

    fn ours(text: &str, digits: Digits) -> Vec<&str> {
        Words::of(text, digits).collect()
    }

    fn check(text: &str) {
        for digits in [Digits::Together, Digits::Single] {
            assert_eq!(ours(text, digits), theirs(text, digits), "{text:?} {digits:?}");
        }
    }

    #[test]
    fn every_character_is_of_the_library_s_class() {
        // In a text of all of them, each between two letters, a digit and a space.
        let all: String =
            (0..=0x10_ffff).filter_map(char::from_u32).flat_map(|c| ['a', c, 'b', c, '1', c, ' ']).collect();
        for part in all.as_bytes().chunks(1 << 16) {
            let part = String::from_utf8_lossy(part);
            check(&part);
        }
    }

    #[test]
    fn contractions_and_spaces() {
        let text = "I'll say: it's  the \n\n\tdog's!' 'tis we've'd 'RE\u{a0}x \u{3000} y3²4   ";
        check(text);
        check("");
        let together = |text| ours(text, Digits::Together);
        assert_eq!(together("we've  been\n\n\nhere  "), ["we", "'ve", " ", " been", "\n\n", "\n", "here", "  "]);
        assert_eq!(together("is 4821."), ["is", " 4821", "."]);
        assert_eq!(
            ours("is 482  1.x\u{b2}", Digits::Single),
            ["is", " ", "4", "8", "2", "  ", "1", ".", "x", "\u{b2}"]
        );
    }

    proptest! {
        #[test]
        fn the_words_are_the_library_s(text in "([a-z']{0,3}|[ \n\t]{0,3}|[0-9.!]{0,2}|'(s|re|ll|ve|x)|[\u{e9}\u{a0}\u{2003}\u{301}\u{4e2d}\u{1f600}]){0,30}") {
            check(&text);
        }

        #[test]
        fn so_are_those_of_any_text(text: String) {
            check(&text);
            prop_assert_eq!(ours(&text, Digits::Single).concat(), text);
        }
    }

    #[test]
    fn a_full_cache_starts_anew() {
        let caches = WordCaches::new(Digits::Together);
        let length = |word: &str| Ok(vec![word.len() as u32]);
        let text: String = (0..CACHED_WORDS as u32 + 10)
            .map(|i| format!(" {}", "x".repeat(i as usize % 7) + &i.to_string()))
            .collect();
        let expected: Vec<u32> = Words::of(&text, Digits::Together).map(|word| word.len() as u32).collect();
        for _ in 0..2 {
            assert_eq!(caches.encode(&text, length).unwrap(), expected);
        }
        assert!(caches.caches.lock().unwrap()[0].words.len() <= CACHED_WORDS);
    }
}
