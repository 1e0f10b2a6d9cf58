//! Writing of token files, in one pass and constant memory.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::TokenFileInfo;
use super::header::{HEADER_LEN, Header, Width};
use crate::{Error, Result, output};

/// Bytes of document borders that are copied at a time.
const COPY: usize = 64 << 10;

/// Appends tokens to a new token file, which appears at its path only when [`TokenWriter::finish`] succeeds. Dropped before
/// that, it leaves nothing.
#[derive(Debug)]
pub struct TokenWriter {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    /// The borders follow the tokens in the file, so they wait in an unnamed one.
    borders: BufWriter<File>,
    header: Header,
    checksum: crc32fast::Hasher,
    /// Whether tokens were written since the last border.
    open_document: bool,
    scratch: Vec<u8>,
}

impl TokenWriter {
    /// Starts a file that will be at `path`.
    pub fn create(path: impl AsRef<Path>, info: &TokenFileInfo) -> Result<Self> {
        let path = path.as_ref();
        if info.vocab_size == 0 {
            return Err(Error::Param { name: "vocab_size", got: "0".into(), expected: "at least 1" });
        }
        if let Some(id) = info.end_of_text.filter(|&id| id >= info.vocab_size) {
            return Err(Error::UnknownToken { id, vocab_size: info.vocab_size });
        }
        let mut file = BufWriter::new(output::temporary(path)?);
        // A placeholder: the counts and the checksum are known at the end.
        file.write_all(&[0; HEADER_LEN]).map_err(Error::io(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            borders: BufWriter::new(tempfile::tempfile_in(output::folder_of(path)).map_err(Error::io(path))?),
            header: Header {
                width: Width::of(info.vocab_size),
                vocab_size: info.vocab_size,
                end_of_text: info.end_of_text,
                tokens: 0,
                documents: 0,
                body_checksum: 0,
                tokenizer: info.tokenizer,
            },
            checksum: crc32fast::Hasher::new(),
            open_document: false,
            scratch: Vec::new(),
        })
    }

    /// Appends tokens to the current document.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.header.vocab_size;
        if let Some(&id) = tokens.iter().find(|&&id| id >= vocab_size) {
            return Err(Error::UnknownToken { id, vocab_size });
        }
        // Reused from call to call: a document's pieces are of about one size.
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        match self.header.width {
            // No id is cut: all are below a vocabulary of at most 65536.
            Width::U16 => scratch.extend(tokens.iter().flat_map(|&id| (id as u16).to_le_bytes())),
            Width::U32 => scratch.extend(tokens.iter().flat_map(|&id| id.to_le_bytes())),
        }
        let written = self.append(&scratch);
        self.scratch = scratch;
        written?;
        self.header.tokens += tokens.len() as u64;
        self.open_document |= !tokens.is_empty();
        Ok(())
    }

    /// Ends the current document: appends end-of-text, if there is such a token, and marks the border.
    pub fn end_document(&mut self) -> Result<()> {
        if let Some(id) = self.header.end_of_text {
            self.push(&[id])?;
        }
        self.mark_border()
    }

    /// The number of tokens so far.
    pub fn len(&self) -> u64 {
        self.header.tokens
    }

    /// Whether there are no tokens so far.
    pub fn is_empty(&self) -> bool {
        self.header.tokens == 0
    }

    /// Completes the file, flushes it to the disk and gives it its name. Tokens after the last
    /// [`end_document`](Self::end_document) are a document without end-of-text.
    pub fn finish(mut self) -> Result<()> {
        if self.open_document {
            self.mark_border()?;
        }
        let padding = self.header.layout().map_or(0, |layout| layout.borders_start - layout.tokens_end);
        self.append(&[0; 8][..padding as usize])?;
        self.copy_borders()?;
        self.header.body_checksum = self.checksum.clone().finalize();

        let mut file = self.file.into_inner().map_err(|e| Error::io(&self.path)(e.into_error()))?;
        file.seek(SeekFrom::Start(0)).map_err(Error::io(&self.path))?;
        file.write_all(&self.header.encode()).map_err(Error::io(&self.path))?;
        output::commit(file, &self.path)
    }

    fn mark_border(&mut self) -> Result<()> {
        self.borders.write_all(&self.header.tokens.to_le_bytes()).map_err(Error::io(&self.path))?;
        self.header.documents += 1;
        self.open_document = false;
        Ok(())
    }

    fn copy_borders(&mut self) -> Result<()> {
        self.borders.seek(SeekFrom::Start(0)).map_err(Error::io(&self.path))?;
        let file = self.borders.get_ref().try_clone().map_err(Error::io(&self.path))?;
        let mut borders = BufReader::new(file);
        let mut chunk = vec![0; COPY];
        loop {
            let n = borders.read(&mut chunk).map_err(Error::io(&self.path))?;
            if n == 0 {
                return Ok(());
            }
            self.append(&chunk[..n])?;
        }
    }

    /// Writes bytes of the body.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.checksum.update(bytes);
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }
}
