//! What must hold of the landmark cache, whatever the text, the chunks and the shapes.

use candle_core::{DType, Device, Tensor};
use landmark_attention::{Attend, LandmarkParams, Landmarks, Pairs, Rope, landmark_attention, reference};
use landmark_memory::{BlockType, CacheConfig, ContextMiss, LandmarkCache, PoolTier, Scoring, Selection, Tiers};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const HEAD_DIM: usize = 8;
const LANDMARK: u32 = 99;
const CPU: Device = Device::Cpu;

fn rope() -> Rope {
    Rope::new(HEAD_DIM, 10_000., Pairs::Halves)
}

fn config(batch: usize, kv_heads: usize, mem_freq: usize, top_k: usize) -> CacheConfig {
    CacheConfig {
        layers: 1,
        batch,
        kv_heads,
        mem_freq,
        landmark_id: LANDMARK,
        top_k,
        selection: Selection::PerTokenAndHead,
        max_blocks: None,
        window: 100_000,
        context_miss: None,
    }
}

fn cache(config: CacheConfig) -> LandmarkCache {
    LandmarkCache::new(config, rope(), DType::F64, &CPU).unwrap()
}

/// Random projections of a text whose landmarks are in place, `[batch, heads, time, head_dim]` each.
struct Text {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Text {
    fn new(batch: usize, kv_heads: usize, group: usize, time: usize) -> Self {
        let random = |heads| Tensor::randn(0f64, 1., (batch, heads, time, HEAD_DIM), &CPU).unwrap();
        Self { q: random(kv_heads * group), k: random(kv_heads), v: random(kv_heads) }
    }

    /// What a one-layer "model" gives for rows `from..from + n`: the attention's output, `[batch, n, heads * head_dim]`.
    fn run(
        &self,
        attention: &mut dyn Attend,
        from: usize,
        n: usize,
        miss: Option<&Text>,
    ) -> candle_core::Result<Tensor> {
        let part = |x: &Tensor, miss: Option<&Tensor>| {
            let x = x.narrow(2, from, n)?;
            miss.map_or(Ok(x.clone()), |miss| Tensor::cat(&[miss, &x], 2))
        };
        let q = part(&self.q, miss.map(|m| &m.q))?;
        let (k, v) = (part(&self.k, miss.map(|m| &m.k))?, part(&self.v, miss.map(|m| &m.v))?);
        let out = attention.attend(0, &q, &k, &v)?;
        let out = if miss.is_some() { out.narrow(2, 1, n)? } else { out };
        out.transpose(1, 2)?.flatten(2, 3)
    }
}

/// A landmark after every `mem_freq` of so many tokens.
fn regular(tokens: usize, mem_freq: usize) -> Vec<bool> {
    (1..=tokens).map(|i| i.is_multiple_of(mem_freq)).collect()
}

/// Rows of a text with landmarks that hold ordinary tokens.
fn ordinary(follows: &[bool]) -> Tensor {
    let mut landmarks = 0;
    let row = |(i, &follows): (usize, &bool)| {
        let row = i + landmarks;
        landmarks += usize::from(follows);
        row as u32
    };
    Tensor::from_iter(follows.iter().enumerate().map(row), &CPU).unwrap()
}

/// The mask of the landmarks, for so many rows of a batch.
fn mask(follows: &[bool], batch: usize) -> Tensor {
    let row: Vec<u8> = follows.iter().flat_map(|&follows| if follows { vec![0, 1] } else { vec![0] }).collect();
    let time = row.len();
    Tensor::from_vec(row, (1, time), &CPU).unwrap().broadcast_as((batch, time)).unwrap().contiguous().unwrap()
}

/// Reads the text in chunks of these many ordinary tokens.
fn read(cache: &mut LandmarkCache, text: &Text, batch: usize, chunks: &[usize], miss: Option<&Text>) -> Tensor {
    read_with(text, batch, chunks, miss, |_, tokens, model| cache.forward(tokens, model).unwrap())
}

/// The same with landmarks after these tokens.
fn read_at(
    cache: &mut LandmarkCache,
    text: &Text,
    batch: usize,
    chunks: &[usize],
    follows: &[bool],
    miss: Option<&Text>,
) -> Tensor {
    read_with(text, batch, chunks, miss, |from, tokens, model| {
        let follows = &follows[from..from + tokens.dims()[1]];
        cache.forward_with_landmarks(tokens, follows, model).unwrap()
    })
}

type Model<'a> = &'a mut dyn FnMut(&Tensor, &mut dyn Attend) -> candle_core::Result<Tensor>;

fn read_with(
    text: &Text,
    batch: usize,
    chunks: &[usize],
    miss: Option<&Text>,
    mut forward: impl FnMut(usize, &Tensor, Model) -> Tensor,
) -> Tensor {
    let (mut row, mut token) = (0, 0);
    let outs: Vec<Tensor> = chunks
        .iter()
        .map(|&n| {
            let tokens = Tensor::zeros((batch, n), DType::U32, &CPU).unwrap();
            let out = forward(token, &tokens, &mut |ids, attention| {
                let rows = ids.dims()[1];
                let out = text.run(attention, row, rows, miss);
                row += rows;
                out
            });
            token += n;
            out
        })
        .collect();
    Tensor::cat(&outs, 1).unwrap()
}

fn off(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
}

fn rotated(text: &Text) -> (Tensor, Tensor) {
    let rotation = rope().at(&(0..text.q.dims()[2] as i64).collect::<Vec<_>>());
    (rotation.apply(&text.q).unwrap(), rotation.apply(&text.k).unwrap())
}

/// With as many blocks as there are, the cache is exact: any chunks give what one pass over the whole text gives.
#[test]
fn cached_with_enough_blocks_equals_uncached() {
    let config_ = Config { cases: 60, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config_, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let selections = [Selection::PerTokenAndHead, Selection::MaxOverHeads, Selection::MaxOverTokens];
    let case = (1usize..3, 1usize..3, 1usize..3, 1usize..9, proptest::collection::vec(1usize..30, 1..8), 0usize..3);
    runner
        .run(&case, |(batch, kv_heads, group, mem_freq, chunks, selection)| {
            let tokens: usize = chunks.iter().sum();
            let length = tokens + tokens / mem_freq;
            let text = Text::new(batch, kv_heads, group, length);
            let enough = length / (mem_freq + 1) + 1;
            let mut cache =
                cache(CacheConfig { selection: selections[selection], ..config(batch, kv_heads, mem_freq, enough) });
            let cached = read(&mut cache, &text, batch, &chunks, None);
            let (q, k) = rotated(&text);
            let params = LandmarkParams::new(Landmarks::Every(mem_freq + 1));
            let whole = landmark_attention(&q, &k, &text.v, &params).unwrap();
            let whole = whole.transpose(1, 2).unwrap().flatten(2, 3).unwrap();
            let whole = whole.index_select(&ordinary(&regular(tokens, mem_freq)), 1).unwrap();
            prop_assert!(off(&cached, &whole) < 1e-11, "off by {}", off(&cached, &whole));
            prop_assert_eq!(cache.finished_blocks(), length / (mem_freq + 1));
            Ok(())
        })
        .unwrap();
}

/// Landmarks anywhere, with at most `mem_freq` tokens before each: after how many tokens, and how many tokens remain.
fn places() -> impl Strategy<Value = (usize, Vec<bool>)> {
    let text = (proptest::collection::vec(1usize..10, 0..14), 0usize..9, 1usize..4);
    text.prop_map(|(sizes, rest, spare)| {
        let mem_freq = sizes.iter().copied().max().unwrap_or(1).max(rest) + spare - 1;
        let mut follows = Vec::new();
        for size in sizes {
            follows.extend(std::iter::repeat_n(false, size - 1));
            follows.push(true);
        }
        follows.extend(std::iter::repeat_n(false, rest.min(mem_freq - 1)));
        (mem_freq, follows)
    })
}

/// Chunks of at most this many tokens.
fn cut(tokens: usize, most: usize) -> Vec<usize> {
    (0..tokens).step_by(most).map(|from| most.min(tokens - from)).collect()
}

const SELECTIONS: [Selection; 3] = [Selection::PerTokenAndHead, Selection::MaxOverHeads, Selection::MaxOverTokens];

fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

/// The same with blocks of any lengths: while there are enough blocks, all of them are at their true places.
#[test]
fn cached_with_enough_ragged_blocks_equals_uncached() {
    let case = (1usize..3, 1usize..3, 1usize..3, places(), 1usize..25, 0usize..3);
    runner(100)
        .run(&case, |(batch, kv_heads, group, (mem_freq, follows), chunk, selection)| {
            prop_assume!(!follows.is_empty());
            let length = follows.len() + follows.iter().filter(|&&f| f).count();
            let text = Text::new(batch, kv_heads, group, length);
            let config = CacheConfig { selection: SELECTIONS[selection], ..config(batch, kv_heads, mem_freq, length) };
            let mut cache = cache(config);
            let cached = read_at(&mut cache, &text, batch, &cut(follows.len(), chunk), &follows, None);
            let (q, k) = rotated(&text);
            let params = LandmarkParams::new(Landmarks::Mask(mask(&follows, batch)));
            let whole = landmark_attention(&q, &k, &text.v, &params).unwrap();
            let whole = whole.transpose(1, 2).unwrap().flatten(2, 3).unwrap();
            let whole = whole.index_select(&ordinary(&follows), 1).unwrap();
            prop_assert!(off(&cached, &whole) < 1e-11, "off by {}", off(&cached, &whole));
            prop_assert_eq!(cache.finished_blocks(), length - follows.len());
            Ok(())
        })
        .unwrap();
}

/// The cache as the module documentation has it, query by query, for one row of a batch: rows `[time, heads * head_dim]`.
fn naive(text: &Text, row: usize, chunks: &[usize], follows: &[bool], config: &CacheConfig) -> Vec<Vec<f64>> {
    let vector = |x: &Tensor, head: usize, at: usize| x.get(row).unwrap().get(head).unwrap().get(at).unwrap();
    let turned = |x: Tensor, position: usize| {
        rope().at(&[position as i64]).apply(&x.reshape((1, 1, 1, HEAD_DIM)).unwrap()).unwrap()
    };
    let dot = |a: &Tensor, b: &Tensor| (a * b).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    let (heads, group) = (text.q.dims()[1], text.q.dims()[1] / config.kv_heads);
    let rows_of = |tokens: usize| tokens + follows[..tokens].iter().filter(|&&f| f).count();
    let k = config.top_k;
    let (mut outs, mut token) = (vec![], 0);
    for &n in chunks {
        // Rows of the finished blocks, and of the unfinished one and the chunk.
        let mut blocks: Vec<std::ops::Range<usize>> = vec![];
        for before in (1..=token).filter(|&before| follows[before - 1]) {
            blocks.push(blocks.last().map_or(0, |block| block.end)..rows_of(before));
        }
        let window = blocks.last().map_or(0, |block| block.end)..rows_of(token + n);
        let has_older = blocks.len() > k;
        blocks.drain(..blocks.len().saturating_sub(config.max_blocks.unwrap_or(usize::MAX)));
        // The newest blocks stand right before the window; older ones end where those begin.
        let begin = 500;
        let mut ends = vec![begin];
        for block in blocks.iter().rev().take(k) {
            ends.insert(0, ends[0] - block.len());
        }
        let newest = ends.len() - 1;
        let ends = if has_older { &ends[..] } else { &ends[1..] };
        let is_newest = |block: usize| has_older && block + newest >= blocks.len();
        let slot_to_score = |block: usize| match has_older {
            false => block,
            true if is_newest(block) => block + newest - blocks.len() + 1,
            true => 0,
        };
        let queries: Vec<usize> = (rows_of(token)..window.end).collect();
        let position = |at: usize| begin + at - window.start;
        let weights: Vec<Vec<Vec<f64>>> = (0..heads)
            .map(|head| {
                let score = |&at: &usize| {
                    let q = turned(vector(&text.q, head, at), position(at));
                    let key = |block: usize| {
                        turned(vector(&text.k, head / group, blocks[block].end - 1), ends[slot_to_score(block)] - 1)
                    };
                    let scores: Vec<f64> = (0..blocks.len())
                        .map(|block| (dot(&q, &key(block)) / (HEAD_DIM as f64).sqrt()).exp())
                        .collect();
                    let sum: f64 = scores.iter().sum();
                    scores.into_iter().map(|score| score / sum).collect()
                };
                queries.iter().map(score).collect()
            })
            .collect();
        for (i, &at) in queries.iter().enumerate() {
            let mut out = vec![];
            for head in 0..heads {
                let weight = |block: usize| match config.selection {
                    Selection::PerTokenAndHead => weights[head][i][block],
                    Selection::MaxOverHeads => weights.iter().map(|w| w[i][block]).fold(0., f64::max),
                    Selection::MaxOverTokens => weights[head].iter().map(|w| w[block]).fold(0., f64::max),
                };
                let mut chosen: Vec<usize> = (0..blocks.len()).collect();
                chosen.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
                chosen.truncate(k);
                chosen.sort_unstable();
                let (mut keys, mut values, mut landmarks) = (vec![], vec![], vec![]);
                for (rank, &block) in chosen.iter().enumerate() {
                    let slot = if has_older { rank + usize::from(is_newest(block)) } else { block };
                    for row in blocks[block].clone() {
                        keys.push(turned(vector(&text.k, head / group, row), ends[slot] - (blocks[block].end - row)));
                        values.push(vector(&text.v, head / group, row));
                        landmarks.push((row + 1 == blocks[block].end) as u8);
                    }
                }
                let is_landmark = mask(follows, 1).flatten_all().unwrap().to_vec1::<u8>().unwrap();
                for row in window.start..=at {
                    keys.push(turned(vector(&text.k, head / group, row), position(row)));
                    values.push(vector(&text.v, head / group, row));
                }
                landmarks.extend(&is_landmark[window.start..=at]);
                let q = turned(vector(&text.q, head, at), position(at));
                let length = keys.len();
                let keys = Tensor::cat(&keys, 2).unwrap();
                let values = Tensor::stack(&values, 0).unwrap().reshape((1, 1, length, HEAD_DIM)).unwrap();
                let landmarks = Landmarks::Mask(Tensor::from_vec(landmarks, (1, length), &CPU).unwrap());
                let row = reference::landmark_attention(&q, &keys, &values, &LandmarkParams::new(landmarks)).unwrap();
                out.extend(row.flatten_all().unwrap().to_vec1::<f64>().unwrap());
            }
            outs.push(out);
        }
        token += n;
    }
    outs
}

/// With fewer blocks than there are: what is documented, for all selections, also when old blocks are dropped.
#[test]
fn ragged_blocks_are_retrieved_as_documented() {
    let case = (1usize..3, 1usize..3, places(), 1usize..12, (0usize..3, 1usize..4, proptest::option::of(0usize..4)));
    runner(60)
        .run(&case, |(batch, group, (mem_freq, follows), chunk, (selection, top_k, spare))| {
            prop_assume!(!follows.is_empty());
            let length = follows.len() + follows.iter().filter(|&&f| f).count();
            let text = Text::new(batch, 2, group, length);
            let selection = SELECTIONS[selection];
            let max_blocks = spare.map(|spare| top_k + spare);
            let config = CacheConfig { selection, max_blocks, ..config(batch, 2, mem_freq, top_k) };
            let chunks = cut(follows.len(), chunk);
            let cached = read_at(&mut cache(config.clone()), &text, batch, &chunks, &follows, None);
            for row in 0..batch {
                let naive = naive(&text, row, &chunks, &follows, &config);
                let naive = Tensor::new(naive, &CPU).unwrap().index_select(&ordinary(&follows), 0).unwrap();
                let off = off(&cached.get(row).unwrap(), &naive);
                prop_assert!(off < 1e-10, "off by {off}");
            }
            Ok(())
        })
        .unwrap();
}

/// Landmarks after blocks of these sizes, and none in the rest of so many tokens.
fn after_blocks(sizes: &[usize], tokens: usize) -> Vec<bool> {
    let mut follows: Vec<bool> = sizes.iter().flat_map(|&n| (1..=n).map(move |i| i == n)).collect();
    follows.resize(tokens, false);
    follows
}

/// Blocks that the outer softmax gives nothing may be left out: where only one has weight, one is enough.
#[test]
fn blocks_without_weight_can_be_left_out() {
    let follows = after_blocks(&[3, 5, 2, 5, 4, 1], 23);
    let mut text = Text::new(1, 1, 1, 29);
    // Channels 0 and 4 alone are ever rotated, and the queries are 0 there: no score depends on a position.
    let still = Rope::new(HEAD_DIM, f64::INFINITY, Pairs::Halves);
    let way = Tensor::new(&[0f64, 1., 1., 1., 0., 1., 1., 1.], &CPU).unwrap().reshape((1, 1, 1, HEAD_DIM)).unwrap();
    text.q = way.broadcast_as((1, 1, 29, HEAD_DIM)).unwrap().contiguous().unwrap();
    // The landmark of the third block is on the queries' way, all others are far off it.
    let is_landmark = mask(&follows, 1).flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let key = |row: usize| match is_landmark[row] {
        0 => text.k.narrow(2, row, 1).unwrap(),
        _ => (&way * if row == 12 { 40. } else { -400. }).unwrap(),
    };
    text.k = Tensor::cat(&(0..29).map(key).collect::<Vec<_>>(), 2).unwrap();
    let with = |top_k| {
        let mut cache = LandmarkCache::new(config(1, 1, 5, top_k), still.clone(), DType::F64, &CPU).unwrap();
        let out = read_at(&mut cache, &text, 1, &[20, 3], &follows, None).narrow(1, 20, 3).unwrap();
        (out, cache.finished_blocks())
    };
    let ((none, _), (one, _), (all, blocks)) = (with(0), with(1), with(6));
    assert_eq!((blocks, is_landmark[12]), (6, 1));
    assert!(off(&one, &all) < 1e-12 && off(&none, &all) > 1e-3, "{} {}", off(&one, &all), off(&none, &all));
}

/// Every distance is counted from the token's own block: here each token reads all blocks that were finished before its chunk.
#[test]
fn distances_are_counted_from_the_own_block() {
    let (batch, mem_freq, chunks) = (2, 4, [6, 7, 9]);
    let text = Text::new(batch, 1, 2, 22 + 22 / mem_freq);
    let mut cache = cache(config(batch, 1, mem_freq, 8));
    cache.trace_distances();
    read(&mut cache, &text, batch, &chunks, None);
    let mut expected = [0u64; 6];
    let mut begin = 0;
    for chunk in chunks {
        // Rows of the text, landmarks among them, and the block that each is in.
        let rows = |tokens: usize| tokens + tokens / mem_freq;
        for row in rows(begin)..rows(begin + chunk) {
            for block in 0..begin / mem_freq {
                expected[row / (mem_freq + 1) - block] += (batch * 2) as u64;
            }
        }
        begin += chunk;
    }
    let last = expected.iter().rposition(|&count| count > 0).unwrap();
    assert_eq!(cache.distances(), &expected[..=last]);
}

/// The context-miss token's weight is what the retrieved blocks share: the reference with the cached landmarks controlled.
#[test]
fn context_miss_gates_retrieval() {
    context_miss_gates_retrieval_at(&regular(22, 4));
    context_miss_gates_retrieval_at(&after_blocks(&[4, 1, 3, 2, 2, 3, 4], 22));
}

fn context_miss_gates_retrieval_at(follows: &[bool]) {
    let (mem_freq, chunks) = (4, [12, 10]);
    let length = follows.len() + follows.iter().filter(|&&f| f).count();
    let text = Text::new(2, 2, 2, length);
    let miss = Text::new(2, 2, 2, 1);
    let with = |cutoff| {
        let context_miss = Some(ContextMiss { cutoff });
        let mut cache = cache(CacheConfig { context_miss, ..config(2, 2, mem_freq, 8) });
        let out = read_at(&mut cache, &text, 2, &chunks, follows, Some(&miss)).narrow(1, 12, 10).unwrap();
        (out, cache.skipped_retrievals())
    };
    let (q, k) = rotated(&text);
    let key = rope().at(&[-1]).apply(&miss.k).unwrap();
    let key =
        key.unsqueeze(2).unwrap().broadcast_as((2, 2, 2, 1, HEAD_DIM)).unwrap().reshape((2, 4, 1, HEAD_DIM)).unwrap();
    let score = (q.broadcast_mul(&key).unwrap().sum_keepdim(3).unwrap() / (HEAD_DIM as f64).sqrt()).unwrap();
    // The landmarks of the second chunk are open.
    let rows = 12 + follows[..12].iter().filter(|&&f| f).count();
    let controlled: Vec<u8> = (0..2 * length).map(|i| (i % length < rows) as u8).collect();
    let controlled = Tensor::from_vec(controlled, (2, length), &CPU).unwrap();
    let params = LandmarkParams::new(Landmarks::Mask(mask(follows, 2)));
    let expected =
        reference::landmark_attention_with_context_miss(&q, &k, &text.v, &params, &score, &controlled).unwrap();
    let expected = expected.transpose(1, 2).unwrap().flatten(2, 3).unwrap();
    let expected = expected.index_select(&ordinary(follows), 1).unwrap().narrow(1, 12, 10).unwrap();
    let (always, skipped) = with(None);
    assert!(off(&always, &expected) < 1e-12, "off by {}", off(&always, &expected));
    assert_eq!(skipped, 0.);
    // No weight reaches 1: nothing is retrieved. A cutoff in between saves some of it.
    let (never, skipped) = with(Some(1.));
    assert!(skipped == 1. && off(&never, &expected) > 1e-3);
    let (sometimes, skipped) = with(Some(0.5));
    assert!((0. ..=1.).contains(&skipped) && off(&sometimes, &never) > 0.);
}

/// Only so many blocks are kept, and reads are counted from the beginning of the text.
#[test]
fn old_blocks_are_dropped_and_reads_are_counted() {
    let text = Text::new(1, 1, 2, 100);
    let mut cache = cache(CacheConfig { max_blocks: Some(5), ..config(1, 1, 4, 2) });
    cache.trace_reads();
    read(&mut cache, &text, 1, &[40, 40], None);
    assert_eq!((cache.finished_blocks(), cache.cached_blocks()), (20, 5));
    assert_eq!(cache.reads(0).len().min(6), cache.reads(0).len());
    // The second chunk started with blocks 5..10 in the cache.
    assert!(cache.reads(0).iter().all(|read| (5..10).contains(&read.block) && read.weight > 0.));
    let total: f64 = cache.reads(0).iter().map(|read| read.weight).sum();
    assert!(total > 0. && total < 1., "{total}");
    assert!(cache.reads(0).iter().all(|read| read.tokens == (4 * read.block..4 * read.block + 4)));
    cache.clear();
    assert_eq!((cache.finished_blocks(), cache.cached_blocks()), (0, 0));
}

/// Nothing is lost to a chunk that failed.
#[test]
fn a_failed_chunk_leaves_the_cache_as_it_was() {
    let text = Text::new(1, 1, 1, 60);
    let (mut cache, mut twin) = (cache(config(1, 1, 4, 2)), cache(config(1, 1, 4, 2)));
    let tokens = Tensor::zeros((1, 22), DType::U32, &CPU).unwrap();
    cache.forward(&tokens, |_, attention| text.run(attention, 0, 27, None)).unwrap();
    twin.forward(&tokens, |_, attention| text.run(attention, 0, 27, None)).unwrap();
    let failed = cache.forward(&tokens, |_, attention| {
        text.run(attention, 27, 28, None)?;
        candle_core::bail!("out of luck")
    });
    assert!(failed.unwrap_err().to_string().contains("out of luck"));
    let next =
        |cache: &mut LandmarkCache| cache.forward(&tokens, |_, attention| text.run(attention, 27, 28, None)).unwrap();
    assert_eq!(off(&next(&mut cache), &next(&mut twin)), 0.);
}

#[test]
fn a_pool_without_room_is_an_error() {
    let text = Text::new(1, 1, 1, 60);
    let tiers = Tiers { of: BlockType::F32, ram: 0, scoring: Scoring::Exact };
    let pool = PoolTier { device: CPU, dtype: DType::F32, bytes: usize::MAX };
    let mut cache = LandmarkCache::in_tiers_with_pool(config(1, 1, 4, 2), rope(), tiers, pool).unwrap();
    let tokens = Tensor::zeros((1, 22), DType::U32, &CPU).unwrap();
    cache.forward(&tokens, |_, attention| text.run(attention, 0, 27, None)).unwrap();
    // It is made when there is something to read.
    for _ in 0..2 {
        let error = cache.forward(&tokens, |_, attention| text.run(attention, 27, 28, None)).unwrap_err().to_string();
        assert!(error.contains("--gpu_memory") && error.contains("cannot be set up"), "{error}");
        assert_eq!(cache.finished_blocks(), 5);
    }
}

#[test]
fn wrong_settings_and_chunks_are_named() {
    let new = |config| LandmarkCache::new(config, rope(), DType::F64, &CPU).map(|_| ()).unwrap_err().to_string();
    assert!(new(config(1, 1, 0, 2)).contains("mem_freq is 0"));
    assert!(new(CacheConfig { max_blocks: Some(3), ..config(1, 1, 4, 4) }).contains("mem_cache_size is 3"));
    assert!(new(config(1, 1, usize::MAX, usize::MAX)).contains("cache_topk"));
    let small = new(CacheConfig { window: 40, ..config(1, 1, 9, 3) });
    assert!(small.contains("cache_topk is 3, expected at most 2"), "{small}");
    let mut cache = cache(CacheConfig { window: 40, ..config(2, 1, 9, 2) });
    let text = Text::new(2, 1, 1, 20);
    let chunk = |cache: &mut LandmarkCache, shape: (usize, usize)| {
        let tokens = Tensor::zeros(shape, DType::U32, &CPU).unwrap();
        cache.forward(&tokens, |_, attention| text.run(attention, 0, 5, None)).unwrap_err().to_string()
    };
    assert_eq!(cache.max_chunk(), 10);
    assert!(chunk(&mut cache, (2, 11)).contains("expected [2, 1 to 10 tokens]"));
    assert!(chunk(&mut cache, (1, 5)).contains("a chunk of shape [1, 5]"));
    assert!(chunk(&mut cache, (2, 0)).contains("a chunk of shape [2, 0]"));
    let tokens = Tensor::zeros((2, 5), DType::U32, &CPU).unwrap();
    let layers = cache.forward(&tokens, |ids, _| ids.to_dtype(DType::F64)).unwrap_err().to_string();
    assert!(layers.contains("layer 0, expected layer 0 of 1"), "{layers}");
    let mut at = |follows: &[bool]| {
        cache.forward_with_landmarks(&tokens, follows, |ids, _| ids.to_dtype(DType::F64)).unwrap_err().to_string()
    };
    assert!(at(&[false; 4]).contains("landmarks are given for 4 tokens, expected for the 5"));
    let tokens = Tensor::zeros((2, 10), DType::U32, &CPU).unwrap();
    let long = cache.forward_with_landmarks(&tokens, &[false; 10], |ids, _| ids.to_dtype(DType::F64)).unwrap_err();
    assert!(long.to_string().contains("a block of more than 9 tokens"), "{long}");
}

/// Projections as a linear layer leaves them, with the heads inside: the same as with the heads outside.
#[test]
fn strided_projections_are_read_too() {
    let (batch, mem_freq) = (2, 5);
    // Blocks of 3 to 5 tokens, the last one unfinished.
    let follows: Vec<bool> = (0..40).map(|i| [2, 6, 11].contains(&(i % 12))).collect();
    let text = Text::new(batch, 2, 2, 40 + follows.iter().filter(|&&f| f).count());
    let inside = |x: &Tensor| x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
    let strided = Text { q: inside(&text.q), k: inside(&text.k), v: inside(&text.v) };
    let chunks = [7, 1, 1, 20, 11];
    let of = |text: &Text| read_at(&mut cache(config(batch, 2, mem_freq, 2)), text, batch, &chunks, &follows, None);
    assert_eq!(off(&of(&text), &of(&strided)), 0.);
}
