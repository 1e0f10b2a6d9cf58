//! Token files: a corpus as ids, memory-mapped.
//!
//! # Layout, version 1
//!
//! All numbers are little endian. The header has 128 bytes:
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 8 | magic | the ASCII bytes `LMTOKENS` |
//! | 8 | 4 | version | 1 |
//! | 12 | 4 | token_width | bytes of a token: 2 or 4; 2 only where vocab_size is at most 65536 |
//! | 16 | 4 | vocab_size | every token is below it; at least 1 |
//! | 20 | 4 | end_of_text | the id that ends a document, below vocab_size; 0xffffffff for none |
//! | 24 | 8 | token_count | |
//! | 32 | 8 | document_count | |
//! | 40 | 4 | body_checksum | CRC-32 (IEEE) of all bytes after the header |
//! | 44 | 4 | reserved | zero |
//! | 48 | 32 | tokenizer | SHA-256 of the `tokenizer.json` that made the tokens; zero where unknown |
//! | 80 | 44 | reserved | zero |
//! | 124 | 4 | header_checksum | CRC-32 (IEEE) of bytes 0..124 |
//!
//! The body follows, and the file ends with it:
//!
//! 1. the tokens: token_count * token_width bytes, no landmarks among them;
//! 2. zero bytes up to the next multiple of 8;
//! 3. the document borders: document_count unsigned 64-bit numbers, the index one past the last token of each document
//!    (its end-of-text included). They never fall, and the last is token_count. No documents only without tokens.
//!
//! A reader refuses a file whose length is not exactly what the header implies.
//!
//! # What is checked when
//!
//! [`TokenFile::open`] checks everything that takes constant time: the header and its checksum, the length, the last
//! border. It also [verifies](TokenFile::verify) the whole body of files up to 64 MiB, which costs milliseconds. For larger
//! ones `verify` is for the caller to call: a training run can afford it (it reads about as fast as the disk), a look at
//! the header should not pay for it.
//!
//! # Raw files
//!
//! The authors of the method keep their corpora in headerless files of 16-bit ids, `train.bin` and `val.bin` (or
//! `validation.bin`). Such a file says nothing about itself, so it is only read as one when that is asked for by name: with
//! [`TokenFile::open_raw_u16`], or by the extension `.bin` with [`TokenFile::open_by_extension`].

mod header;
mod writer;

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Fingerprint, Result};
use header::{BORDER_LEN, HEADER_LEN, Header, Width};
pub use writer::TokenWriter;
pub(crate) use writer::{Body, Mark};

/// Bodies up to this size are verified when a file is opened.
const VERIFY_ON_OPEN: u64 = 64 << 20;

/// What a token file says about its tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenFileInfo {
    /// Every token is below it.
    pub vocab_size: u32,
    /// The id that ends a document, if there is one.
    pub end_of_text: Option<u32>,
    /// The tokenizer that made the tokens, or [`Fingerprint::UNKNOWN`].
    pub tokenizer: Fingerprint,
}

impl TokenFileInfo {
    /// The description of tokens that `tokenizer` makes.
    pub fn of(tokenizer: &crate::Tokenizer) -> Self {
        Self {
            // Cannot saturate: a tokenizer's ids are 32-bit.
            vocab_size: u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX),
            end_of_text: tokenizer.end_of_text(),
            tokenizer: tokenizer.fingerprint(),
        }
    }
}

/// A memory-mapped file of tokens, for random access. The layout is described in the [module documentation](self).
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    map: Mmap,
    /// `None` for a raw file.
    header: Option<Header>,
    width: Width,
    /// Where the tokens start, in bytes.
    start: usize,
    len: u64,
    documents: u64,
    borders_start: usize,
}

impl TokenFile {
    /// Opens a token file; see the [module documentation](self) for what is checked.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = map(path)?;
        let header = Header::decode(path, &map)?;
        let got = map.len() as u64;
        // Counts that overflow imply a length that no file has.
        let layout = header.layout().filter(|layout| layout.file_len == got).ok_or_else(|| Error::WrongLength {
            path: path.to_path_buf(),
            got,
            expected: header.layout().map_or(u64::MAX, |layout| layout.file_len),
        })?;
        let file = Self {
            path: path.to_path_buf(),
            width: header.width,
            start: HEADER_LEN,
            len: header.tokens,
            documents: header.documents,
            // Fits: the whole file is mapped.
            borders_start: layout.borders_start as usize,
            header: Some(header),
            map,
        };
        let last = file.document_end(file.documents.saturating_sub(1)).unwrap_or(0);
        if last != file.len {
            return Err(file.bad_border(file.documents.saturating_sub(1), last));
        }
        if got <= VERIFY_ON_OPEN {
            file.verify()?;
        }
        Ok(file)
    }

    /// Opens a headerless file of 16-bit little-endian ids.
    pub fn open_raw_u16(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = map(path)?;
        let len = map.len() as u64;
        if !len.is_multiple_of(2) {
            return Err(Error::WrongLength { path: path.to_path_buf(), got: len, expected: len + 1 });
        }
        let path = path.to_path_buf();
        Ok(Self { path, map, header: None, width: Width::U16, start: 0, len: len / 2, documents: 0, borders_start: 0 })
    }

    /// [`TokenFile::open_raw_u16`] for a path that ends in `.bin`, [`TokenFile::open`] for any other.
    pub fn open_by_extension(path: impl AsRef<Path>) -> Result<Self> {
        match path.as_ref().extension() {
            Some(extension) if extension == "bin" => Self::open_raw_u16(path),
            _ => Self::open(path),
        }
    }

    /// The number of tokens.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The token at `index`. O(1).
    pub fn get(&self, index: u64) -> Option<u32> {
        if index >= self.len {
            return None;
        }
        // The index fits: the token lies inside the map.
        let tokens = self.map.get(self.start..)?;
        match self.width {
            Width::U16 => tokens.get(index as usize * 2..)?.first_chunk().map(|b| u16::from_le_bytes(*b).into()),
            Width::U32 => tokens.get(index as usize * 4..)?.first_chunk().map(|b| u32::from_le_bytes(*b)),
        }
    }

    /// What the header says about the tokens; `None` for a raw file.
    pub fn info(&self) -> Option<TokenFileInfo> {
        self.header.as_ref().map(|header| TokenFileInfo {
            vocab_size: header.vocab_size,
            end_of_text: header.end_of_text,
            tokenizer: header.tokenizer,
        })
    }

    /// Refuses a file that was written with another tokenizer. A raw file and one of unknown origin pass.
    pub fn check_tokenizer(&self, tokenizer: &crate::Tokenizer) -> Result<()> {
        let expected = tokenizer.fingerprint();
        match &self.header {
            Some(header) if !tokenizer.encodes_as(header.tokenizer) && header.tokenizer != Fingerprint::UNKNOWN => {
                Err(Error::OtherTokenizer { path: self.path.clone(), got: header.tokenizer, expected })
            }
            _ => Ok(()),
        }
    }

    /// The number of documents; 0 for a raw file, which does not know.
    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// The range of the tokens of a document, its end-of-text included. O(1).
    pub fn document(&self, index: u64) -> Option<std::ops::Range<u64>> {
        let start = if index == 0 { 0 } else { self.document_end(index - 1)? };
        Some(start..self.document_end(index)?)
    }

    /// The file this is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the whole file and checks all that its header promises: the checksum, the order of the document borders, that
    /// every token is in the vocabulary. A raw file promises nothing.
    pub fn verify(&self) -> Result<()> {
        let Some(header) = &self.header else { return Ok(()) };
        let got = crc32fast::hash(&self.map[HEADER_LEN..]);
        if got != header.body_checksum {
            return Err(Error::BodyChecksum { path: self.path.clone(), got, expected: header.body_checksum });
        }
        let mut start = 0;
        for document in 0..self.documents {
            let end = self.document_end(document).unwrap_or(0);
            if end < start || end > self.len {
                return Err(self.bad_border(document, end));
            }
            start = end;
        }
        let vocab_size = header.vocab_size;
        match (0..self.len).filter_map(|i| self.get(i)).find(|&id| id >= vocab_size) {
            Some(id) => Err(Error::UnknownToken { id, vocab_size }),
            None => Ok(()),
        }
    }

    fn document_end(&self, document: u64) -> Option<u64> {
        if document >= self.documents {
            return None;
        }
        let at = self.borders_start + document as usize * BORDER_LEN as usize;
        self.map.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }

    fn bad_border(&self, document: u64, got: u64) -> Error {
        Error::DocumentBorder { path: self.path.clone(), document, got }
    }
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: a map is only sound while nobody changes or truncates the file under it. Token files are never written in
    // place: the writer renames a finished file over the old one, whose contents stay for those who have it mapped.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}

#[cfg(test)]
mod tests;
