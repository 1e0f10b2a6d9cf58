//! Sessions: a text that a model has read, in a folder, to be read on and asked at any time.
//!
//! | file | holds |
//! | --- | --- |
//! | `session.json` | what the session is made for (`head`) |
//! | `blocks-NNNNNN.seg`, `blocks-NNNNNN.idx` | finished blocks and their landmarks (`segments`) |
//! | `tokens` | the text's tokens, 4 bytes each, little endian |
//! | `tail-0`, `tail-1`, `tail-2` | the unfinished block (`tail`); one of them counts |
//! | `journal` | how much of all that counts (`journal`) |
//! | `index` | an index of the landmarks of a long text (`index`) |
//! | `lock` | who has the session |
//!
//! A chunk is appended in this order: blocks, tokens and the unfinished block are written where nothing counts yet, then a record is added to the
//! journal. So a process may end at any moment, and the session is as it was after the last record. That the disk has everything is waited for
//! every few seconds and at the end (`synced` records): if the machine itself stops, what is after such a record is compared with its
//! checksums, and the session goes back to it if something is missing.

mod folder;
mod head;
mod journal;
mod lock;
mod repair;
mod tail;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use candle_core::Tensor;
use landmark_attention::Rope;

use crate::cache::LandmarkCache;
use crate::codec::{BlockType, Codec};
use crate::config::CacheConfig;
use crate::paged::{Paged, Scoring, Tiers};
use crate::pooled::{PoolTier, Pooled};
use crate::segments::{self, BlockRecord, Segments, Shape};
use crate::store::BlockStore;
use crate::{Error, Result};
use folder::{build, copy, remove, replace, sync_folder};
use head::Head;
use journal::Commit;
use lock::Lock;
pub use repair::{Repair, repair};
use tail::Tail;

const TOKENS: &str = "tokens";
const INDEX: &str = "index";
/// How long, and how much, what is written may wait for the disk.
const SYNC_TIME: Duration = Duration::from_secs(5);
const SYNC_BYTES: u64 = 256 << 20;

/// A session that this process has.
#[derive(Debug)]
pub struct Session {
    folder: PathBuf,
    head: Head,
    shape: Shape,
    last: Commit,
    /// The last record that the disk has for sure.
    synced: Commit,
    synced_at: Instant,
    tokens: Vec<u32>,
    notes: Vec<String>,
    _lock: Lock,
}

/// A text that was read: its blocks by first token and number of tokens, and what comes after them.
struct Text {
    blocks: Vec<(usize, u32)>,
    tail: Tail,
}

/// What a session is made with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Settings {
    /// The type that blocks are kept in.
    pub block_type: BlockType,
    /// Bytes that the session may take on disk; `None`: what there is.
    pub disk_limit: Option<u64>,
    /// Blocks of a pair of files; `None`: 256 MiB, at most 4096 blocks.
    pub blocks_per_segment: Option<usize>,
}

/// What a session holds, as its journal says.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// Tokens of the text.
    pub tokens: u64,
    /// Finished blocks.
    pub blocks: u64,
    /// Of these, blocks that were damaged, and that repair dropped.
    pub dropped: Vec<u32>,
    /// The type that blocks are kept in.
    pub block_type: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// Bytes that it may take.
    pub disk_limit: Option<u64>,
    /// When it was last changed, in seconds since 1970.
    pub changed: u64,
    /// The token that a text began with whose end was not reached.
    pub append_from: Option<u64>,
    /// What the session's owner has to remember.
    pub about: serde_json::Value,
}

impl Session {
    /// Makes a session for a model's cache, in a folder that is not there yet. `about` is kept for the caller.
    ///
    /// # Errors
    /// A folder that is there; a setting outside its range; a cache that drops blocks, or of several rows; a disk that cannot be written.
    pub fn create(
        folder: &Path,
        config: &CacheConfig,
        head_dim: usize,
        settings: Settings,
        about: serde_json::Value,
    ) -> Result<()> {
        config.check()?;
        if config.batch != 1 || config.max_blocks.is_some() {
            let got = format!("{} rows, {:?} blocks", config.batch, config.max_blocks);
            return Err(Error::Config { name: "the cache of a session", got, expected: "one row, all blocks".into() });
        }
        let lineage = random();
        let codec = Codec { of: settings.block_type, block: config.mem_freq + 1, head_dim };
        let shape = Shape { layers: config.layers, heads: config.kv_heads, codec, per_segment: 1, lineage };
        let usual = shape.with_usual_segments();
        let shape = Shape { per_segment: settings.blocks_per_segment.unwrap_or(usual.per_segment), ..shape };
        let head = Head::new(&shape, settings.disk_limit, about);
        head.shape(&folder.join(head::NAME))?;
        build(folder, |new| {
            let tail = Tail::encode(&[], &[])?;
            replace(&new.join(tail_name(0)), &tail)?;
            replace(&new.join(TOKENS), &[])?;
            head.write(new)?;
            let (tail_len, tail_crc) = (tail.len() as u64, crc32c::crc32c(&tail));
            let commit = Commit { tail_len, tail_crc, synced: true, time: now(), ..Commit::default() };
            journal::create(new, lineage, &commit)
        })
    }

    /// Opens a session, as it was after the last chunk that was read.
    ///
    /// # Errors
    /// No session; one that another process has; a file that is damaged.
    pub fn open(folder: &Path) -> Result<Self> {
        Head::read(folder)?;
        let lock = Lock::take(folder)?;
        // It may have been replaced meanwhile.
        let head = Head::read(folder)?;
        let shape = head.shape(&folder.join(head::NAME))?;
        let commits = journal::read(folder, shape.lineage)?;
        let last = commits[commits.len() - 1];
        let synced = *commits.iter().rev().find(|commit| commit.synced).unwrap_or(&last);
        let mut session = Self {
            folder: folder.to_path_buf(),
            head,
            shape,
            last,
            synced,
            synced_at: Instant::now(),
            tokens: Vec::new(),
            notes: Vec::new(),
            _lock: lock,
        };
        if let Err(error) = session.check_since(synced.blocks).and_then(|()| session.read_tokens()) {
            if last == synced {
                return Err(error);
            }
            let lost = last.tokens - synced.tokens;
            session.notes.push(format!(
                "the machine stopped before the disk had the last {lost} tokens ({error}); the session is as it was before them"
            ));
            session.last = synced;
            session.read_tail()?;
            session.read_tokens()?;
            journal::cut(folder, &synced)?;
        }
        Ok(session)
    }

    /// What happened to the session that its owner should know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What [`Self::create`] was given.
    pub fn about(&self) -> &serde_json::Value {
        &self.head.about
    }

    /// The text's tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// What it holds.
    pub fn status(&self) -> Status {
        status(&self.head, &self.shape, &self.last)
    }

    /// The token that a text begins with whose end was not reached: [`Self::commit`] was told of it, and nothing since.
    pub fn append_from(&self) -> Option<usize> {
        self.last.append_from.map(|from| from as usize)
    }

    /// The cache with what was read, its blocks in at most `ram` bytes while they are used, and the model's last hidden state, if there is
    /// one.
    ///
    /// # Errors
    /// A cache of another shape than the session was made for; a file that is damaged.
    pub fn cache(
        &self,
        config: CacheConfig,
        rope: Rope,
        ram: usize,
        scoring: Scoring,
    ) -> Result<(LandmarkCache, Option<Vec<f32>>)> {
        let mut paged = self.paged(&config, &rope, ram, scoring)?;
        let text = self.restore(&mut paged, |_| {})?;
        // It is behind after a kill, or what was read on a GPU: that is made up for once, and not at each opening.
        self.keep_index(&mut paged);
        Ok(self.go_on(LandmarkCache::with_store(config, rope, BlockStore::Paged(Box::new(paged))), text))
    }

    /// The same with a pool on the device that computes, in the pool's dtype; `ram` bytes hold encoded blocks that were read from disk. All
    /// landmarks are scored.
    ///
    /// # Errors
    /// Those of [`Self::cache`]; too little memory on the device.
    pub fn cache_with_pool(
        &self,
        config: CacheConfig,
        rope: Rope,
        ram: usize,
        pool: PoolTier,
    ) -> Result<(LandmarkCache, Option<Vec<f32>>)> {
        let mut landmarks = Vec::new();
        let each = |record: &BlockRecord| landmarks.extend_from_slice(&record.landmarks);
        let mut paged = self.paged(&config, &rope, 0, Scoring::Exact)?.without_landmarks();
        let mut text = self.restore(&mut paged, each)?;
        let on_device = |x: &Tensor| x.to_device(&pool.device)?.to_dtype(pool.dtype);
        let on_device = |layer: &Option<(Tensor, Tensor)>| match layer {
            Some((keys, values)) => Ok(Some((on_device(keys)?, on_device(values)?))),
            None => Ok(None),
        };
        text.tail.layers = text.tail.layers.iter().map(on_device).collect::<Result<_>>()?;
        let store = Pooled::new(&config, paged, ram, pool.clone(), &landmarks)?;
        Ok(self.go_on(LandmarkCache::with_store(config, rope, BlockStore::Pooled(Box::new(store))), text))
    }

    /// A store before what is on disk.
    fn paged(&self, config: &CacheConfig, rope: &Rope, ram: usize, scoring: Scoring) -> Result<Paged> {
        config.check()?;
        let tiers = Tiers { of: self.shape.codec.of, ram, scoring };
        Paged::new(config, rope.head_dim(), tiers, Some(Segments::new(&self.folder, self.shape)))
    }

    /// Takes over what is on disk; `each` is told the blocks.
    fn restore(&self, paged: &mut Paged, mut each: impl FnMut(&BlockRecord)) -> Result<Text> {
        let mut blocks = Vec::new();
        let total = self.last.blocks as usize;
        let idx = |number: u64| self.folder.join(&segments::names(number as usize / self.shape.per_segment)[1]);
        let dropped = self.dropped();
        paged.restore(total, &|block| dropped.binary_search(&(block as u32)).is_ok(), |record| {
            let tokens = usize::try_from(record.start)
                .ok()
                .and_then(|start| self.tokens.get(start..start.checked_add(record.tokens as usize)?));
            let Some(tokens) = tokens.filter(|tokens| crc_of(0, tokens) == record.tokens_crc) else {
                let what = format!("block {} is not of this text; `landmark session repair` drops it", record.number);
                return Err(Error::damaged(&idx(record.number), what));
            };
            blocks.push((record.start as usize, tokens.len() as u32));
            each(record);
            Ok(())
        })?;
        // Without it, or with another text's, it is built again.
        let _ = fs::read(self.folder.join(INDEX)).map(|bytes| paged.restore_index(&bytes));
        let tail = self.read_tail()?;
        if tail.tokens() > self.tokens.len() {
            return Err(Error::damaged(
                &self.folder.join(tail_name(self.last.tail)),
                "it has more tokens than the text",
            ));
        }
        Ok(Text { blocks, tail })
    }

    /// A cache over the blocks goes on where the text ended; and the last hidden state.
    fn go_on(&self, mut cache: LandmarkCache, Text { blocks, tail }: Text) -> (LandmarkCache, Option<Vec<f32>>) {
        cache.restore(&blocks, self.last.blocks as usize, self.tokens.len() - tail.tokens(), tail.layers);
        (cache, Some(tail.hidden).filter(|hidden| !hidden.is_empty()))
    }

    /// Makes durable what the cache has read since: the text's next tokens, and the model's last hidden state. `append_from` is the
    /// text's token that an appended text begins with, as long as its end is not reached. `last`: nothing follows soon.
    ///
    /// # Errors
    /// A disk that is full, or that cannot be written: then the session is as it was, and what was read can be committed again.
    pub fn commit(
        &mut self,
        cache: &mut LandmarkCache,
        tokens: &[u32],
        hidden: &[f32],
        append_from: Option<usize>,
        last: bool,
    ) -> Result<()> {
        let (store, unfinished) = cache.parts();
        let Some(paged) = store.paged() else {
            let reason = "the cache is not this session's".to_string();
            return Err(Error::Session { path: self.folder.clone(), reason });
        };
        let unsynced = paged.disk_bytes() - self.shape.disk_bytes(self.synced.blocks as usize);
        let sync = last || unsynced >= SYNC_BYTES || self.synced_at.elapsed() >= SYNC_TIME;
        let tail = Tail::encode(hidden, unfinished)?;
        let used = [self.last.tail, self.synced.tail];
        let slot = (0..3).find(|slot| !used.contains(slot)).unwrap_or(0);
        let commit = Commit {
            number: self.last.number + 1,
            blocks: self.last.blocks + paged.pending().len() as u64,
            tokens: self.last.tokens + tokens.len() as u64,
            tokens_crc: crc_of(self.last.tokens_crc, tokens),
            tail: slot,
            tail_len: tail.len() as u64,
            tail_crc: crc32c::crc32c(&tail),
            synced: sync,
            append_from: append_from.map(|from| from as u64),
            time: now(),
        };
        let before = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        if let Err(error) = self.write(paged, &commit, tokens, &tail) {
            self.tokens.truncate(before);
            paged.unwrite();
            let _ = fs::remove_file(self.folder.join(tail_name(slot)));
            if let Ok(file) = OpenOptions::new().write(true).open(self.folder.join(TOKENS)) {
                let _ = file.set_len(4 * before as u64);
            }
            let _ = journal::cut(&self.folder, &self.last);
            return Err(error);
        }
        paged.written();
        self.last = commit;
        if sync {
            (self.synced, self.synced_at) = (commit, Instant::now());
            for other in (0..3).filter(|&other| other != slot) {
                let _ = fs::remove_file(self.folder.join(tail_name(other)));
            }
        }
        if last {
            self.keep_index(paged);
        }
        Ok(())
    }

    /// Writes the index, if its file is behind. The text is safe without: what the index costs to build again is time.
    fn keep_index(&self, paged: &mut Paged) {
        let _ = paged.keep_index(|bytes| replace(&self.folder.join(INDEX), bytes));
    }

    fn write(&self, paged: &mut Paged, commit: &Commit, tokens: &[u32], tail: &[u8]) -> Result<()> {
        if let Some(limit) = self.head.disk_limit {
            let bytes = paged.disk_bytes() + 4 * commit.tokens + commit.tail_len;
            if bytes > limit {
                let reason = format!("it may take {limit} bytes of the disk (--disk), and would take {bytes}");
                return Err(Error::Full { path: self.folder.clone(), reason });
            }
        }
        paged.write(|record| crc_of(0, &self.tokens[record.start as usize..][..record.tokens as usize]))?;
        let path = self.folder.join(TOKENS);
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let write_tokens = || {
            let mut file = OpenOptions::new().write(true).open(&path)?;
            file.seek(SeekFrom::Start(4 * self.last.tokens))?;
            file.write_all(&bytes)?;
            if commit.synced { file.sync_data() } else { Ok(()) }
        };
        write_tokens().map_err(Error::io("write", &path))?;
        let path = self.folder.join(tail_name(commit.tail));
        let write_tail = || {
            let mut file = File::create(&path)?;
            file.write_all(tail)?;
            if commit.synced { file.sync_data() } else { Ok(()) }
        };
        write_tail().map_err(Error::io("write", &path))?;
        if commit.synced {
            paged.sync(self.synced.blocks as usize)?;
            sync_folder(&self.folder)?;
        }
        journal::write(&self.folder, commit, commit.synced)
    }

    /// Makes another session that goes on from here. Files that are full are shared: neither changes them.
    ///
    /// # Errors
    /// A folder that is there; a disk that cannot be written.
    pub fn fork(&mut self, to: &Path) -> Result<()> {
        let total = self.last.blocks as usize;
        let per = self.shape.per_segment;
        build(to, |new| {
            for segment in 0..total.div_ceil(per) {
                let names = segments::names(segment);
                let kept = (total - segment * per).min(per);
                for (name, length) in names.iter().zip(self.shape.file_lengths(kept)) {
                    let (from, to) = (self.folder.join(name), new.join(name));
                    if kept < per || fs::hard_link(&from, &to).is_err() {
                        copy(&from, &to, length)?;
                    }
                }
            }
            copy(&self.folder.join(TOKENS), &new.join(TOKENS), 4 * self.last.tokens)?;
            copy(&self.folder.join(tail_name(self.last.tail)), &new.join(tail_name(0)), self.last.tail_len)?;
            if let Ok(bytes) = fs::read(self.folder.join(INDEX)) {
                replace(&new.join(INDEX), &bytes)?;
            }
            self.head.write(new)?;
            let commit = Commit { number: 0, tail: 0, synced: true, time: now(), ..self.last };
            journal::create(new, self.shape.lineage, &commit)
        })
    }

    /// The text's tokens of each finished block; blocks that were dropped are in the one after.
    ///
    /// # Errors
    /// A file that is damaged.
    pub fn blocks(&self) -> Result<Vec<std::ops::Range<usize>>> {
        let segments = Segments::new(&self.folder, self.shape);
        let dropped = self.dropped();
        let is_dropped = |block: usize| dropped.binary_search(&(block as u32)).is_ok();
        segments.check_lengths(self.last.blocks as usize, &is_dropped)?;
        let (mut blocks, mut at) = (Vec::new(), 0);
        for records in segments.records(self.last.blocks as usize, &is_dropped) {
            for record in records?.into_iter().flatten() {
                let end = record.start.saturating_add(u64::from(record.tokens)) as usize;
                if end <= at || end > self.tokens.len() {
                    return Err(Error::damaged(&self.folder, format!("block {} is not of this text", record.number)));
                }
                blocks.push(std::mem::replace(&mut at, end)..end);
            }
        }
        Ok(blocks)
    }

    /// Reads everything and compares it with its checksums: what is damaged, in words.
    pub fn verify(&self) -> Vec<String> {
        let mut damage = repair::examine(&self.folder, &self.head, &self.shape, &self.last).damage;
        let is_whole = |bytes: &[u8]| {
            let parts = bytes.split_last_chunk::<4>();
            parts.is_some_and(|(body, crc)| crc32c::crc32c(body) == u32::from_le_bytes(*crc))
        };
        if fs::read(self.folder.join(INDEX)).is_ok_and(|bytes| !is_whole(&bytes)) {
            damage.push("the index is damaged: it is built again when the session is read".into());
        }
        damage
    }

    fn dropped(&self) -> Vec<u32> {
        let mut dropped = self.head.dropped.clone();
        dropped.sort_unstable();
        dropped
    }

    /// Blocks from this one on, if the disk may not have them, and the unfinished block.
    fn check_since(&self, block: u64) -> Result<()> {
        let segments = Segments::new(&self.folder, self.shape);
        let mut bytes = Vec::new();
        for block in block as usize..self.last.blocks as usize {
            let what = || Error::damaged(&self.folder, format!("block {block} is damaged"));
            let record = segments.record(block).ok_or_else(what)?;
            segments.read(block, 0..self.shape.units(), &record.crcs, &mut bytes)?;
        }
        self.read_tail()?;
        Ok(())
    }

    fn read_tokens(&mut self) -> Result<()> {
        self.tokens = read_tokens(&self.folder, self.last.tokens)?;
        if crc_of(0, &self.tokens) != self.last.tokens_crc {
            let what = "the text is damaged; `landmark session repair` drops the blocks in question";
            return Err(Error::damaged(&self.folder.join(TOKENS), what));
        }
        Ok(())
    }

    fn read_tail(&self) -> Result<Tail> {
        let path = self.folder.join(tail_name(self.last.tail));
        read_tail(&path, &self.shape, &self.last).ok_or_else(|| {
            let what = "the unfinished block is damaged; `landmark session repair` drops it";
            Error::damaged(&path, what)
        })
    }
}

/// Removes a session, damaged or not. If there are files in its folder that are not a session's, they and the folder stay.
///
/// # Errors
/// No session; one that another process has; a folder that cannot be changed.
pub fn delete(folder: &Path) -> Result<()> {
    if !folder.join(head::NAME).exists() {
        let reason = format!("no session: there is no {} in it", head::NAME);
        return Err(Error::Session { path: folder.to_path_buf(), reason });
    }
    let _lock = Lock::take(folder)?;
    remove(folder)
}

/// What a session holds, also while another process has it.
///
/// # Errors
/// No session, or one that is damaged.
pub fn peek(folder: &Path) -> Result<Status> {
    let head = Head::read(folder)?;
    let shape = head.shape(&folder.join(head::NAME))?;
    Ok(status(&head, &shape, &journal::peek(folder)?))
}

/// Some of a session's tokens, also while another process has it. They are read as they are, without the rest of the text that their checksum is of.
///
/// # Errors
/// No session, one that is damaged, or tokens that it does not have.
pub fn peek_tokens(folder: &Path, tokens: Range<u64>) -> Result<Vec<u32>> {
    let count = peek(folder)?.tokens;
    if tokens.start > tokens.end || tokens.end > count {
        let reason = format!("it has {count} tokens, and not those from {} to {}", tokens.start, tokens.end);
        return Err(Error::Session { path: folder.to_path_buf(), reason });
    }
    let path = folder.join(TOKENS);
    let mut file = File::open(&path).map_err(Error::io("read", &path))?;
    let length = file.metadata().map_err(Error::io("read", &path))?.len();
    if tokens.end > length / 4 {
        return Err(Error::damaged(&path, format!("it is shorter than its {count} tokens")));
    }
    let mut read = || {
        file.seek(SeekFrom::Start(4 * tokens.start))?;
        let mut bytes = vec![0u8; 4 * (tokens.end - tokens.start) as usize];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(Error::io("read", &path))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
}

fn status(head: &Head, shape: &Shape, commit: &Commit) -> Status {
    Status {
        tokens: commit.tokens,
        blocks: commit.blocks,
        dropped: head.dropped.clone(),
        block_type: head.block_type.clone(),
        bytes: shape
            .disk_bytes(commit.blocks as usize)
            .saturating_add(commit.tokens.saturating_mul(4))
            .saturating_add(commit.tail_len),
        disk_limit: head.disk_limit,
        changed: commit.time,
        append_from: commit.append_from,
        about: head.about.clone(),
    }
}

fn read_tail(path: &Path, shape: &Shape, commit: &Commit) -> Option<Tail> {
    // Nobody's length is believed before the file has it.
    let is_there = fs::metadata(path).is_ok_and(|metadata| metadata.len() == commit.tail_len);
    let bytes = is_there.then(|| fs::read(path).ok())??;
    (crc32c::crc32c(&bytes) == commit.tail_crc).then(|| Tail::decode(&bytes, shape))?
}

/// So many tokens of the text.
fn read_tokens(folder: &Path, tokens: u64) -> Result<Vec<u32>> {
    let path = folder.join(TOKENS);
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let (words, _) = bytes.as_chunks::<4>();
    let words = usize::try_from(tokens).ok().and_then(|tokens| words.get(..tokens));
    let words = words.ok_or_else(|| Error::damaged(&path, format!("it is shorter than its {tokens} tokens")))?;
    Ok(words.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
}

fn tail_name(slot: u32) -> String {
    format!("tail-{slot}")
}

/// The checksum of tokens before and these.
fn crc_of(before: u32, tokens: &[u32]) -> u32 {
    tokens.iter().fold(before, |crc, token| crc32c::crc32c_append(crc, &token.to_le_bytes()))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A number that another session does not have.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u64(now());
    hasher.finish()
}
