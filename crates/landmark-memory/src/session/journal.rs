//! `journal`: what a session holds, one record for each chunk that was read. The last record counts.
//!
//! The file begins with 32 bytes: the ASCII bytes `LMJOURNL`, the version (4 bytes, 1), 4 zero bytes, the lineage (8 bytes), 4 zero bytes, and the
//! CRC-32C of these 28. Then come records of 96 bytes, little endian:
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 0 | 8 | the record's number, from 0 |
//! | 8 | 8 | finished blocks |
//! | 16 | 8 | tokens of the text |
//! | 24 | 4 | CRC-32C of the tokens, 4 bytes each |
//! | 28 | 4 | which of the three files `tail-0` to `tail-2` holds the unfinished block |
//! | 32 | 8 | its length |
//! | 40 | 4 | CRC-32C of it |
//! | 44 | 4 | 1: all of this was on the disk for sure when the record was written; else 0 |
//! | 48 | 8 | if a text is being appended, the token that it begins with, plus 1; else 0 |
//! | 56 | 8 | seconds since 1970 |
//! | 64 | 28 | zero |
//! | 92 | 4 | CRC-32C of the record up to here |
//!
//! A last record that is shorter was being written when the machine stopped, and does not count.

use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::{Error, Result};

pub const NAME: &str = "journal";
const HEADER: usize = 32;
const RECORD: usize = 96;

/// A record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Commit {
    pub number: u64,
    pub blocks: u64,
    pub tokens: u64,
    pub tokens_crc: u32,
    pub tail: u32,
    pub tail_len: u64,
    pub tail_crc: u32,
    pub synced: bool,
    pub append_from: Option<u64>,
    pub time: u64,
}

impl Commit {
    fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        let mut put = |at: usize, x: &[u8]| bytes[at..at + x.len()].copy_from_slice(x);
        put(0, &self.number.to_le_bytes());
        put(8, &self.blocks.to_le_bytes());
        put(16, &self.tokens.to_le_bytes());
        put(24, &self.tokens_crc.to_le_bytes());
        put(28, &self.tail.to_le_bytes());
        put(32, &self.tail_len.to_le_bytes());
        put(40, &self.tail_crc.to_le_bytes());
        put(44, &u32::from(self.synced).to_le_bytes());
        put(48, &self.append_from.map_or(0, |from| from + 1).to_le_bytes());
        put(56, &self.time.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..RECORD - 4]);
        bytes[RECORD - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; RECORD]) -> Option<Self> {
        let short = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let commit = Self {
            number: long(0),
            blocks: long(8),
            tokens: long(16),
            tokens_crc: short(24),
            tail: short(28),
            tail_len: long(32),
            tail_crc: short(40),
            synced: short(44) == 1,
            append_from: long(48).checked_sub(1),
            time: long(56),
        };
        // A block has a token at least; blocks are counted in 32 bits.
        let is_possible = commit.blocks <= commit.tokens && commit.blocks < u64::from(u32::MAX) && commit.tail < 3;
        (crc32c::crc32c(&bytes[..RECORD - 4]) == short(RECORD - 4) && is_possible).then_some(commit)
    }
}

fn header(lineage: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(b"LMJOURNL");
    bytes[8] = 1;
    bytes[16..24].copy_from_slice(&lineage.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..HEADER - 4]);
    bytes[HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Writes a journal of one record, in place of another.
pub fn create(folder: &Path, lineage: u64, commit: &Commit) -> Result<()> {
    let path = folder.join(NAME);
    super::folder::replace(&path, &[&header(lineage)[..], &commit.encode()].concat())
}

/// All records.
pub fn read(folder: &Path, lineage: u64) -> Result<Vec<Commit>> {
    let path = folder.join(NAME);
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    if bytes.get(..HEADER) != Some(&header(lineage)[..]) {
        return Err(Error::damaged(&path, "its header is not that of this session's journal"));
    }
    let (records, _) = bytes[HEADER..].as_chunks::<RECORD>();
    let decode = |(i, bytes): (usize, &[u8; RECORD])| {
        let commit = Commit::decode(bytes).filter(|commit| commit.number == i as u64);
        let what = || format!("record {i} is damaged; `landmark session repair` goes back to the one before");
        commit.ok_or_else(|| Error::damaged(&path, what()))
    };
    let commits: Vec<Commit> = records.iter().enumerate().map(decode).collect::<Result<_>>()?;
    if commits.is_empty() {
        return Err(Error::damaged(&path, "it has no record"));
    }
    Ok(commits)
}

/// The records before the first that is damaged, whatever the header.
pub fn whole_records(folder: &Path) -> Vec<Commit> {
    let bytes = std::fs::read(folder.join(NAME)).unwrap_or_default();
    let (records, _) = bytes.get(HEADER..).unwrap_or_default().as_chunks::<RECORD>();
    let decode = |(i, bytes): (usize, &[u8; RECORD])| Commit::decode(bytes).filter(|commit| commit.number == i as u64);
    records.iter().enumerate().map_while(decode).collect()
}

/// Writes a record where its number says, and takes away what is after it.
pub fn write(folder: &Path, commit: &Commit, sync: bool) -> Result<()> {
    let path = folder.join(NAME);
    let write = || {
        let mut file = OpenOptions::new().write(true).open(&path)?;
        let at = HEADER as u64 + commit.number * RECORD as u64;
        file.seek(SeekFrom::Start(at))?;
        file.write_all(&commit.encode())?;
        if file.metadata()?.len() > at + RECORD as u64 {
            file.set_len(at + RECORD as u64)?;
        }
        if sync { file.sync_data() } else { Ok(()) }
    };
    write().map_err(Error::io("write", &path))
}

/// Takes away the records after `commit`.
pub fn cut(folder: &Path, commit: &Commit) -> Result<()> {
    let path = folder.join(NAME);
    let cut = || {
        let file = OpenOptions::new().write(true).open(&path)?;
        file.set_len(HEADER as u64 + (commit.number + 1) * RECORD as u64)?;
        file.sync_data()
    };
    cut().map_err(Error::io("write", &path))
}

/// The last record, of a session that somebody else may be writing; nothing else is looked at.
pub fn peek(folder: &Path) -> Result<Commit> {
    let path = folder.join(NAME);
    let read = || {
        let mut file = std::fs::File::open(&path)?;
        let records = file.metadata()?.len().saturating_sub(HEADER as u64) / RECORD as u64;
        let mut bytes = [0; RECORD];
        file.seek(SeekFrom::Start(HEADER as u64 + records.saturating_sub(1) * RECORD as u64))?;
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(Error::io("read", &path))?;
    Commit::decode(&bytes).ok_or_else(|| Error::damaged(&path, "its last record is damaged"))
}
