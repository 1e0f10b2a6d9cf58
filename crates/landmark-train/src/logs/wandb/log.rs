//! The transaction log of a W&B run, `run-ID.wandb`: Protocol Buffers messages in records of LevelDB's log format.
//!
//! The file begins with `:W&B`, the magic number 0xBEE1 and the version 0 (7 bytes), and consists of blocks of 32 KiB. A
//! message is one or several records, none of which crosses the border of a block:
//!
//! | bytes | field |
//! |---|---|
//! | 4 | CRC-32 of the type and the data (LevelDB itself takes CRC-32C) |
//! | 2 | length of the data |
//! | 1 | type: 1 the whole message, 2 its first part, 3 a middle part, 4 the last one |
//! | length | data |
//!
//! A block's last bytes are zero where no record's head fits. Numbers are little-endian.

use super::record::Record;
use crate::error::{Error, Result};
use prost::Message;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

const BLOCK: usize = 32768;
const HEAD: usize = 7;
const START: [u8; HEAD] = [b':', b'W', b'&', b'B', 0xe1, 0xbe, 0];
const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;

/// A log, open for appending.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    length: usize,
    records: i64,
}

impl Log {
    /// A new log.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let mut file = File::options().append(true).create_new(true).open(path).map_err(Error::io("create", path))?;
        file.write_all(&START).map_err(Error::io("write", path))?;
        Ok(Self { path: path.to_path_buf(), file, length: HEAD, records: 0 })
    }

    /// An existing log, cut off before the first record that is not `kept`, or that a killed process left broken. `kept` sees
    /// every record in order.
    pub(super) fn reopen(path: &Path, mut kept: impl FnMut(&Record) -> bool) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        if !bytes.starts_with(&START) {
            return Err(Error::format(path, "not the log of a W&B run"));
        }
        let (mut length, mut records) = (HEAD, 0);
        while let Some((record, end)) = read(&bytes, length) {
            if !kept(&record) {
                break;
            }
            (length, records) = (end, record.num);
        }
        let file = File::options().append(true).open(path).map_err(Error::io("open", path))?;
        file.set_len(length as u64).map_err(Error::io("cut", path))?;
        Ok(Self { path: path.to_path_buf(), file, length, records })
    }

    /// Appends a record; its number is the log's.
    pub(super) fn append(&mut self, mut record: Record) -> Result<()> {
        self.records += 1;
        record.num = self.records;
        let framed = frame(&record.encode_to_vec(), self.length);
        self.file.write_all(&framed).map_err(Error::io("write", &self.path))?;
        self.length += framed.len();
        Ok(())
    }

    /// All of it reaches the disk.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

/// What a message adds to a log of this length.
fn frame(mut data: &[u8], length: usize) -> Vec<u8> {
    let mut framed = Vec::with_capacity(data.len() + 2 * HEAD);
    let mut is_first = true;
    loop {
        let room = BLOCK - (length + framed.len()) % BLOCK;
        if room < HEAD {
            framed.resize(framed.len() + room, 0);
            continue;
        }
        let (part, rest) = data.split_at(data.len().min(room - HEAD));
        let kind = match (is_first, rest.is_empty()) {
            (true, true) => FULL,
            (true, false) => FIRST,
            (false, false) => MIDDLE,
            (false, true) => LAST,
        };
        framed.extend(crc(kind, part).to_le_bytes());
        framed.extend((part.len() as u16).to_le_bytes());
        framed.push(kind);
        framed.extend(part);
        if rest.is_empty() {
            return framed;
        }
        (data, is_first) = (rest, false);
    }
}

fn crc(kind: u8, data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(data);
    hasher.finalize()
}

/// The record at a place, and where it ends; `None` if there is none, or none that is whole.
fn read(bytes: &[u8], mut at: usize) -> Option<(Record, usize)> {
    let (mut data, mut has_begun) = (Vec::new(), false);
    loop {
        let room = BLOCK - at % BLOCK;
        if room < HEAD {
            at += room;
            continue;
        }
        let head = bytes.get(at..at + HEAD)?;
        let length = u16::from_le_bytes([head[4], head[5]]) as usize;
        let (kind, part) = (head[6], bytes.get(at + HEAD..at + HEAD + length)?);
        let is_next = if has_begun { [MIDDLE, LAST] } else { [FULL, FIRST] }.contains(&kind);
        if !is_next || crc(kind, part).to_le_bytes() != head[..4] {
            return None;
        }
        data.extend_from_slice(part);
        has_begun = true;
        at += HEAD + length;
        if [FULL, LAST].contains(&kind) {
            return Some((Record::decode(&data[..]).ok()?, at));
        }
    }
}

/// Every record of a log, for tests.
#[cfg(test)]
pub(super) fn records(path: &Path) -> Vec<Record> {
    let bytes = fs::read(path).unwrap();
    assert!(bytes.starts_with(&START));
    let mut records = Vec::new();
    let mut at = HEAD;
    while let Some((record, end)) = read(&bytes, at) {
        records.push(record);
        at = end;
    }
    assert_eq!(at, bytes.len(), "the log ends with a whole record");
    records
}

#[cfg(test)]
mod tests {
    use super::super::record::{Item, Kind};
    use super::*;

    /// A record of about so many bytes.
    fn record(bytes: usize) -> Record {
        let item = Item { key: "text".into(), nested_key: vec![], value_json: "x".repeat(bytes) };
        Record::of(Kind::History(super::super::record::History { item: vec![item], step: None }))
    }

    /// Sizes at which records end everywhere around the border of a block, and messages of several blocks.
    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        for last in (32_650..32_780).chain([65_400, 65_500, 100_000]) {
            let path = folder.path().join(format!("{last}.wandb"));
            let mut log = Log::create(&path).unwrap();
            let sizes = [10, last, 0, 500];
            for size in sizes {
                log.append(record(size)).unwrap();
            }
            let read = records(&path);
            let texts = read.iter().map(|record| match &record.kind {
                Some(Kind::History(history)) => history.item[0].value_json.len(),
                _ => panic!("{record:?}"),
            });
            assert_eq!(texts.collect::<Vec<_>>(), sizes, "{last}");
            assert_eq!(read.iter().map(|record| record.num).collect::<Vec<_>>(), [1, 2, 3, 4]);
        }
    }

    #[test]
    fn a_log_that_was_cut_anywhere_goes_on_after_its_last_whole_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.wandb");
        let mut log = Log::create(&path).unwrap();
        for size in [40, 33_000, 20] {
            log.append(record(size)).unwrap();
        }
        let whole = fs::read(&path).unwrap();
        for length in (HEAD..whole.len()).step_by(97).chain([whole.len() - 1]) {
            fs::write(&path, &whole[..length]).unwrap();
            let mut seen = 0;
            let mut log = Log::reopen(&path, |_| {
                seen += 1;
                true
            })
            .unwrap();
            assert!(seen < 3);
            log.append(record(7)).unwrap();
            let numbers: Vec<i64> = records(&path).iter().map(|record| record.num).collect();
            assert_eq!(numbers, (1..=seen + 1).collect::<Vec<_>>(), "{length}");
        }
        fs::write(&path, b"another file").unwrap();
        assert!(Log::reopen(&path, |_| true).is_err_and(|error| error.to_string().contains("not the log")));
    }
}
