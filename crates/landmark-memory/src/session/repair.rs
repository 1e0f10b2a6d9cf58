//! What is damaged in a session, and the session without it.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::path::Path;

use rayon::prelude::*;

use super::folder::{replace, sync_folder};
use super::head::{self, Head};
use super::journal::{self, Commit};
use super::lock::Lock;
use super::tail::Tail;
use super::{INDEX, TOKENS, crc_of, now, read_tail, tail_name};
use crate::segments::{Segments, Shape};
use crate::{Error, Result};

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// What was damaged and what became of it, in words; nothing if nothing was.
    pub damage: Vec<String>,
    /// Blocks that were dropped, with the tokens that they held.
    pub dropped: Vec<usize>,
}

/// What is found in a session.
pub struct Finding {
    pub damage: Vec<String>,
    /// Blocks that are damaged, and were not dropped before.
    pub blocks: BTreeSet<usize>,
    /// Whether the unfinished block is damaged.
    tail: bool,
    /// All tokens, as far as they are there.
    tokens: Vec<u32>,
    /// Where the last whole block ends, and its number plus 1.
    end: (u64, u64),
}

/// Reads what a record of the journal promises.
pub fn examine(folder: &Path, head: &Head, shape: &Shape, commit: &Commit) -> Finding {
    let segments = Segments::new(folder, *shape);
    let mut damage = Vec::new();
    let bytes = std::fs::read(folder.join(TOKENS)).unwrap_or_default();
    let (words, _) = bytes.as_chunks::<4>();
    let tokens: Vec<u32> = words.iter().take(commit.tokens as usize).map(|&word| u32::from_le_bytes(word)).collect();
    let is_text_whole = tokens.len() as u64 == commit.tokens && crc_of(0, &tokens) == commit.tokens_crc;
    let check = |block: usize, bytes: &mut Vec<u8>| -> std::result::Result<u64, String> {
        let record = segments.record(block).ok_or("its landmarks are damaged")?;
        let read = segments.read(block, 0..shape.units(), &record.crcs, bytes);
        read.map_err(|_| "its keys and values are damaged")?;
        let end = record.start.checked_add(u64::from(record.tokens)).filter(|&end| end <= tokens.len() as u64);
        let text = end.map(|end| &tokens[record.start as usize..end as usize]);
        let is_text = text.is_some_and(|text| crc_of(0, text) == record.tokens_crc);
        end.filter(|_| is_text).ok_or_else(|| "its text is damaged".to_string())
    };
    let present = segments.present(commit.blocks as usize);
    if present < commit.blocks as usize {
        damage.push(format!("blocks {present} to {} are missing", commit.blocks - 1));
    }
    let dropped: BTreeSet<usize> = head.dropped.iter().map(|&block| block as usize).collect();
    let examined: Vec<(usize, std::result::Result<u64, String>)> = (0..present)
        .into_par_iter()
        .filter(|block| !dropped.contains(block))
        .map_init(Vec::new, |bytes, block| (block, check(block, bytes)))
        .collect();
    let mut blocks = BTreeSet::new();
    let mut end = (0, 0);
    for (block, found) in examined {
        match found {
            Ok(at) => end = (at, block as u64 + 1),
            Err(what) => {
                damage.push(format!("block {block}: {what}"));
                blocks.insert(block);
            }
        }
    }
    let tail_tokens = read_tail(&folder.join(tail_name(commit.tail)), shape, commit).map(|tail| tail.tokens() as u64);
    // All blocks' texts are whole, so what is damaged is after them.
    let is_rest_damaged = !is_text_whole && blocks.is_empty() && dropped.is_empty();
    let tail = tail_tokens.is_none()
        || is_rest_damaged
        || tokens.len() as u64 != commit.tokens
        || present < commit.blocks as usize;
    if tail {
        damage.push("the unfinished block is damaged".into());
    } else if let Some(tail) = tail_tokens {
        end = (commit.tokens - tail.min(commit.tokens), commit.blocks);
        if !is_text_whole && damage.is_empty() {
            damage.push("text of a dropped block, or of the unfinished one, is damaged".into());
        }
    }
    Finding { damage, blocks, tail, tokens, end }
}

/// Drops what is damaged: blocks, the unfinished block, what the journal says after a damaged record.
///
/// # Errors
/// A session that another process has; a `session.json` or a journal of which nothing is left; a disk that cannot be written.
pub fn repair(folder: &Path) -> Result<Repair> {
    let mut head = Head::read(folder)?;
    let shape = head.shape(&folder.join(head::NAME))?;
    let _lock = Lock::take(folder)?;
    let (read, whole) = (journal::read(folder, shape.lineage), journal::whole_records(folder));
    let Some(commit) = whole.last().copied() else {
        return Err(Error::damaged(&folder.join(journal::NAME), "nothing of it is left to go back to"));
    };
    let mut damage = Vec::new();
    if let Err(error) = &read {
        let last = commit.tokens;
        damage.push(format!("the journal ({error}): back to the last record before, of a text of {last} tokens"));
    }
    let finding = examine(folder, &head, &shape, &commit);
    if finding.damage.is_empty() && damage.is_empty() {
        return Ok(Repair { damage, dropped: vec![] });
    }
    damage.extend(finding.damage);
    let (end, blocks) = finding.end;
    let dropped: Vec<usize> = finding.blocks.into_iter().filter(|&block| (block as u64) < blocks).collect();
    head.dropped.extend(dropped.iter().map(|&block| block as u32));
    head.dropped.retain(|&block| u64::from(block) < blocks);
    head.dropped.sort_unstable();
    let mut repaired = Commit { number: 0, synced: true, time: now(), ..commit };
    let mut tokens = finding.tokens;
    if finding.tail {
        // A text that was being appended does not go on where it stopped.
        (repaired.tokens, repaired.blocks, repaired.append_from) = (end, blocks, None);
        tokens.truncate(end as usize);
        let tail = Tail::encode(&[], &[])?;
        (repaired.tail, repaired.tail_len, repaired.tail_crc) = (0, tail.len() as u64, crc32c::crc32c(&tail));
        replace(&folder.join(tail_name(0)), &tail)?;
        let lost = commit.tokens - end;
        damage.push(format!("the text's last {lost} tokens are dropped: it ends with token {end}"));
    }
    repaired.tokens_crc = crc_of(0, &tokens);
    // Without the file there is a text of no tokens, which has one.
    let path = folder.join(TOKENS);
    OpenOptions::new().append(true).create(true).open(&path).map_err(Error::io("make", &path))?;
    // It counts blocks that may not be there any more.
    let _ = std::fs::remove_file(folder.join(INDEX));
    head.write(folder)?;
    journal::create(folder, shape.lineage, &repaired)?;
    sync_folder(folder)?;
    Ok(Repair { damage, dropped })
}
