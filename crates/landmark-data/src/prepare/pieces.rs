//! A text file in pieces of bounded size, each valid UTF-8.
//!
//! Pieces are encoded on their own, so a border must not fall where a tokenizer would have joined the two sides. Between a
//! letter and a single space before another letter no tokenizer of the GPT-2 or LLaMA-3 kind does: their patterns end a word
//! there, and the space opens the next one. Ordinary text has such a place every few characters, and with borders only there
//! the pieces give the very ids of the whole text. (Tokenizers of the SentencePiece kind mark the start of every text they
//! are given, so there each border costs one such mark, per 256 KiB.) Text without such a place is cut between characters.

use super::cut::border;
use super::source::Source;
use crate::Result;

/// The most bytes of a piece.
const PIECE: usize = 256 << 10;

/// Reads a text piece by piece. The pieces from a piece's end on depend on nothing before it.
pub(super) struct Pieces {
    source: Source,
    /// What has been read and not yet returned.
    buffer: Vec<u8>,
    piece: usize,
}

impl Pieces {
    pub(super) fn new(source: Source) -> Self {
        Self { source, buffer: Vec::new(), piece: PIECE }
    }

    /// The next piece; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<String>> {
        let missing = self.piece.saturating_sub(self.buffer.len());
        self.source.fill(&mut self.buffer, missing)?;
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let last = self.buffer.len() < self.piece;
        let end = match std::str::from_utf8(&self.buffer) {
            Ok(text) if last => text.len(),
            Ok(text) => border(text),
            // Not an error yet: the buffer may end within a character.
            Err(error) if !last && error.error_len().is_none() => {
                border(&String::from_utf8_lossy(&self.buffer[..error.valid_up_to()]))
            }
            Err(error) => return Err(self.source.invalid_utf8(&self.buffer, error.valid_up_to())),
        };
        let rest = self.buffer.split_off(end);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        String::from_utf8(bytes).map(Some).map_err(|e| {
            // Cannot happen: it was valid above.
            self.source.invalid_utf8(e.as_bytes(), e.utf8_error().valid_up_to())
        })
    }

    /// Where in the text the next piece starts.
    pub(super) fn offset(&self) -> u64 {
        self.source.offset() - self.buffer.len() as u64
    }

    /// Bytes of the input, as it lies on the disk, that are used up.
    pub(super) fn disk(&self) -> u64 {
        self.source.disk()
    }
}

/// The pieces of a text that is in memory.
pub(super) fn split(mut text: String) -> Vec<String> {
    let mut pieces = Vec::new();
    while text.len() > PIECE {
        let mut end = PIECE;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let rest = text.split_off(border(&text[..end]));
        pieces.push(std::mem::replace(&mut text, rest));
    }
    pieces.push(text);
    pieces
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::ops::Range;

    use proptest::prelude::*;
    use tempfile::NamedTempFile;

    use super::super::layout::{Compression, Division, Format, Input, Set};
    use super::*;
    use crate::{Error, Tokenizer};

    fn file(contents: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(contents).unwrap();
        file
    }

    fn pieces(contents: &[u8], range: Range<u64>, size: usize) -> Result<Vec<String>> {
        let file = file(contents);
        let input = Input {
            path: file.path().into(),
            format: Format::Text,
            compression: Compression::None,
            range,
            division: Division::Fixed(Set::Train),
        };
        let mut pieces = Pieces { piece: size, ..Pieces::new(Source::open(&input, 0)?) };
        std::iter::from_fn(|| pieces.next().transpose()).collect()
    }

    /// A small BPE with GPT-2's pattern, or with LLaMA-3's.
    fn word_tokenizer(pattern: Option<&str>) -> Tokenizer {
        let mut json: serde_json::Value =
            serde_json::from_str(include_str!("../tokenizer/bytes.tokenizer.json")).unwrap();
        let model = &mut json["model"];
        // The byte-level alphabet spells a space Ġ and a newline Ċ.
        let merges = [["Ġ", "t"], ["Ġt", "h"], ["Ċ", "Ċ"], [".", "Ċ"], ["Ġ", "Ġ"], ["a", "b"], ["Ġ", "ab"], [",", "Ġ"]];
        for (i, merge) in merges.iter().enumerate() {
            model["vocab"][merge.concat()] = (256 + i).into();
        }
        model["merges"] = serde_json::json!(merges);
        for (i, token) in json["added_tokens"].as_array_mut().unwrap().iter_mut().enumerate() {
            token["id"] = (256 + merges.len() + i).into();
        }
        json["pre_tokenizer"]["use_regex"] = pattern.is_none().into();
        if let Some(pattern) = pattern {
            let split = serde_json::json!({
                "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
            json["pre_tokenizer"] =
                serde_json::json!({ "type": "Sequence", "pretokenizers": [split, json["pre_tokenizer"]] });
        }
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    proptest! {
        #[test]
        fn pieces_join_to_the_range(text in "[a-c .,\n\u{e9}\u{1f600}]{0,200}", size in 4usize..40) {
            let pieces = pieces(text.as_bytes(), 0..text.len() as u64, size).unwrap();
            prop_assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= size));
            prop_assert_eq!(pieces.concat(), text);
        }

        /// Words are short enough here that every piece has a place to end at.
        #[test]
        fn pieces_give_the_ids_of_the_whole(text in "([thab]{1,3}([.,']{0,2}|[0-9]{1,2}|\n{0,3}|  )( [thab]{1,3}){2}){0,30}") {
            for tokenizer in [word_tokenizer(None), word_tokenizer(Some(LLAMA3))] {
                let whole = tokenizer.encode(&text).unwrap();
                let pieces = pieces(text.as_bytes(), 0..text.len() as u64, 24).unwrap();
                prop_assert!(text.len() < 24 || pieces.len() > 1);
                prop_assert_eq!(tokenizer.encode_batch(&pieces).unwrap().concat(), whole);
            }
        }
    }

    #[test]
    fn a_range_is_read_alone() {
        assert_eq!(pieces(b"one two three", 4..7, 100).unwrap(), ["two"]);
        assert!(pieces(b"one", 1..1, 100).unwrap().is_empty());
    }

    #[test]
    fn bad_bytes_are_reported_by_line() {
        let text = b"first\nsecond\nth\xffrd\n";
        for size in [4, 16, 100] {
            let error = pieces(text, 0..text.len() as u64, size).unwrap_err();
            assert!(matches!(error, Error::InvalidUtf8 { line: 3, offset: 15, .. }), "{error}");
        }
        // Also in a part of a file, and for a character that the end of the text cuts short.
        let error = pieces("ab\ncd\n\u{e9}".as_bytes(), 3..7, 100).unwrap_err();
        assert!(matches!(error, Error::InvalidUtf8 { line: 3, offset: 6, .. }), "{error}");
    }
}
