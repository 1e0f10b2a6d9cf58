//! A text file in pieces of bounded size, each valid UTF-8.
//!
//! Pieces are encoded on their own, so a border must not fall where a tokenizer would have joined the two sides. Between a
//! letter and a single space before another letter no tokenizer of the GPT-2 or LLaMA-3 kind does: their patterns end a word
//! there, and the space opens the next one. Ordinary text has such a place every few characters, and with borders only there
//! the pieces give the very ids of the whole text. (Tokenizers of the SentencePiece kind mark the start of every text they
//! are given, so there each border costs one such mark, per 256 KiB.) Text without such a place is cut between characters.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The most bytes of a piece.
const PIECE: usize = 256 << 10;

/// Reads a range of a file piece by piece.
pub(super) struct Pieces {
    path: PathBuf,
    source: std::io::Take<BufReader<File>>,
    /// What has been read and not yet returned.
    buffer: Vec<u8>,
    /// Where in the file `buffer` starts.
    offset: u64,
    piece: usize,
}

impl Pieces {
    pub(super) fn open(path: &Path, range: Range<u64>) -> Result<Self> {
        Self::with_size(path, range, PIECE)
    }

    fn with_size(path: &Path, range: Range<u64>, piece: usize) -> Result<Self> {
        let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
        file.seek(SeekFrom::Start(range.start)).map_err(Error::io(path))?;
        let source = file.take(range.end - range.start);
        Ok(Self { path: path.to_path_buf(), source, buffer: Vec::new(), offset: range.start, piece })
    }

    /// The next piece; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<String>> {
        let missing = self.piece.saturating_sub(self.buffer.len()) as u64;
        self.source.by_ref().take(missing).read_to_end(&mut self.buffer).map_err(Error::io(&self.path))?;
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
            Err(error) => return Err(self.invalid(error.valid_up_to())),
        };
        let rest = self.buffer.split_off(end);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        self.offset += bytes.len() as u64;
        String::from_utf8(bytes).map(Some).map_err(|e| self.invalid(e.utf8_error().valid_up_to()))
    }

    /// The error for the bad byte at `at` of the buffer. Counting lines reads the file again, which only an error pays for.
    fn invalid(&self, at: usize) -> Error {
        let offset = self.offset + at as u64;
        match newlines(&self.path, offset) {
            Ok(lines) => Error::InvalidUtf8 { path: self.path.clone(), line: lines + 1, offset },
            Err(source) => Error::Io { path: self.path.clone(), source },
        }
    }
}

fn newlines(path: &Path, end: u64) -> std::io::Result<u64> {
    let mut count = 0;
    for byte in BufReader::new(File::open(path)?.take(end)).bytes() {
        count += u64::from(byte? == b'\n');
    }
    Ok(count)
}

/// The last place in `text` that no tokenizer joins across; the whole of it where there is none.
fn border(text: &str) -> usize {
    let letter = |c: Option<char>| c.is_some_and(char::is_alphabetic);
    let separates =
        |&(at, _): &(usize, &str)| letter(text[..at].chars().next_back()) && letter(text[at + 1..].chars().next());
    text.rmatch_indices(' ').find(separates).map_or(text.len(), |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use tempfile::NamedTempFile;

    use super::*;
    use crate::Tokenizer;

    fn file(contents: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(contents).unwrap();
        file
    }

    fn pieces(contents: &[u8], range: Range<u64>, size: usize) -> Result<Vec<String>> {
        let file = file(contents);
        let mut pieces = Pieces::with_size(file.path(), range, size)?;
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
