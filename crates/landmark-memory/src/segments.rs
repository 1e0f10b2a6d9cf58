//! The disk tier: finished blocks in files that only grow.
//!
//! The blocks of a session are cut into *segments* of as many blocks each. Segment `i` is two files: `blocks-NNNNNN.seg` with keys and values,
//! and `blocks-NNNNNN.idx` with what is always in memory: landmark keys, lengths, and checksums of the others. All numbers are little
//! endian, all checksums CRC-32C.
//!
//! # `blocks-NNNNNN.seg`
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 0 | 8 | the ASCII bytes `LMBLOCKS` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | element type: 0 float32, 1 bfloat16, 2 int8 |
//! | 16 | 4 | layers |
//! | 20 | 4 | heads of keys and values, times rows of the batch |
//! | 24 | 4 | positions of a block's place |
//! | 28 | 4 | channels of a head |
//! | 32 | 8 | blocks of a segment |
//! | 40 | 8 | the segment's number |
//! | 48 | 8 | lineage: a random number that a session and its forks share |
//! | 56 | 4 | zero |
//! | 60 | 4 | checksum of bytes 0..60 |
//! | 64 | | blocks: for each layer, for each head a unit (see `codec`), the layers' heads side by side: what one retrieval reads is contiguous |
//!
//! # `blocks-NNNNNN.idx`
//!
//! The same 64 bytes with the magic `LMLANDMK`, then one record a block:
//!
//! | size | field |
//! | ---: | --- |
//! | 8 | the block's number in the text |
//! | 8 | the text's token that it begins with |
//! | 4 | its ordinary tokens |
//! | 4 | checksum of these tokens, 4 bytes each |
//! | 4 * units | checksums of its units |
//! | 4 * units * channels | landmark keys, float32, as scored |
//! | 4 | checksum of the record up to here |
//!
//! A file may go on after the blocks that the journal knows of: that is what was written when the machine stopped, and is
//! written over.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::codec::Codec;
use crate::{Error, Result};

/// Bytes of a segment at most, if more than one block fits.
const SEGMENT: usize = 256 << 20;
/// Bytes of a header.
pub const HEADER: usize = 64;
/// Files that are kept open.
const OPEN_FILES: usize = 512;
const VERSION: u32 = 1;

/// What decides the sizes of a session's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layers.
    pub layers: usize,
    /// Heads of keys and values, times rows of the batch.
    pub heads: usize,
    /// Units.
    pub codec: Codec,
    /// Blocks of a segment.
    pub per_segment: usize,
    /// What a session and its forks share.
    pub lineage: u64,
}

/// What is known of a block besides its keys and values.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockRecord {
    /// The block's number in the text.
    pub number: u64,
    /// The text's token that it begins with.
    pub start: u64,
    /// Its ordinary tokens.
    pub tokens: u32,
    /// Checksum of them.
    pub tokens_crc: u32,
    /// Of its units.
    pub crcs: Vec<u32>,
    /// Landmark keys `[units, head_dim]`.
    pub landmarks: Vec<f32>,
}

impl Shape {
    /// Units of a block.
    pub fn units(&self) -> usize {
        self.layers * self.heads
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.units() * self.codec.unit()
    }

    /// The same with segments of the usual size.
    pub fn with_usual_segments(self) -> Self {
        Self { per_segment: (SEGMENT / self.block_bytes()).clamp(1, 4096), ..self }
    }

    fn record_bytes(&self) -> usize {
        24 + 4 * self.units() * (1 + self.codec.head_dim) + 4
    }

    /// Lengths of the two files of a segment with so many blocks.
    pub fn file_lengths(&self, blocks: usize) -> [u64; 2] {
        [self.block_bytes(), self.record_bytes()].map(|size| (HEADER + blocks * size) as u64)
    }

    /// Bytes on disk that so many blocks take.
    pub fn disk_bytes(&self, blocks: usize) -> u64 {
        let segments = blocks.div_ceil(self.per_segment);
        let each = (self.block_bytes() + self.record_bytes()) as u64;
        // A number of blocks may be a damaged journal's.
        ((segments * 2 * HEADER) as u64).saturating_add((blocks as u64).saturating_mul(each))
    }

    fn header(&self, magic: &[u8; 8], segment: usize) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(magic);
        let Codec { of, block, head_dim } = self.codec;
        let small = [VERSION, of.code(), self.layers as u32, self.heads as u32, block as u32, head_dim as u32];
        for (i, x) in small.into_iter().enumerate() {
            header[8 + 4 * i..][..4].copy_from_slice(&x.to_le_bytes());
        }
        for (i, x) in [self.per_segment as u64, segment as u64, self.lineage].into_iter().enumerate() {
            header[32 + 8 * i..][..8].copy_from_slice(&x.to_le_bytes());
        }
        let crc = crc32c::crc32c(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        header
    }
}

impl BlockRecord {
    fn encode(&self, bytes: &mut Vec<u8>) {
        let begin = bytes.len();
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.start.to_le_bytes());
        bytes.extend(self.tokens.to_le_bytes());
        bytes.extend(self.tokens_crc.to_le_bytes());
        self.crcs.iter().for_each(|crc| bytes.extend(crc.to_le_bytes()));
        self.landmarks.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        bytes.extend(crc32c::crc32c(&bytes[begin..]).to_le_bytes());
    }

    /// The record of block `number`, if these bytes are that.
    fn decode(bytes: &[u8], number: u64, shape: &Shape) -> Option<Self> {
        let (body, crc) = bytes.split_last_chunk::<4>()?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        let long = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("8 bytes"));
        let (words, _) = body[16..].as_chunks::<4>();
        let (crcs, landmarks) = words[2..].split_at(shape.units());
        let record = Self {
            number: long(0),
            start: long(8),
            tokens: u32::from_le_bytes(words[0]),
            tokens_crc: u32::from_le_bytes(words[1]),
            crcs: crcs.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect(),
            landmarks: landmarks.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        };
        let fits = record.number == number && record.tokens > 0 && (record.tokens as usize) < shape.codec.block;
        fits.then_some(record)
    }
}

/// The files of a session's blocks.
#[derive(Debug)]
pub struct Segments {
    folder: PathBuf,
    shape: Shape,
    /// For reading; by segment.
    open: Mutex<Vec<Option<Arc<File>>>>,
}

/// Names of the two files of a segment.
pub fn names(segment: usize) -> [String; 2] {
    [format!("blocks-{segment:06}.seg"), format!("blocks-{segment:06}.idx")]
}

impl Segments {
    /// Those in a folder; nothing is looked at yet.
    pub fn new(folder: &Path, shape: Shape) -> Self {
        Self { folder: folder.to_path_buf(), shape, open: Mutex::default() }
    }

    /// What decides their sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    fn paths(&self, segment: usize) -> [PathBuf; 2] {
        names(segment).map(|name| self.folder.join(name))
    }

    /// The parts of `blocks..` that are in one segment each: segment, and the range in it.
    fn parts(&self, blocks: std::ops::Range<usize>) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> + use<> {
        let per = self.shape.per_segment;
        (blocks.start / per..blocks.end.div_ceil(per)).map(move |segment| {
            let from = blocks.start.max(segment * per) - segment * per;
            (segment, from..blocks.end.min((segment + 1) * per) - segment * per)
        })
    }

    /// Writes blocks after all that are known, `data` theirs side by side. Nothing is on the disk for sure before [`Self::sync`].
    pub fn write(&self, records: &[BlockRecord], data: &[u8]) -> Result<()> {
        let Some(first) = records.first().map(|record| record.number as usize) else { return Ok(()) };
        for (segment, range) in self.parts(first..first + records.len()) {
            let [seg, idx] = self.paths(segment);
            let at = segment * self.shape.per_segment + range.start - first;
            let size = self.shape.block_bytes();
            let blocks = &data[at * size..][..range.len() * size];
            self.write_part(&seg, b"LMBLOCKS", segment, range.start, size, blocks)?;
            let mut bytes = Vec::with_capacity(range.len() * self.shape.record_bytes());
            records[at..at + range.len()].iter().for_each(|record| record.encode(&mut bytes));
            self.write_part(&idx, b"LMLANDMK", segment, range.start, self.shape.record_bytes(), &bytes)?;
        }
        Ok(())
    }

    fn write_part(
        &self,
        path: &Path,
        magic: &[u8; 8],
        segment: usize,
        block: usize,
        size: usize,
        bytes: &[u8],
    ) -> Result<()> {
        let write = || {
            if is_shared(path) {
                unshare(path)?;
            }
            let file = OpenOptions::new().write(true).create(true).truncate(block == 0).open(path)?;
            // Not only at its beginning: a damaged one, whose blocks repair dropped, would take what is appended with it.
            write_at(&file, &self.shape.header(magic, segment), 0)?;
            write_at(&file, bytes, (HEADER + block * size) as u64)
        };
        write().map_err(Error::io("write", path))
    }

    /// Waits until these blocks are on the disk.
    pub fn sync(&self, blocks: std::ops::Range<usize>) -> Result<()> {
        for (segment, _) in self.parts(blocks) {
            for path in self.paths(segment) {
                let sync = || OpenOptions::new().write(true).open(&path)?.sync_data();
                sync().map_err(Error::io("write", &path))?;
            }
        }
        Ok(())
    }

    /// Takes away what is after the first `blocks`, which the disk had no room for or nobody knows of. What cannot be taken away is written
    /// over later.
    pub fn cut(&self, blocks: usize) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let per = self.shape.per_segment;
        let segment = blocks / per;
        for (path, size) in self.paths(segment).iter().zip([self.shape.block_bytes(), self.shape.record_bytes()]) {
            let kept = blocks - segment * per;
            if kept == 0 {
                let _ = std::fs::remove_file(path);
            } else if !is_shared(path)
                && let Ok(file) = OpenOptions::new().write(true).open(path)
            {
                let _ = file.set_len((HEADER + kept * size) as u64);
            }
        }
        for segment in segment + 1.. {
            let removed = self.paths(segment).map(|path| std::fs::remove_file(path).is_ok());
            if removed == [false; 2] {
                break;
            }
        }
    }

    /// The records of the first `blocks`, a segment at a time; `None` for those that are `dropped`.
    pub fn records<'a>(
        &'a self,
        blocks: usize,
        dropped: &'a (dyn Fn(usize) -> bool + Sync),
    ) -> impl Iterator<Item = Result<Vec<Option<BlockRecord>>>> + 'a {
        self.parts(0..blocks).map(move |(segment, range)| {
            let path = &self.paths(segment)[1];
            let first = segment * self.shape.per_segment;
            if range.clone().all(|i| dropped(first + i)) {
                return Ok(vec![None; range.len()]);
            }
            let size = self.shape.record_bytes();
            let read = || {
                let mut bytes = vec![0; HEADER + range.end * size];
                read_at(&File::open(path)?, &mut bytes, 0)?;
                Ok(bytes)
            };
            let bytes = read().map_err(|error: std::io::Error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Error::damaged(path, "it is shorter than its landmarks"),
                _ => Error::io("read", path)(error),
            })?;
            if bytes[..HEADER] != self.shape.header(b"LMLANDMK", segment) {
                return Err(Error::damaged(path, "its header is not that of this session's landmarks"));
            }
            let record = |i: usize| {
                let number = first + i;
                if dropped(number) {
                    return Ok(None);
                }
                let bytes = &bytes[HEADER + i * size..][..size];
                let record = BlockRecord::decode(bytes, number as u64, &self.shape);
                let what =
                    || format!("the landmarks of block {number} are damaged; `landmark session repair` drops it");
                record.map(Some).ok_or_else(|| Error::damaged(path, what()))
            };
            range.into_par_iter().map(record).collect()
        })
    }

    /// Refuses files that are not there, or shorter than their blocks.
    pub fn check_lengths(&self, blocks: usize, dropped: &dyn Fn(usize) -> bool) -> Result<()> {
        for (segment, range) in self.parts(0..blocks) {
            if range.clone().all(|i| dropped(segment * self.shape.per_segment + i)) {
                continue;
            }
            for (path, length) in self.paths(segment).iter().zip(self.shape.file_lengths(range.end)) {
                let found = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
                if found < length {
                    let what = format!("it has {found} bytes, and its {} blocks take {length}", range.end);
                    return Err(Error::damaged(path, what));
                }
            }
        }
        Ok(())
    }

    /// How many of the first `blocks` there may be, by the names of the files.
    pub fn present(&self, blocks: usize) -> usize {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let segment = |name: String| name.strip_prefix("blocks-")?.split_once('.')?.0.parse::<usize>().ok();
        let segments = entries.filter_map(|entry| segment(entry.file_name().into_string().ok()?));
        let per = self.shape.per_segment;
        segments.map(|segment| segment.saturating_add(1).saturating_mul(per)).max().unwrap_or(0).min(blocks)
    }

    /// The record of one block, if it is whole.
    pub fn record(&self, block: usize) -> Option<BlockRecord> {
        let (segment, range) = self.parts(block..block + 1).next()?;
        let file = File::open(&self.paths(segment)[1]).ok()?;
        let mut header = [0; HEADER];
        read_at(&file, &mut header, 0).ok()?;
        let size = self.shape.record_bytes();
        let at = (HEADER + range.start * size) as u64;
        has(&file, at, size).ok().filter(|&is_there| is_there)?;
        let mut bytes = vec![0; size];
        read_at(&file, &mut bytes, at).ok()?;
        let record = BlockRecord::decode(&bytes, block as u64, &self.shape)?;
        (header == self.shape.header(b"LMLANDMK", segment)).then_some(record)
    }

    /// Tells the system that `units` of a block will be read at once, so that the disk begins with them. If it cannot be told, they are read all the same.
    pub fn will_read(&self, block: usize, units: std::ops::Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            let (segment, range) = self.parts(block..block + 1).next().expect("one block is in one segment");
            let (at, unit) = (range.start * self.shape.block_bytes(), self.shape.codec.unit());
            if let Ok(file) = self.file(segment) {
                let (from, length) = ((HEADER + at + units.start * unit) as u64, (units.len() * unit) as u64);
                let length = std::num::NonZeroU64::new(length);
                let _ = rustix::fs::fadvise(&*file, from, length, rustix::fs::Advice::WillNeed);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (block, units);
    }

    /// Reads `units` of a block, side by side, and compares them with their checksums.
    pub fn read(&self, block: usize, units: std::ops::Range<usize>, crcs: &[u32], bytes: &mut Vec<u8>) -> Result<()> {
        let (segment, range) = self.parts(block..block + 1).next().expect("one block is in one segment");
        let file = self.file(segment)?;
        let unit = self.shape.codec.unit();
        let at = (HEADER + range.start * self.shape.block_bytes() + units.start * unit) as u64;
        let length = units.len() * unit;
        let mut read = || {
            // What is read again and again has its memory.
            if bytes.capacity() < length && !has(&file, at, length)? {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            bytes.resize(length, 0);
            read_at(&file, bytes, at)
        };
        let path = || self.paths(segment)[0].clone();
        read().map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::damaged(&path(), format!("it ends before block {block}")),
            _ => Error::io("read", &path())(error),
        })?;
        for (bytes, crc) in bytes.chunks_exact(unit).zip(crcs) {
            if crc32c::crc32c(bytes) != *crc {
                let what = format!("block {block} is damaged; `landmark session repair` drops it");
                return Err(Error::damaged(&path(), what));
            }
        }
        Ok(())
    }

    /// A segment's file, whose header was compared when it was opened.
    fn file(&self, segment: usize) -> Result<Arc<File>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() <= segment {
            open.resize(segment + 1, None);
        }
        if let Some(file) = &open[segment] {
            return Ok(file.clone());
        }
        let path = &self.paths(segment)[0];
        let file = File::open(path).map_err(Error::io("read", path))?;
        let mut header = [0; HEADER];
        let read = read_at(&file, &mut header, 0);
        if read.is_err() || header != self.shape.header(b"LMBLOCKS", segment) {
            return Err(Error::damaged(path, "its header is not that of this session's blocks"));
        }
        if open.iter().flatten().count() >= OPEN_FILES {
            open.fill(None);
        }
        let file = Arc::new(file);
        open[segment] = Some(file.clone());
        Ok(file)
    }
}

/// Whether a fork has the file too.
#[cfg(unix)]
fn is_shared(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.nlink() > 1)
}

/// Where files are not linked, forks copy them.
#[cfg(not(unix))]
fn is_shared(_: &Path) -> bool {
    false
}

/// Puts a copy of a file in its place.
fn unshare(path: &Path) -> std::io::Result<()> {
    let copy = path.with_extension("tmp");
    std::fs::copy(path, &copy)?;
    std::fs::rename(copy, path)
}

/// Whether a file has so many bytes there: memory for them is not taken before.
fn has(file: &File, at: u64, length: usize) -> std::io::Result<bool> {
    Ok(file.metadata()?.len() >= at.saturating_add(length as u64))
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(not(unix))]
fn write_at(mut file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    use std::io::{Seek, Write};
    file.seek(std::io::SeekFrom::Start(at))?;
    file.write_all(bytes)
}

#[cfg(not(unix))]
fn read_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> std::io::Result<()> {
    // Threads read the same file at once: no place in it that they would share.
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                bytes = &mut bytes[n..];
                at += n as u64;
            }
        }
    }
    Ok(())
}
