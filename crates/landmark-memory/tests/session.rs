//! Sessions: whatever happens to their process, their disk and their files, what is read is what a cache in memory reads, or an error.

#![cfg(unix)]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use landmark_attention::{Attend, Pairs, Rope};
use landmark_memory::session::{self, Session, Settings};
use landmark_memory::{BlockType, CacheConfig, LandmarkCache, PoolTier, Scoring, Selection, Tiers};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const WIDTH: usize = HEADS * HEAD_DIM;
const LANDMARK: u32 = 99;

fn config() -> CacheConfig {
    CacheConfig {
        layers: LAYERS,
        batch: 1,
        kv_heads: KV_HEADS,
        mem_freq: 4,
        landmark_id: LANDMARK,
        top_k: 2,
        selection: Selection::PerTokenAndHead,
        max_blocks: None,
        window: 64,
        context_miss: None,
    }
}

fn rope() -> Rope {
    Rope::new(HEAD_DIM, 10_000., Pairs::Halves)
}

/// A model without weights worth the name, whose rows depend on their own token and on what attention gives alone.
fn model(ids: &Tensor, attention: &mut dyn Attend) -> candle_core::Result<Tensor> {
    let ids = ids.flatten_all()?.to_vec1::<u32>()?;
    let number = |id: u32, channel: usize| ((id as usize * 131 + channel * 37) % 97) as f32 / 20. - 2.4;
    let embedding = ids.iter().flat_map(|&id| (0..WIDTH).map(move |channel| number(id, channel)));
    let mut x = Tensor::from_iter(embedding, &Device::Cpu)?.reshape((1, ids.len(), WIDTH))?;
    for layer in 0..LAYERS {
        let heads =
            |x: &Tensor, n: usize| x.narrow(2, 0, n * HEAD_DIM)?.reshape((1, ids.len(), n, HEAD_DIM))?.transpose(1, 2);
        let turn = |factor: f64| (&x * (factor + layer as f64))?.sin();
        let (q, k, v) = (heads(&turn(1.7)?, HEADS)?, heads(&turn(2.3)?, KV_HEADS)?, heads(&x, KV_HEADS)?);
        let out = attention.attend(layer, &(q * 3.)?, &k, &v)?;
        x = (x + out.transpose(1, 2)?.reshape((1, ids.len(), WIDTH))?)?;
    }
    Ok(x)
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn read(cache: &mut LandmarkCache, tokens: &[u32]) -> Tensor {
    let ids = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    cache.forward(&ids, model).unwrap()
}

/// Tokens of a text.
fn text(from: usize, n: usize) -> Vec<u32> {
    (from..from + n).map(|i| ((i * i * 7 + i / 5) % 90) as u32).collect()
}

fn create(folder: &Path, settings: Settings) {
    Session::create(folder, &config(), HEAD_DIM, settings, serde_json::json!({"owner": "tests"})).unwrap();
}

const SMALL: Settings = Settings { block_type: BlockType::F32, disk_limit: None, blocks_per_segment: Some(3) };

/// A session on disk and its cache, and the chunks that it should hold.
struct Twin {
    session: Session,
    cache: LandmarkCache,
    chunks: Vec<Vec<u32>>,
}

impl Twin {
    fn open(folder: &Path, ram: usize, chunks: Vec<Vec<u32>>) -> Self {
        let session = Session::open(folder).unwrap();
        assert!(session.notes().is_empty(), "{:?}", session.notes());
        let (cache, _) = session.cache(config(), rope(), ram, Scoring::Exact).unwrap();
        assert_eq!(session.tokens(), chunks.concat());
        Self { session, cache, chunks }
    }

    /// A cache in memory that has read the same chunks.
    fn in_memory(&self) -> LandmarkCache {
        let mut cache = LandmarkCache::new(config(), rope(), DType::F32, &Device::Cpu).unwrap();
        for chunk in &self.chunks {
            read(&mut cache, chunk);
        }
        cache
    }

    fn append(&mut self, chunk: Vec<u32>, last: bool) -> Tensor {
        let out = read(&mut self.cache, &chunk);
        let hidden = out.narrow(1, chunk.len() - 1, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        self.session.commit(&mut self.cache, &chunk, &hidden, None, last).unwrap();
        self.chunks.push(chunk);
        out
    }
}

/// With a pool on the device that computes: what a cache in memory gives, whatever is in RAM and in the pool, and however often the session was opened.
#[test]
fn a_session_with_a_pool_equals_a_cache_in_memory() {
    // Of a unit, in the pool and in RAM.
    const UNIT: usize = 2 * 5 * HEAD_DIM * 4;
    let cases = [(0, 10_000, 30), (9 * UNIT, 10_000, 30), (1 << 20, 24, 3), (0, 24, 3), (20 * UNIT, 0, 30)];
    for (ram, frames, longest) in cases {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("session");
        create(&folder, SMALL);
        let mut memory = LandmarkCache::new(config(), rope(), DType::F32, &Device::Cpu).unwrap();
        for opened in 0..5 {
            let mut session = Session::open(&folder).unwrap();
            let pool = PoolTier { device: Device::Cpu, dtype: DType::F32, bytes: frames * UNIT };
            let (mut cache, _) = session.cache_with_pool(config(), rope(), ram, pool).unwrap();
            for i in 0..12 {
                let chunk = text(100 * opened + i, 1 + (opened * 7 + i * 5) % longest);
                let (got, expected) = (read(&mut cache, &chunk), read(&mut memory, &chunk));
                let last = got.narrow(1, chunk.len() - 1, 1).unwrap().flatten_all().unwrap();
                session.commit(&mut cache, &chunk, &last.to_vec1().unwrap(), None, i % 2 == 1).unwrap();
                let what = format!("chunk {i} of opening {opened}, {ram} bytes of RAM, {frames} frames");
                if frames > 0 {
                    assert!(bits(&got) == bits(&expected), "{what}");
                } else {
                    // Token by token: on the CPU that is another order of sums.
                    let off = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                    assert!(off < 1e-3, "{what}: off by {off}");
                }
            }
            let (sent, found) = cache.loads();
            assert!(found > 0 && (frames < 10_000 || sent < found), "{sent} sent, {found} found");
        }
        let session = Session::open(&folder).unwrap();
        assert_eq!(session.verify(), Vec::<String>::new());
        // On the CPU it is the same session.
        let (mut cache, _) = session.cache(config(), rope(), 0, Scoring::Exact).unwrap();
        let chunk = text(1, 9);
        let (got, expected) = (read(&mut cache, &chunk), read(&mut memory, &chunk));
        assert!(frames == 0 || bits(&got) == bits(&expected));
    }
}

#[derive(Debug, Clone)]
enum Operation {
    /// Read so many tokens and commit them; wait for the disk or not.
    Append(usize, bool),
    /// Read so many tokens and forget them, as a question.
    Ask(usize),
    /// Let go of the session, and open it with so much RAM.
    Reopen(usize),
    /// Fork it; go on with the fork, or not.
    Fork(bool),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let one = prop_oneof![
        6 => (1usize..40, any::<bool>()).prop_map(|(n, last)| Operation::Append(n, last)),
        2 => (1usize..20).prop_map(Operation::Ask),
        2 => prop_oneof![Just(0usize), 0usize..5000, Just(1 << 30)].prop_map(Operation::Reopen),
        1 => any::<bool>().prop_map(Operation::Fork),
    ];
    proptest::collection::vec(one, 1..24)
}

fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

/// Any operations in any order: bit for bit what a cache in memory gives, and what a list of chunks holds.
#[test]
fn a_session_equals_a_list_of_chunks_and_a_cache_in_memory() {
    runner(40)
        .run(&operations(), |operations| {
            let parent = tempfile::tempdir().unwrap();
            let mut at = parent.path().join("0");
            create(&at, SMALL);
            let mut twin = Twin::open(&at, 0, vec![]);
            let mut memory = twin.in_memory();
            // Sessions that were left behind, with what they hold.
            let mut others: Vec<(PathBuf, Vec<Vec<u32>>)> = vec![];
            for (i, operation) in operations.into_iter().enumerate() {
                match operation {
                    Operation::Append(n, last) => {
                        let chunk = text(31 * i, n);
                        let expected = read(&mut memory, &chunk);
                        prop_assert_eq!(bits(&twin.append(chunk, last)), bits(&expected));
                    }
                    Operation::Ask(n) => {
                        let chunk = text(17 * i + 5, n);
                        let expected = bits(&read(&mut twin.in_memory(), &chunk));
                        prop_assert_eq!(bits(&read(&mut twin.cache, &chunk)), expected);
                        let chunks = std::mem::take(&mut twin.chunks);
                        drop(twin);
                        twin = Twin::open(&at, 3000, chunks);
                    }
                    Operation::Reopen(ram) => {
                        let chunks = std::mem::take(&mut twin.chunks);
                        drop(twin);
                        twin = Twin::open(&at, ram, chunks);
                    }
                    Operation::Fork(go_on) => {
                        let new = parent.path().join(format!("{}", i + 1));
                        twin.session.fork(&new).unwrap();
                        let chunks = twin.chunks.clone();
                        if go_on {
                            others.push((at, chunks.clone()));
                            drop(twin);
                            twin = Twin::open(&new, 0, chunks);
                            at = new;
                        } else {
                            others.push((new, chunks));
                        }
                    }
                }
            }
            prop_assert_eq!(twin.session.verify(), Vec::<String>::new());
            drop(twin);
            // What happened to one of a family has not changed the others.
            for (folder, chunks) in others {
                let mut other = Twin::open(&folder, 0, chunks);
                prop_assert_eq!(other.session.verify(), Vec::<String>::new());
                let chunk = text(1, 9);
                let expected = read(&mut other.in_memory(), &chunk);
                prop_assert_eq!(bits(&other.append(chunk, true)), bits(&expected));
            }
            Ok(())
        })
        .unwrap();
}

/// A session of some segments with an unfinished block.
fn example(folder: &Path, settings: Settings) -> Vec<Vec<u32>> {
    create(folder, settings);
    let mut twin = Twin::open(folder, 0, vec![]);
    for i in 0..6 {
        twin.append(text(50 * i, 11), i == 5);
    }
    twin.chunks
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| !path.ends_with("lock"));
    files.sort();
    files
}

/// What is wrong with a session: an error, or what a check finds.
fn fault(folder: &Path) -> Option<String> {
    let session = match Session::open(folder) {
        Ok(session) => session,
        Err(error) => return Some(error.to_string()),
    };
    let cache = session.cache(config(), rope(), 0, Scoring::Exact);
    let notes = session.notes().iter().chain(&session.verify()).cloned().collect::<Vec<_>>().join("; ");
    cache.err().map(|error| error.to_string()).or(Some(notes).filter(|notes| !notes.is_empty()))
}

#[test]
fn every_flipped_bit_is_found() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("s");
    example(&folder, SMALL);
    assert_eq!(fault(&folder), None);
    let mut flips = 0;
    for path in files(&folder) {
        let whole = fs::read(&path).unwrap();
        assert!(!whole.is_empty(), "{}", path.display());
        // All bytes of the small files, and every so many of the large ones, each with another bit.
        let step = (whole.len() / 300).max(1) | 1;
        for (i, at) in (0..whole.len()).step_by(step).enumerate() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (i % 8);
            fs::write(&path, flipped).unwrap();
            assert!(fault(&folder).is_some(), "bit {} of byte {at} of {}", i % 8, path.display());
            flips += 1;
        }
        fs::write(&path, whole).unwrap();
    }
    assert!(flips > 2000, "{flips}");
    assert_eq!(fault(&folder), None);
}

#[test]
fn what_is_cut_off_missing_or_made_up_is_an_error_or_an_earlier_state() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("s");
    let chunks = example(&folder, SMALL);
    let text = chunks.concat();
    for path in files(&folder) {
        let whole = fs::read(&path).unwrap();
        for share in 0..8 {
            fs::write(&path, &whole[..whole.len() * share / 8]).unwrap();
            if fault(&folder).is_none() {
                // A journal that ends earlier is one of an earlier moment.
                assert!(path.ends_with("journal"), "{share}/8 of {}", path.display());
                let session = Session::open(&folder).unwrap();
                assert!(text.starts_with(session.tokens()));
            }
        }
        // What nobody knows of is no part of the session, but for two files that are one record.
        let longer = [&whole[..], &[7; 50]].concat();
        fs::write(&path, longer).unwrap();
        let is_record = path.extension().is_some_and(|ending| ending == "json")
            || path.file_name().unwrap().to_str().unwrap().starts_with("tail");
        assert_eq!(fault(&folder).is_some(), is_record, "{}", path.display());
        fs::remove_file(&path).unwrap();
        assert!(fault(&folder).is_some(), "without {}", path.display());
        fs::write(&path, whole).unwrap();
    }
    // Numbers that nobody could have written, with a checksum that fits.
    let head = fs::read_to_string(folder.join("session.json")).unwrap();
    let session = head.split_once("\"session\":").unwrap().1.strip_suffix('}').unwrap();
    for (from, to) in [
        ("\"layers\":2", "\"layers\":18446744073709551615"),
        ("\"layers\":2", "\"layers\":4096"),
        ("\"block\":5", "\"block\":1"),
        ("\"block\":5", "\"block\":1048576"),
        ("\"head_dim\":8", "\"head_dim\":-1"),
        ("\"blocks_per_segment\":3", "\"blocks_per_segment\":0"),
        ("\"blocks_per_segment\":3", "\"blocks_per_segment\":1048576"),
        ("\"version\":1", "\"version\":2"),
        ("\"float32\"", "\"float64\""),
        ("\"dropped\":[]", "\"dropped\":[4294967295,7]"),
        ("\"lineage\":\"", "\"lineage\":\"1"),
    ] {
        let session = session.replacen(from, to, 1);
        let crc = crc32c::crc32c(session.as_bytes());
        let made_up = format!("{{\"checksum\":\"crc32c:{crc:08x}\",\"session\":{session}}}");
        fs::write(folder.join("session.json"), made_up).unwrap();
        let found = fault(&folder);
        assert!(found.is_some() || to.contains("dropped"), "{to}");
        if to.contains("version") {
            assert!(found.unwrap().contains("of version 2, and this program reads version 1"));
        }
    }
    fs::write(folder.join("session.json"), head).unwrap();
    // A journal that promises more than there is.
    let journal = fs::read(folder.join("journal")).unwrap();
    for (at, value) in [(8, u64::from(u32::MAX) - 1), (8, 1 << 20), (16, u64::MAX / 8), (32, u64::MAX), (48, u64::MAX)]
    {
        let mut made_up = journal.clone();
        let record = made_up.len() - 96;
        made_up[record + at..][..8].copy_from_slice(&value.to_le_bytes());
        if at == 8 {
            made_up[record + 16..][..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        }
        let crc = crc32c::crc32c(&made_up[record..record + 92]);
        made_up[record + 92..].copy_from_slice(&crc.to_le_bytes());
        fs::write(folder.join("journal"), made_up).unwrap();
        assert!(fault(&folder).is_some() || at == 48, "{value} at {at}");
        fs::write(folder.join("journal"), &journal).unwrap();
    }
}

#[test]
fn damaged_blocks_are_dropped_with_a_list() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("s");
    let chunks = example(&folder, SMALL);
    // 66 tokens are 16 blocks of 4 and an unfinished one of 2. Block 4 is the second of the second segment, block 7 of the third.
    let flip = |name: &str, at: usize| {
        let mut bytes = fs::read(folder.join(name)).unwrap();
        bytes[at] ^= 4;
        fs::write(folder.join(name), bytes).unwrap();
    };
    let unit = 2 * 5 * HEAD_DIM * 4;
    flip("blocks-000001.seg", 64 + LAYERS * KV_HEADS * unit + 100);
    let record = 24 + 4 * LAYERS * KV_HEADS * (1 + HEAD_DIM) + 4;
    flip("blocks-000002.idx", 64 + record + 30);
    let found = fault(&folder).unwrap();
    assert!(found.contains("blocks-000002.idx: the landmarks of block 7 are damaged"), "{found}");
    let repair = session::repair(&folder).unwrap();
    assert_eq!(repair.dropped, [4, 7]);
    assert_eq!(repair.damage, ["block 4: its keys and values are damaged", "block 7: its landmarks are damaged"]);
    assert_eq!(fault(&folder), None);
    assert_eq!(session::repair(&folder).unwrap().damage, Vec::<String>::new());
    assert_eq!(session::peek(&folder).unwrap().dropped, [4, 7]);
    // The text is all there, and goes on; what is read of it are the other blocks, under their own numbers.
    let mut twin = Twin::open(&folder, 0, chunks.clone());
    twin.cache.trace_reads();
    twin.append(text(3, 20), true);
    let mut blocks: Vec<_> = twin.cache.reads(0).into_iter().map(|read| (read.block, read.tokens)).collect();
    blocks.sort_by_key(|(block, _)| *block);
    assert!(!blocks.is_empty() && blocks.iter().all(|(block, _)| ![4, 7].contains(block)), "{blocks:?}");
    assert!(blocks.iter().all(|(block, tokens)| *tokens == (4 * block..4 * block + 4)), "{blocks:?}");
    assert_eq!(twin.cache.finished_blocks(), 21);
    let chunks = twin.chunks.clone();
    drop(twin);
    Twin::open(&folder, 0, chunks.clone());
    // The unfinished block of 2 tokens, and the text: what ends with the last whole block is kept.
    let tail = files(&folder)
        .into_iter()
        .find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("tail"))
        .unwrap();
    fs::remove_file(tail).unwrap();
    assert!(fault(&folder).unwrap().contains("the unfinished block is damaged"));
    let repair = session::repair(&folder).unwrap();
    assert_eq!(
        repair.damage,
        ["the unfinished block is damaged", "the text's last 2 tokens are dropped: it ends with token 84"]
    );
    assert_eq!(Session::open(&folder).unwrap().tokens(), &chunks.concat()[..84]);
    assert_eq!(fault(&folder), None);
    // The text of a block.
    let mut bytes = fs::read(folder.join("tokens")).unwrap();
    bytes[4 * 41] ^= 1;
    fs::write(folder.join("tokens"), bytes).unwrap();
    assert!(fault(&folder).unwrap().contains("tokens: the text is damaged"));
    assert_eq!(session::repair(&folder).unwrap().dropped, [10]);
    assert_eq!(fault(&folder), None);
}

#[test]
fn a_full_disk_leaves_the_session_as_it_was() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("s");
    let chunks = example(&folder, SMALL);
    let before: Vec<(PathBuf, Vec<u8>)> =
        files(&folder).into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    let mut twin = Twin::open(&folder, 0, chunks.clone());
    // The next segment is on a device that is always full.
    std::os::unix::fs::symlink("/dev/full", folder.join("blocks-000006.idx")).unwrap();
    let chunk = text(9, 30);
    let out = read(&mut twin.cache, &chunk);
    let error = twin.session.commit(&mut twin.cache, &chunk, &[], None, true).unwrap_err().to_string();
    assert!(error.contains("blocks-000006.idx: no room: No space left on device"), "{error}");
    assert!(error.contains("the session is as it was before"), "{error}");
    let after: Vec<(PathBuf, Vec<u8>)> =
        files(&folder).into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    assert!(before == after);
    // With room, what was read can be committed after all.
    twin.session.commit(&mut twin.cache, &chunk, &[], None, true).unwrap();
    twin.chunks.push(chunk.clone());
    let mut memory = LandmarkCache::new(config(), rope(), DType::F32, &Device::Cpu).unwrap();
    chunks.iter().for_each(|chunk| drop(read(&mut memory, chunk)));
    assert_eq!(bits(&read(&mut memory, &chunk)), bits(&out));
    let next = text(0, 5);
    assert_eq!(bits(&twin.append(next.clone(), true)), bits(&read(&mut memory, &next)));
    // A limit is a disk that is full.
    let folder = parent.path().join("limited");
    let bytes = session::peek(&parent.path().join("s")).unwrap().bytes;
    create(&folder, Settings { disk_limit: Some(bytes / 2), ..SMALL });
    let mut twin = Twin::open(&folder, 0, vec![]);
    let mut error = None;
    for i in 0..20 {
        let chunk = text(i, 11);
        read(&mut twin.cache, &chunk);
        match twin.session.commit(&mut twin.cache, &chunk, &[], None, false) {
            Ok(()) => twin.chunks.push(chunk),
            Err(full) => {
                error = Some(full.to_string());
                break;
            }
        }
    }
    assert!(error.unwrap().contains("--disk"));
    assert!(session::peek(&folder).unwrap().bytes <= bytes / 2);
    let (tokens, count) = (twin.session.tokens(), twin.session.tokens().len() as u64);
    assert_eq!(session::peek_tokens(&folder, 3..count).unwrap(), tokens[3..]);
    let beyond = [(count - 1, count + 1), (0, u64::MAX), (u64::MAX, 0)];
    assert!(beyond.iter().all(|&(from, end)| session::peek_tokens(&folder, from..end).is_err()));
    let chunks = twin.chunks.clone();
    drop(twin);
    Twin::open(&folder, 0, chunks);
}

/// If the machine stops, the last seconds may not be on the disk: the session is as it was before them.
#[test]
fn what_the_disk_did_not_get_is_taken_back() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("s");
    let mut chunks = example(&folder, SMALL);
    let mut twin = Twin::open(&folder, 0, chunks.clone());
    for i in 0..3 {
        twin.append(text(i, 8), false);
    }
    chunks.extend(twin.chunks.drain(chunks.len()..));
    drop(twin);
    // A process that ended does no harm.
    drop(Twin::open(&folder, 0, chunks.clone()));
    let last = files(&folder).into_iter().rfind(|path| path.extension().is_some_and(|ending| ending == "seg")).unwrap();
    let whole = fs::read(&last).unwrap();
    fs::write(&last, [&whole[..whole.len() - 700], &[0; 700]].concat()).unwrap();
    let session = Session::open(&folder).unwrap();
    assert_eq!(session.notes().len(), 1);
    assert!(session.notes()[0].contains("the last 24 tokens"), "{:?}", session.notes());
    assert_eq!(session.tokens(), chunks[..6].concat());
    drop(session);
    let mut twin = Twin::open(&folder, 0, chunks[..6].to_vec());
    let chunk = text(0, 8);
    let expected = read(&mut twin.in_memory(), &chunk);
    assert_eq!(bits(&twin.append(chunk, true)), bits(&expected));
}

#[test]
fn a_session_has_one_process_and_one_shape() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("s");
    example(&folder, SMALL);
    let session = Session::open(&folder).unwrap();
    let error = Session::open(&folder).unwrap_err().to_string();
    assert!(error.contains(&format!("the session is in use: process {}", std::process::id())), "{error}");
    assert!(session::repair(&folder).unwrap_err().to_string().contains("in use"));
    assert!(session::delete(&folder).unwrap_err().to_string().contains("in use"));
    let other = CacheConfig { layers: 3, ..config() };
    let error = session.cache(other, rope(), 0, Scoring::Exact).unwrap_err().to_string();
    assert!(error.contains("as the blocks on disk"), "{error}");
    let error = Session::create(&folder, &config(), HEAD_DIM, SMALL, serde_json::Value::Null).unwrap_err().to_string();
    assert!(error.contains("there is something of this name already"), "{error}");
    let dropping = CacheConfig { max_blocks: Some(9), ..config() };
    let error =
        Session::create(&parent.path().join("t"), &dropping, HEAD_DIM, SMALL, serde_json::Value::Null).unwrap_err();
    assert!(error.to_string().contains("expected one row, all blocks"), "{error}");
    drop(session);
    // Others' files stay.
    fs::write(folder.join("notes.txt"), "mine").unwrap();
    assert!(session::delete(&folder).is_err());
    assert_eq!(files(&folder), [folder.join("notes.txt")]);
    assert!(session::delete(&folder).unwrap_err().to_string().contains("no session"));
}

/// Rounded blocks are the same wherever they are: encoded in memory, on disk, and after they were read again.
#[test]
fn rounded_blocks_are_the_same_in_every_tier() {
    for block_type in [BlockType::BF16, BlockType::I8] {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("s");
        create(&folder, Settings { block_type, ..SMALL });
        let mut twin = Twin::open(&folder, 0, vec![]);
        let tiers = Tiers { of: block_type, ram: 1 << 20, scoring: Scoring::Exact };
        let mut memory = LandmarkCache::in_tiers(config(), rope(), tiers).unwrap();
        let mut exact = LandmarkCache::new(config(), rope(), DType::F32, &Device::Cpu).unwrap();
        let mut off = 0f32;
        for i in 0..12 {
            let chunk = text(40 * i, 13);
            let out = twin.append(chunk.clone(), false);
            assert_eq!(bits(&out), bits(&read(&mut memory, &chunk)), "{block_type:?}, chunk {i}");
            let difference = (out - read(&mut exact, &chunk)).unwrap().abs().unwrap().mean_all().unwrap();
            off = off.max(difference.to_scalar::<f32>().unwrap());
            if i % 3 == 2 {
                let chunks = std::mem::take(&mut twin.chunks);
                drop(twin);
                twin = Twin::open(&folder, 0, chunks);
            }
        }
        assert!(off > 0. && off < 0.1, "{block_type:?}: off by {off} in the mean");
    }
}

/// With an index: the same bits however often the session was left, from the index's file or without it, and nearly the blocks of exact scoring.
#[test]
fn an_index_is_the_same_after_every_return() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("s");
    create(&folder, Settings { blocks_per_segment: Some(500), ..SMALL });
    let tiers = Tiers { of: BlockType::F32, ram: 1 << 20, scoring: Scoring::IndexMeasured };
    let mut memory = LandmarkCache::in_tiers(config(), rope(), tiers).unwrap();
    let open = || {
        let session = Session::open(&folder).unwrap();
        let (cache, _) = session.cache(config(), rope(), 100_000, Scoring::Index).unwrap();
        (session, cache)
    };
    let (mut session, mut cache) = open();
    // 2048 blocks of 4 tokens are exact; then there is an index.
    for i in 0..240 {
        let chunk = text(41 * i, 40);
        let left = i >= 200 && i % 10 == 0;
        let out = read(&mut cache, &chunk);
        assert_eq!(bits(&out), bits(&read(&mut memory, &chunk)), "chunk {i}");
        session.commit(&mut cache, &chunk, &[], None, left).unwrap();
        if left {
            assert_eq!(folder.join("index").exists(), session.status().blocks >= 2048, "chunk {i}");
            let kept = fs::read(folder.join("index")).ok();
            let _ = (i % 20 == 0).then(|| fs::remove_file(folder.join("index")));
            drop((session, cache));
            (session, cache) = open();
            // Whoever misses it builds it and keeps it.
            assert!(fs::read(folder.join("index")).ok() == kept, "chunk {i}");
        }
    }
    let recall = memory.recall();
    let mass = recall.mass / recall.queries as f64;
    assert!(recall.queries > 5000 && mass > 0.9, "{recall:?}");
    assert_eq!(session.verify(), Vec::<String>::new());
    fs::write(folder.join("index"), [1; 100]).unwrap();
    assert_eq!(session.verify(), ["the index is damaged: it is built again when the session is read"]);
}
