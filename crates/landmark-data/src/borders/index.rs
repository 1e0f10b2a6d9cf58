//! Random access to a corpus with landmarks at borders.
//!
//! Places follow from all of a document before them, so every 4096 tokens the index notes what the rule knew there, and a
//! window is read by applying the rule again from the last note before it: some microseconds. A corpus of 3 billion tokens takes
//! 18 MB of notes; making them is one pass over the tokens on all cores, so they are made anew each time a corpus is opened and no
//! file can be stale.

use std::ops::Range;

use rayon::prelude::*;

use super::{BorderRule, Place};
use crate::Tokens;

/// Tokens from note to note.
const NOTE_EVERY: u64 = 4096;
/// Tokens that one thread is given at a time, at least: parts begin where documents do.
const PART: u64 = 1 << 20;

/// What is known before a token.
#[derive(Clone, Copy, Debug)]
struct Note {
    token: u64,
    landmarks: u64,
    place: Place,
}

impl Note {
    /// The token's place in the stream.
    fn position(&self) -> u64 {
        self.token + self.landmarks
    }
}

/// The notes of a corpus.
#[derive(Debug)]
pub(crate) struct Index {
    notes: Vec<Note>,
    landmarks: u64,
}

impl Index {
    pub(crate) fn new(tokens: &Tokens, rule: &BorderRule) -> Self {
        Self::with_parts(tokens, rule, PART)
    }

    fn with_parts(tokens: &Tokens, rule: &BorderRule, part: u64) -> Self {
        let parts = parts(tokens, rule.end_of_text, part);
        let noted: Vec<(Vec<Note>, u64)> = parts.into_par_iter().map(|part| note(tokens, rule, part)).collect();
        let mut index =
            Self { notes: Vec::with_capacity(noted.iter().map(|(notes, _)| notes.len()).sum()), landmarks: 0 };
        for (notes, landmarks) in noted {
            let before = index.landmarks;
            index.notes.extend(notes.into_iter().map(|note| Note { landmarks: before + note.landmarks, ..note }));
            index.landmarks += landmarks;
        }
        index
    }

    /// The landmarks of the whole corpus.
    pub(crate) fn landmarks(&self) -> u64 {
        self.landmarks
    }

    /// Calls `visit` with the ids from position `start` of the stream on, landmarks as `None`, while it returns true.
    pub(crate) fn visit(
        &self,
        tokens: &Tokens,
        rule: &BorderRule,
        start: u64,
        mut visit: impl FnMut(Option<u32>) -> bool,
    ) {
        let after = self.notes.partition_point(|note| note.position() <= start);
        let Some(&Note { token, mut place, .. }) = after.checked_sub(1).and_then(|i| self.notes.get(i)) else { return };
        let mut position = self.notes[after - 1].position();
        let mut put = |id| {
            position += 1;
            position <= start || visit(id)
        };
        for index in token..tokens.len() {
            let Some(id) = tokens.get(index) else { return };
            if !put(Some(id)) || rule.step(&mut place, id) && !put(None) {
                return;
            }
        }
    }
}

/// The notes of a part of the corpus that begins with a document, and its landmarks, counted from its own beginning.
fn note(tokens: &Tokens, rule: &BorderRule, part: Range<u64>) -> (Vec<Note>, u64) {
    let mut notes = Vec::with_capacity(((part.end - part.start) / NOTE_EVERY) as usize + 1);
    let (mut place, mut landmarks) = (Place::default(), 0);
    for token in part.clone() {
        if (token - part.start).is_multiple_of(NOTE_EVERY) {
            notes.push(Note { token, landmarks, place });
        }
        landmarks += u64::from(tokens.get(token).is_some_and(|id| rule.step(&mut place, id)));
    }
    (notes, landmarks)
}

/// Parts of at least `size` tokens, but the last, each of whole documents.
fn parts(tokens: &Tokens, end_of_text: Option<u32>, size: u64) -> Vec<Range<u64>> {
    let (mut parts, mut start) = (Vec::new(), 0);
    while start < tokens.len() {
        let from = start.saturating_add(size - 1).min(tokens.len());
        let last = match end_of_text {
            Some(_) => (from..tokens.len()).find(|&index| tokens.get(index) == end_of_text),
            None => None,
        };
        let end = last.map_or(tokens.len(), |last| last + 1);
        parts.push(start..end);
        start = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Border;
    use proptest::prelude::*;

    /// Letters, an end of a sentence, and an end of text.
    fn rule(mem_freq: u32) -> BorderRule {
        let texts = [" a", ".", " word", ".\n\n", ""].map(|text| text.as_bytes().to_vec());
        BorderRule::compile(Border::Sentence, &texts, Some(4), mem_freq).unwrap()
    }

    proptest! {
        /// Notes and parts change nothing: what is read anywhere is what one pass from the beginning gives.
        #[test]
        fn reads_what_one_pass_gives(
            corpus in prop::collection::vec(prop_oneof![20 => 0u32..4, 1 => Just(4)], 0..14_000),
            mem_freq in 1u32..40, part in 1u64..9000, starts in prop::collection::vec(0u64..20_000, 1..20),
        ) {
            let rule = rule(mem_freq);
            let (mut place, mut all) = (Place::default(), Vec::new());
            for &id in &corpus {
                all.push(Some(id));
                if rule.step(&mut place, id) {
                    all.push(None);
                }
            }
            let tokens = Tokens::Memory(corpus);
            let index = Index::with_parts(&tokens, &rule, part);
            prop_assert_eq!(index.landmarks(), all.iter().filter(|id| id.is_none()).count() as u64);
            for start in starts {
                let mut read = Vec::new();
                index.visit(&tokens, &rule, start, |id| { read.push(id); read.len() < 100 });
                let start = all.len().min(start as usize);
                prop_assert_eq!(read, &all[start..all.len().min(start + 100)]);
            }
        }

        #[test]
        fn parts_are_whole_documents(corpus in prop::collection::vec(0u32..9, 0..400), size in 1u64..100) {
            let tokens = Tokens::Memory(corpus.clone());
            let cut = parts(&tokens, Some(4), size);
            let ends: Vec<u64> = cut.iter().map(|part| part.end).collect();
            prop_assert_eq!(cut.iter().map(|part| part.start).collect::<Vec<_>>(),
                std::iter::once(0).chain(ends.iter().copied()).take(cut.len()).collect::<Vec<_>>());
            prop_assert_eq!(ends.last().copied().unwrap_or(0), corpus.len() as u64);
            for part in cut.iter().rev().skip(1) {
                prop_assert!(part.end - part.start >= size && corpus[part.end as usize - 1] == 4);
            }
            prop_assert_eq!(parts(&tokens, None, size).len(), usize::from(!corpus.is_empty()));
        }
    }
}
