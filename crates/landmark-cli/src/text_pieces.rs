//! A text from a file or a pipe, in pieces of bounded size, each valid UTF-8.
//!
//! A piece ends before a space between two letters where there is one: no tokenizer of the usual kinds joins across it, so the
//! pieces give the ids of the whole text.

use anyhow::Context;
use landmark_data::prepare::{self, border};
use std::fs;
use std::io::Read;
use std::path::Path;

/// The most bytes of a piece: what is shown of the progress goes by pieces.
const PIECE: usize = 64 << 10;

/// Reads a text piece by piece.
pub struct TextPieces {
    source: Box<dyn Read>,
    /// What errors call it.
    name: String,
    /// Its length in bytes, if that is known.
    length: Option<u64>,
    /// What has been read and not yet returned.
    buffer: Vec<u8>,
    /// Bytes and lines that were returned.
    offset: u64,
    lines: u64,
    piece: usize,
}

impl TextPieces {
    /// Reads a file, decompressed where its name ends in `.gz` or `.zst`; `-` is the standard input.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::new(Box::new(std::io::stdin()), "standard input".into(), None, PIECE));
        }
        let name = path.display().to_string();
        let cannot = || format!("cannot read {name}");
        let metadata = fs::metadata(path).with_context(cannot)?;
        if metadata.is_dir() {
            anyhow::bail!("cannot read {name}: it is a folder, expected a text file");
        }
        let is_compressed = path.extension().is_some_and(|ending| ending == "gz" || ending == "zst");
        let length = (metadata.is_file() && !is_compressed).then_some(metadata.len());
        let source = prepare::open(path).with_context(cannot)?;
        Ok(Self::new(source, name, length, PIECE))
    }

    fn new(source: Box<dyn Read>, name: String, length: Option<u64>, piece: usize) -> Self {
        Self { source, name, length, buffer: Vec::new(), offset: 0, lines: 0, piece }
    }

    /// The length of the text in bytes; `None` for a pipe, and for what is compressed.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    /// Bytes that were returned so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// All that is left.
    pub fn rest(mut self) -> anyhow::Result<String> {
        let mut text = String::new();
        while let Some(piece) = self.next()? {
            text.push_str(&piece);
        }
        Ok(text)
    }

    /// The next piece; `None` at the end.
    pub fn next(&mut self) -> anyhow::Result<Option<String>> {
        let missing = self.piece.saturating_sub(self.buffer.len()) as u64;
        let read = self.source.by_ref().take(missing).read_to_end(&mut self.buffer);
        read.with_context(|| format!("cannot read {}", self.name))?;
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let is_last = self.buffer.len() < self.piece;
        let end = match std::str::from_utf8(&self.buffer) {
            Ok(text) if is_last => text.len(),
            Ok(text) => border(text),
            // No error yet: the buffer may end within a character.
            Err(error) if !is_last && error.error_len().is_none() => {
                border(std::str::from_utf8(&self.buffer[..error.valid_up_to()])?)
            }
            Err(error) => {
                let at = error.valid_up_to();
                let line = self.lines + newlines(&self.buffer[..at]) + 1;
                anyhow::bail!(
                    "{}: line {line} is not valid UTF-8 (byte {} of the text); convert it, for example with iconv",
                    self.name,
                    self.offset + at as u64
                );
            }
        };
        let rest = self.buffer.split_off(end);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        self.offset += bytes.len() as u64;
        self.lines += newlines(&bytes);
        Ok(Some(String::from_utf8(bytes)?))
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &'static [u8], piece: usize) -> anyhow::Result<Vec<String>> {
        let mut pieces = TextPieces::new(Box::new(text), "text".into(), None, piece);
        std::iter::from_fn(|| pieces.next().transpose()).collect()
    }

    #[test]
    fn pieces_join_to_the_text() {
        let text = "Il \u{e9}tait une fois, dans la ville de Foix.\n\u{1f600}\u{1f600}\u{1f600} a b c";
        for piece in 4..60 {
            let pieces = pieces(text.as_bytes(), piece).unwrap();
            assert!(pieces.iter().all(|part| part.len() <= piece));
            assert_eq!(pieces.concat(), text);
        }
        assert_eq!(pieces(b"one two three", 9).unwrap(), ["one two", " three"]);
        assert!(pieces(b"", 9).unwrap().is_empty());
    }

    #[test]
    fn bad_bytes_are_told_by_line() {
        for piece in [4, 16, 100] {
            let error = pieces(b"first\nsecond\nth\xffrd\n", piece).unwrap_err().to_string();
            assert!(error.starts_with("text: line 3 is not valid UTF-8 (byte 15 of the text)"), "{error}");
        }
        assert!(pieces(b"cut \xc3", 100).unwrap_err().to_string().contains("line 1"));
    }
}
