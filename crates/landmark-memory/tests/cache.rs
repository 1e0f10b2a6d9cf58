//! What must hold of the landmark cache, whatever the text, the chunks and the shapes.

use candle_core::{DType, Device, Tensor};
use landmark_attention::{Attend, LandmarkParams, Landmarks, Pairs, Rope, landmark_attention, reference};
use landmark_memory::{CacheConfig, ContextMiss, LandmarkCache, Selection};
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

/// Rows of a text with landmarks that hold ordinary tokens.
fn ordinary(tokens: usize, mem_freq: usize) -> Tensor {
    Tensor::from_iter((0..tokens).map(|i| (i + i / mem_freq) as u32), &CPU).unwrap()
}

/// Reads the text in chunks of these many ordinary tokens.
fn read(cache: &mut LandmarkCache, text: &Text, batch: usize, chunks: &[usize], miss: Option<&Text>) -> Tensor {
    let mut from = 0;
    let outs: Vec<Tensor> = chunks
        .iter()
        .map(|&n| {
            let tokens = Tensor::zeros((batch, n), DType::U32, &CPU).unwrap();
            cache
                .forward(&tokens, |ids, attention| {
                    let rows = ids.dims()[1];
                    let out = text.run(attention, from, rows, miss);
                    from += rows;
                    out
                })
                .unwrap()
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
            let whole = whole.index_select(&ordinary(tokens, mem_freq), 1).unwrap();
            prop_assert!(off(&cached, &whole) < 1e-11, "off by {}", off(&cached, &whole));
            prop_assert_eq!(cache.finished_blocks(), length / (mem_freq + 1));
            Ok(())
        })
        .unwrap();
}

/// The context-miss token's weight is what the retrieved blocks share: the reference with the cached landmarks controlled.
#[test]
fn context_miss_gates_retrieval() {
    let (mem_freq, chunks) = (4, [12, 10]);
    let text = Text::new(2, 2, 2, 27);
    let miss = Text::new(2, 2, 2, 1);
    let with = |cutoff| {
        let context_miss = Some(ContextMiss { cutoff });
        let mut cache = cache(CacheConfig { context_miss, ..config(2, 2, mem_freq, 8) });
        let out = read(&mut cache, &text, 2, &chunks, Some(&miss)).narrow(1, 12, 10).unwrap();
        (out, cache.skipped_retrievals())
    };
    let (q, k) = rotated(&text);
    let key = rope().at(&[-1]).apply(&miss.k).unwrap();
    let key =
        key.unsqueeze(2).unwrap().broadcast_as((2, 2, 2, 1, HEAD_DIM)).unwrap().reshape((2, 4, 1, HEAD_DIM)).unwrap();
    let score = (q.broadcast_mul(&key).unwrap().sum_keepdim(3).unwrap() / (HEAD_DIM as f64).sqrt()).unwrap();
    // 12 tokens are 3 blocks with their landmarks: 15 rows. The landmarks of the second chunk are open.
    let controlled: Vec<u8> = (0..2 * 27).map(|i| (i % 27 < 15) as u8).collect();
    let controlled = Tensor::from_vec(controlled, (2, 27), &CPU).unwrap();
    let params = LandmarkParams::new(Landmarks::Every(mem_freq + 1));
    let expected =
        reference::landmark_attention_with_context_miss(&q, &k, &text.v, &params, &score, &controlled).unwrap();
    let expected = expected.transpose(1, 2).unwrap().flatten(2, 3).unwrap();
    let expected = expected.index_select(&ordinary(22, mem_freq), 1).unwrap().narrow(1, 12, 10).unwrap();
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
fn wrong_settings_and_chunks_are_named() {
    let new = |config| LandmarkCache::new(config, rope(), DType::F64, &CPU).map(|_| ()).unwrap_err().to_string();
    assert!(new(config(1, 1, 0, 2)).contains("mem_freq is 0"));
    assert!(new(CacheConfig { max_blocks: Some(3), ..config(1, 1, 4, 4) }).contains("mem_cache_size is 3"));
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
}
