//! Writing of token files, in one pass and constant memory.
//!
//! A [`TokenWriter`] gives its file the final name when it is finished and leaves nothing before that. Below it lies [`Body`],
//! the tokens and borders of an unfinished file, which can also be kept: it says where it is ([`Mark`]), goes back to where its
//! current document began, and is opened again at a mark after the process has died.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::{NamedTempFile, TempPath};

use super::TokenFileInfo;
use super::header::{BORDER_LEN, HEADER_LEN, Header, Width};
use crate::{Error, Result, output};

/// Bytes that are copied or summed at a time.
const COPY: usize = 64 << 10;

/// Appends tokens to a new token file, which appears at its path only when [`TokenWriter::finish`] succeeds. Dropped before
/// that, it leaves nothing.
#[derive(Debug)]
pub struct TokenWriter {
    path: PathBuf,
    body: Body,
    temporary: TempPath,
}

impl TokenWriter {
    /// Starts a file that will be at `path`.
    pub fn create(path: impl AsRef<Path>, info: &TokenFileInfo) -> Result<Self> {
        let path = path.as_ref();
        check(info)?;
        let (file, temporary) = output::temporary(path)?.into_parts();
        let borders = tempfile::tempfile_in(output::folder_of(path)).map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), body: Body::start(path, file, borders, info)?, temporary })
    }

    /// Appends tokens to the current document.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        self.body.push(tokens)
    }

    /// Ends the current document: appends end-of-text, if there is such a token, and marks the border.
    pub fn end_document(&mut self) -> Result<()> {
        self.body.end_document()
    }

    /// The number of tokens so far.
    pub fn len(&self) -> u64 {
        self.body.len()
    }

    /// Whether there are no tokens so far.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Completes the file, flushes it to the disk and gives it its name. Tokens after the last
    /// [`end_document`](Self::end_document) are a document without end-of-text.
    pub fn finish(self) -> Result<()> {
        let file = self.body.complete()?;
        output::commit(NamedTempFile::from_parts(file, self.temporary), &self.path)
    }
}

/// A place in an unfinished token file: what it takes to go on from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    tokens: u64,
    documents: u64,
    /// Of the tokens.
    checksum: u32,
    /// Where the current document began, and the checksum of the tokens before it.
    document_start: u64,
    document_checksum: u32,
}

/// The tokens and the document borders of an unfinished token file.
#[derive(Debug)]
pub(crate) struct Body {
    path: PathBuf,
    file: BufWriter<File>,
    /// The borders follow the tokens in the file, so they wait in another one.
    borders: BufWriter<File>,
    header: Header,
    checksum: crc32fast::Hasher,
    /// Where the current document began, and the checksum of the tokens before it.
    document: (u64, crc32fast::Hasher),
    scratch: Vec<u8>,
}

impl Body {
    fn start(path: &Path, file: File, borders: File, info: &TokenFileInfo) -> Result<Self> {
        check(info)?;
        let mut file = BufWriter::new(file);
        // A placeholder: the counts and the checksum are known at the end.
        file.write_all(&[0; HEADER_LEN]).map_err(Error::io(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            borders: BufWriter::new(borders),
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
            document: (0, crc32fast::Hasher::new()),
            scratch: Vec::new(),
        })
    }

    /// Starts a file at `path` itself, whose borders wait at `borders`.
    pub(crate) fn create(path: &Path, borders: &Path, info: &TokenFileInfo) -> Result<Self> {
        let open = |path: &Path| {
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).map_err(Error::io(path))
        };
        Self::start(path, open(path)?, open(borders)?, info)
    }

    /// Goes on with what [`Body::create`] began, from `mark`; what was written after it is cut off. `None` where the files do
    /// not hold what they held at the mark.
    pub(crate) fn resume(path: &Path, borders: &Path, info: &TokenFileInfo, mark: &Mark) -> Result<Option<Self>> {
        let open = |path: &Path| match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path)(error)),
        };
        let (Some(file), Some(border_file)) = (open(path)?, open(borders)?) else { return Ok(None) };
        let width = Width::of(info.vocab_size).bytes();
        let (end, document) = (mark.tokens * width, mark.document_start * width);
        let lens = (
            file.metadata().map_err(Error::io(path))?.len(),
            border_file.metadata().map_err(Error::io(borders))?.len(),
        );
        if lens.0 < HEADER_LEN as u64 + end || lens.1 < mark.documents * BORDER_LEN {
            return Ok(None);
        }
        let mut body = Self::start(path, file, border_file, info)?;
        // Now, at the start of the file: the reader below moves the place that both handles share.
        body.file.flush().map_err(Error::io(path))?;
        // The tokens are read once: a disk that lost some of them is found out here and not in a training run.
        let mut reader = BufReader::with_capacity(COPY, body.file.get_ref().try_clone().map_err(Error::io(path))?);
        reader.seek(SeekFrom::Start(HEADER_LEN as u64)).map_err(Error::io(path))?;
        let mut checksum = crc32fast::Hasher::new();
        sum(&mut reader, document, &mut checksum).map_err(Error::io(path))?;
        body.document = (mark.document_start, checksum.clone());
        sum(&mut reader, end - document, &mut checksum).map_err(Error::io(path))?;
        let sums = (body.document.1.clone().finalize(), checksum.clone().finalize());
        if sums != (mark.document_checksum, mark.checksum) {
            return Ok(None);
        }
        body.checksum = checksum;
        body.header.tokens = mark.tokens;
        body.header.documents = mark.documents;
        body.cut(HEADER_LEN as u64 + end, mark.documents * BORDER_LEN)?;
        Ok(Some(body))
    }

    /// Flushes everything to the disk; the mark of this place.
    pub(crate) fn mark(&mut self) -> Result<Mark> {
        for file in [&mut self.file, &mut self.borders] {
            file.flush().and_then(|()| file.get_ref().sync_data()).map_err(Error::io(&self.path))?;
        }
        Ok(Mark {
            tokens: self.header.tokens,
            documents: self.header.documents,
            checksum: self.checksum.clone().finalize(),
            document_start: self.document.0,
            document_checksum: self.document.1.clone().finalize(),
        })
    }

    pub(crate) fn push(&mut self, tokens: &[u32]) -> Result<()> {
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
        Ok(())
    }

    pub(crate) fn end_document(&mut self) -> Result<()> {
        if let Some(id) = self.header.end_of_text {
            self.push(&[id])?;
        }
        self.mark_border()
    }

    /// Takes back the tokens of the current document.
    pub(crate) fn abandon_document(&mut self) -> Result<()> {
        let (start, checksum) = self.document.clone();
        if start < self.header.tokens {
            self.file.flush().map_err(Error::io(&self.path))?;
            self.header.tokens = start;
            self.checksum = checksum;
            self.cut(HEADER_LEN as u64 + start * self.header.width.bytes(), self.header.documents * BORDER_LEN)?;
        }
        Ok(())
    }

    pub(crate) fn len(&self) -> u64 {
        self.header.tokens
    }

    /// Completes the file in its place, flushed to the disk.
    pub(crate) fn complete(mut self) -> Result<File> {
        if self.document.0 < self.header.tokens {
            self.mark_border()?;
        }
        let padding = self.header.layout().map_or(0, |layout| layout.borders_start - layout.tokens_end);
        self.append(&[0; 8][..padding as usize])?;
        self.copy_borders()?;
        self.header.body_checksum = self.checksum.clone().finalize();

        let mut file = self.file.into_inner().map_err(|e| Error::io(&self.path)(e.into_error()))?;
        file.seek(SeekFrom::Start(0)).map_err(Error::io(&self.path))?;
        file.write_all(&self.header.encode()).map_err(Error::io(&self.path))?;
        file.sync_all().map_err(Error::io(&self.path))?;
        Ok(file)
    }

    fn mark_border(&mut self) -> Result<()> {
        self.borders.write_all(&self.header.tokens.to_le_bytes()).map_err(Error::io(&self.path))?;
        self.header.documents += 1;
        self.document = (self.header.tokens, self.checksum.clone());
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

    /// Cuts both files to these lengths and goes on at their ends.
    fn cut(&mut self, tokens: u64, borders: u64) -> Result<()> {
        for (file, len) in [(&mut self.file, tokens), (&mut self.borders, borders)] {
            // The seek first: it flushes what is buffered.
            file.seek(SeekFrom::Start(len)).map_err(Error::io(&self.path))?;
            file.get_ref().set_len(len).map_err(Error::io(&self.path))?;
        }
        Ok(())
    }

    /// Writes bytes of the body.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.checksum.update(bytes);
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }
}

fn check(info: &TokenFileInfo) -> Result<()> {
    if info.vocab_size == 0 {
        return Err(Error::Param { name: "vocab_size", got: "0".into(), expected: "at least 1" });
    }
    match info.end_of_text.filter(|&id| id >= info.vocab_size) {
        Some(id) => Err(Error::UnknownToken { id, vocab_size: info.vocab_size }),
        None => Ok(()),
    }
}

fn sum(reader: &mut impl Read, mut len: u64, checksum: &mut crc32fast::Hasher) -> std::io::Result<()> {
    let mut chunk = vec![0; COPY];
    while len > 0 {
        let part = len.min(COPY as u64) as usize;
        reader.read_exact(&mut chunk[..part])?;
        checksum.update(&chunk[..part]);
        len -= part as u64;
    }
    Ok(())
}
