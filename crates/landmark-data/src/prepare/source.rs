//! An input's bytes: decompressed, counted, and with the errors named by file and line.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{Compression, Input};
use crate::{Error, Result};

/// Bytes that are read at a time.
const BUFFER: usize = 128 << 10;

/// The text of an input, from some place in it on.
pub(super) struct Source {
    path: PathBuf,
    reader: BufReader<Box<dyn Read + Send>>,
    /// Where in the (decompressed) file the next byte is.
    offset: u64,
    /// Newlines between the place it was opened at and `offset`.
    newlines: u64,
    /// Newlines before the place it was opened at; `None` for a plain file that was opened in the middle, which are only
    /// counted if an error asks for them.
    newlines_before: Option<u64>,
    /// Bytes of the file itself that are used up.
    disk: Arc<AtomicU64>,
    disk_start: u64,
    opened_at: u64,
}

struct Counted {
    inner: io::Take<File>,
    count: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// The bytes of a file, decompressed where its name ends in `.gz` or `.zst`.
pub fn open(path: &Path) -> io::Result<Box<dyn Read + Send>> {
    decompressed(File::open(path)?, Compression::of(path))
}

fn decompressed(raw: impl Read + Send + 'static, compression: Compression) -> io::Result<Box<dyn Read + Send>> {
    Ok(match compression {
        Compression::None => Box::new(raw),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(BUFFER, raw))),
        Compression::Zstd => Box::new(zstd::Decoder::new(raw)?),
    })
}

impl Source {
    /// Opens `input` at `offset` of its decompressed bytes, or at the start of its range if that is later.
    pub(super) fn open(input: &Input, offset: u64) -> Result<Self> {
        let path = input.path.clone();
        let mut file = File::open(&path).map_err(Error::io(&path))?;
        let disk = Arc::new(AtomicU64::new(0));
        let plain = input.compression == Compression::None;
        let start = if plain { offset.max(input.range.start) } else { input.range.start };
        file.seek(SeekFrom::Start(start)).map_err(Error::io(&path))?;
        let raw = Counted { inner: file.take(input.range.end.saturating_sub(start)), count: disk.clone() };
        let reader = decompressed(raw, input.compression).map_err(Error::io(&path))?;
        let mut source = Self {
            path,
            reader: BufReader::with_capacity(BUFFER, reader),
            offset: start,
            newlines: 0,
            newlines_before: (start == 0).then_some(0),
            disk,
            disk_start: start - input.range.start,
            opened_at: start,
        };
        // Inside a compressed file there is no way to a place but through all before it: many times faster than encoding.
        let mut passed = Vec::new();
        while source.offset < offset {
            passed.clear();
            source.fill(&mut passed, usize::try_from(offset - source.offset).unwrap_or(BUFFER).min(BUFFER))?;
            if passed.is_empty() {
                break;
            }
        }
        Ok(source)
    }

    /// Where the next byte is.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the input, as it lies on the disk, that are used up.
    pub(super) fn disk(&self) -> u64 {
        self.disk_start + self.disk.load(Ordering::Relaxed)
    }

    /// Appends up to `limit` bytes to `buffer`; fewer only at the end.
    pub(super) fn fill(&mut self, buffer: &mut Vec<u8>, limit: usize) -> Result<()> {
        let start = buffer.len();
        let read = self.reader.by_ref().take(limit as u64).read_to_end(buffer);
        self.took(&buffer[start..]);
        read.map(drop).map_err(|e| self.read_error(e))
    }

    /// Appends the rest of the line to `buffer`, its end included, but not more than `limit` bytes.
    pub(super) fn line(&mut self, buffer: &mut Vec<u8>, limit: usize) -> Result<()> {
        let start = buffer.len();
        let read = self.reader.by_ref().take(limit as u64).read_until(b'\n', buffer);
        self.took(&buffer[start..]);
        read.map(drop).map_err(|e| self.read_error(e))
    }

    fn took(&mut self, bytes: &[u8]) {
        self.offset += bytes.len() as u64;
        self.newlines += newlines(bytes);
    }

    /// The error for the bad byte at `at` of `read`, the last bytes that were read.
    pub(super) fn invalid_utf8(&self, read: &[u8], at: usize) -> Error {
        let offset = self.offset - (read.len() - at) as u64;
        match self.lines() {
            Ok(lines) => {
                Error::InvalidUtf8 { path: self.path.clone(), line: lines - newlines(&read[at..]) + 1, offset }
            }
            Err(error) => error,
        }
    }

    /// The number of newlines before [`Source::offset`].
    pub(super) fn lines(&self) -> Result<u64> {
        let before = match self.newlines_before {
            Some(before) => before,
            None => count_newlines(&self.path, self.opened_at).map_err(Error::io(&self.path))?,
        };
        Ok(before + self.newlines)
    }

    fn read_error(&self, source: io::Error) -> Error {
        // An operating system's error has a number; a decoder's has none.
        if source.raw_os_error().is_some() {
            return Error::io(&self.path)(source);
        }
        match self.lines() {
            Ok(line) => Error::Archive { path: self.path.clone(), line, source: source.into() },
            Err(error) => error,
        }
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}

fn count_newlines(path: &std::path::Path, end: u64) -> io::Result<u64> {
    let mut reader = BufReader::with_capacity(BUFFER, File::open(path)?.take(end));
    let mut count = 0;
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(count);
        }
        count += newlines(buffer);
        let n = buffer.len();
        reader.consume(n);
    }
}
