//! The caches on a GPU against the same on the CPU. Where there is no GPU these tests say so and check nothing.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Tensor};
use landmark_attention::{Attend, Pairs, Rope};
use landmark_memory::session::{Session, Settings};
use landmark_memory::{
    BlockType, CacheConfig, ContextMiss, LandmarkCache, PoolTier, Scoring, Selection, Tiers, XlCache,
};

const CPU: Device = Device::Cpu;
const HEAD_DIM: usize = 16;

fn gpu() -> Option<Device> {
    let device = Device::new_cuda(0);
    if let Err(error) = &device {
        eprintln!("skipped: no GPU here ({})", error.to_string().lines().next().unwrap_or_default());
    }
    device.ok()
}

fn rope() -> Rope {
    Rope::new(HEAD_DIM, 10_000., Pairs::Interleaved)
}

/// xorshift64*: the same inputs on every machine.
fn numbers(seed: u64, shape: &[usize]) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let numbers: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1 << 23) as f32 - 1.
        })
        .collect();
    Tensor::from_vec(numbers, shape, &CPU).unwrap()
}

/// Projections of a text whose landmarks are in place, as a model's are: `[batch, time, heads, head_dim]`, seen with heads first.
struct Text {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Text {
    fn new(batch: usize, heads: usize, kv_heads: usize, time: usize) -> Self {
        let of = |seed, heads| numbers(seed, &[batch, time, heads, HEAD_DIM]);
        Self { q: of(1, heads), k: of(2, kv_heads), v: of(3, kv_heads) }
    }

    /// Rounded to `rounded`, in `dtype` on `device`.
    fn on(&self, rounded: DType, dtype: DType, device: &Device) -> Self {
        let [q, k, v] = [&self.q, &self.k, &self.v]
            .map(|x| x.to_dtype(rounded).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap());
        Self { q, k, v }
    }

    fn run(&self, attention: &mut dyn Attend, from: usize, n: usize) -> candle_core::Result<Tensor> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| x.narrow(1, from, n).unwrap().transpose(1, 2).unwrap());
        attention.attend(0, &q, &k, &v)?.transpose(1, 2)?.flatten(2, 3)
    }
}

/// Share of tokens whose outputs differ by more than `tolerance`, and the largest difference.
fn off(got: &Tensor, expected: &Tensor, tolerance: f64) -> (f64, f64) {
    let got = got.to_device(&CPU).unwrap().to_dtype(DType::F64).unwrap();
    let off = (got - expected).unwrap().abs().unwrap().max(2).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    // NaN is off.
    let beyond = off.iter().filter(|&&x| x.partial_cmp(&tolerance) != Some(std::cmp::Ordering::Less)).count();
    (beyond as f64 / off.len() as f64, off.into_iter().fold(0., f64::max))
}

struct Setting {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    mem_freq: usize,
    top_k: usize,
    max_blocks: Option<usize>,
    selection: Selection,
    miss: Option<ContextMiss>,
    ragged: bool,
}

impl Setting {
    fn config(&self) -> CacheConfig {
        let &Self { batch, kv_heads, mem_freq, top_k, max_blocks, selection, miss: context_miss, .. } = self;
        CacheConfig {
            layers: 1,
            batch,
            kv_heads,
            mem_freq,
            landmark_id: 99,
            top_k,
            selection,
            max_blocks,
            window: 2000,
            context_miss,
        }
    }
}

/// Reads a text in chunks with a cache in memory.
fn read(setting: &Setting, text: &Text, chunks: &[usize], dtype: DType, device: &Device) -> Tensor {
    let mut cache = LandmarkCache::new(setting.config(), rope(), dtype, device).unwrap();
    read_with(&mut cache, setting, text, chunks, device)
}

/// Reads a text in chunks; the cache is cleared and used once more, so that a ring that was full is seen too.
fn read_with(cache: &mut LandmarkCache, setting: &Setting, text: &Text, chunks: &[usize], device: &Device) -> Tensor {
    let &Setting { batch, mem_freq, miss: context_miss, .. } = setting;
    let mut outs = vec![];
    for _ in 0..2 {
        cache.clear();
        let (mut row, mut block) = (0, 0);
        for (i, &n) in chunks.iter().enumerate() {
            let tokens = Tensor::zeros((batch, n), DType::U32, device).unwrap();
            // Landmarks after 1 to mem_freq tokens, as the place says.
            let follows: Vec<bool> = (0..n)
                .map(|at| {
                    block += 1;
                    let full = if setting.ragged { 1 + (i * 31 + at * 5) % mem_freq } else { mem_freq };
                    let ends = block >= full;
                    if ends {
                        block = 0;
                    }
                    ends
                })
                .collect();
            let out = cache.forward_with_landmarks(&tokens, &follows, |ids, attention| {
                let rows = ids.dims()[1];
                let miss = usize::from(context_miss.is_some());
                // The context-miss token is row 0 of the text.
                let out = if miss == 0 {
                    text.run(attention, row, rows)?
                } else {
                    let with_miss = |x: &Tensor| Tensor::cat(&[x.narrow(1, 0, 1)?, x.narrow(1, row + 1, rows)?], 1);
                    let text = Text { q: with_miss(&text.q)?, k: with_miss(&text.k)?, v: with_miss(&text.v)? };
                    text.run(attention, 0, rows + 1)?.narrow(1, 1, rows)?
                };
                row += rows;
                Ok(out)
            });
            outs.push(out.unwrap());
        }
    }
    Tensor::cat(&outs, 1).unwrap()
}

const CHUNKS: [usize; 12] = [30, 1, 1, 1, 64, 1, 90, 17, 1, 1, 50, 1];

fn check(what: &str, setting: &Setting, device: &Device) {
    let text = Text::new(setting.batch, setting.heads, setting.kv_heads, 800);
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 4e-2), (DType::F16, 5e-3)] {
        let got = read(setting, &text.on(dtype, dtype, device), &CHUNKS, dtype, device);
        assert_eq!(got.dtype(), dtype);
        let expected = read(setting, &text.on(dtype, DType::F64, &CPU), &CHUNKS, DType::F64, &CPU);
        let (beyond, largest) = off(&got, &expected, tolerance);
        // Rotated to another dtype's precision, keys may change the order of blocks whose scores are near.
        let may_be_off = match dtype {
            DType::F32 => 0.005,
            _ if setting.top_k < 1000 => 0.25,
            _ => 0.,
        };
        assert!(
            beyond <= may_be_off,
            "{what}, {dtype:?}: {:.1} % of the tokens off, by up to {largest:.3e}",
            beyond * 100.
        );
    }
}

#[test]
fn the_cache_reads_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    for selection in [Selection::PerTokenAndHead, Selection::MaxOverHeads, Selection::MaxOverTokens] {
        for (batch, max_blocks, ragged) in [(1, None, false), (2, Some(9), false), (2, None, true), (1, Some(9), true)]
        {
            let what = format!("{selection:?}, batch {batch}, {max_blocks:?} blocks, ragged {ragged}");
            let setting = Setting {
                batch,
                heads: 4,
                kv_heads: 2,
                mem_freq: 7,
                top_k: 3,
                max_blocks,
                selection,
                miss: None,
                ragged,
            };
            check(&what, &setting, &device);
        }
    }
}

/// All blocks are read, so no order of scores matters.
#[test]
fn a_cache_that_reads_everything_is_exact() {
    let Some(device) = gpu() else { return };
    for ragged in [false, true] {
        let setting = Setting {
            batch: 2,
            heads: 2,
            kv_heads: 2,
            mem_freq: 7,
            top_k: 150,
            max_blocks: None,
            selection: Selection::PerTokenAndHead,
            miss: None,
            ragged,
        };
        let text = Text::new(2, 2, 2, 800);
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 4e-2), (DType::F16, 5e-3)] {
            let got = read(&setting, &text.on(dtype, dtype, &device), &CHUNKS, dtype, &device);
            let expected = read(&setting, &text.on(dtype, DType::F64, &CPU), &CHUNKS, DType::F64, &CPU);
            let (beyond, largest) = off(&got, &expected, tolerance);
            assert!(beyond == 0., "ragged {ragged}, {dtype:?}: off by {largest:.3e}");
        }
    }
}

#[test]
fn a_context_miss_token_gates_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    for cutoff in [None, Some(0.02), Some(0.9)] {
        let setting = Setting {
            batch: 2,
            heads: 4,
            kv_heads: 2,
            mem_freq: 7,
            top_k: 2,
            max_blocks: None,
            selection: Selection::PerTokenAndHead,
            miss: Some(ContextMiss { cutoff }),
            ragged: false,
        };
        check(&format!("cutoff {cutoff:?}"), &setting, &device);
    }
}

/// What is read from tiers below a pool has the bits of a cache in memory, however little the pool holds: of blocks in the type that is computed in,
/// or in float32.
#[test]
fn tiers_below_a_pool_have_the_bits_of_a_cache_in_memory() {
    let Some(device) = gpu() else { return };
    let bits = |x: &Tensor| {
        let x = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        x.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    for selection in [Selection::PerTokenAndHead, Selection::MaxOverHeads, Selection::MaxOverTokens] {
        for (batch, max_blocks, ragged, cutoff) in
            [(1, None, false, None), (2, Some(9), false, Some(0.02)), (2, None, true, None), (1, Some(9), true, None)]
        {
            let setting = Setting {
                batch,
                heads: 4,
                kv_heads: 2,
                mem_freq: 7,
                top_k: 3,
                max_blocks,
                selection,
                miss: cutoff.map(|cutoff| ContextMiss { cutoff: Some(cutoff) }),
                ragged,
            };
            let text = Text::new(batch, 4, 2, 800);
            for (dtype, of) in [
                (DType::F32, BlockType::F32),
                (DType::BF16, BlockType::F32),
                (DType::BF16, BlockType::BF16),
                (DType::F16, BlockType::F32),
            ] {
                let text = text.on(dtype, dtype, &device);
                let expected = bits(&read(&setting, &text, &CHUNKS, dtype, &device));
                // Frames: what a token reads; some more; all blocks.
                for frames in [0, 30, 1000] {
                    let what = format!(
                        "{selection:?}, batch {batch}, {max_blocks:?} blocks, ragged {ragged}, {dtype:?} of {of:?}, {frames} frames"
                    );
                    let bytes = frames * 2 * 8 * HEAD_DIM * dtype.size_in_bytes();
                    let pool = PoolTier { device: device.clone(), dtype, bytes };
                    let tiers = Tiers { of, ram: 0, scoring: Scoring::Exact };
                    let mut cache = LandmarkCache::in_tiers_with_pool(setting.config(), rope(), tiers, pool).unwrap();
                    let got = bits(&read_with(&mut cache, &setting, &text, &CHUNKS, &device));
                    assert!(got == expected, "{what}");
                    let (sent, found) = cache.loads();
                    assert!(sent > frames.min(60) as u64 && found > 0, "{what}: {sent} sent, {found} found");
                }
            }
        }
    }
}

/// The same of blocks on disk, in RAM or not, with a session that is left and opened again.
#[test]
fn a_session_with_a_pool_has_the_bits_of_a_cache_in_memory() {
    let Some(device) = gpu() else { return };
    let setting = Setting {
        batch: 1,
        heads: 4,
        kv_heads: 2,
        mem_freq: 7,
        top_k: 3,
        max_blocks: None,
        selection: Selection::PerTokenAndHead,
        miss: None,
        ragged: false,
    };
    for (dtype, block_type) in [(DType::F32, BlockType::F32), (DType::BF16, BlockType::BF16)] {
        let text = Text::new(1, 4, 2, 800).on(dtype, dtype, &device);
        for (ram, frames) in [(0, 0), (0, 30), (5000, 1000), (1 << 20, 0)] {
            let parent = tempfile::tempdir().unwrap();
            let folder = parent.path().join("session");
            let settings = Settings { block_type, disk_limit: None, blocks_per_segment: Some(5) };
            Session::create(&folder, &setting.config(), HEAD_DIM, settings, serde_json::json!({})).unwrap();
            let mut memory = LandmarkCache::new(setting.config(), rope(), dtype, &device).unwrap();
            let mut row = 0;
            for chunks in CHUNKS.chunks(4) {
                let mut session = Session::open(&folder).unwrap();
                let bytes = frames * 2 * 8 * HEAD_DIM * dtype.size_in_bytes();
                let pool = PoolTier { device: device.clone(), dtype, bytes };
                let (mut cache, _) = session.cache_with_pool(setting.config(), rope(), ram, pool).unwrap();
                for &n in chunks {
                    let tokens = Tensor::zeros((1, n), DType::U32, &device).unwrap();
                    let from = row;
                    let mut once = |cache: &mut LandmarkCache| {
                        let out = cache.forward(&tokens, |ids, attention| {
                            row = from + ids.dims()[1];
                            text.run(attention, from, ids.dims()[1])
                        });
                        out.unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
                    };
                    let expected = once(&mut memory);
                    assert_eq!(once(&mut cache), expected, "{dtype:?}, {ram} bytes of RAM, {frames} frames");
                    session.commit(&mut cache, &vec![0; n], &[], None, true).unwrap();
                }
            }
        }
    }
}

#[test]
fn transformer_xl_reads_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    let text = Text::new(2, 4, 2, 400);
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 3e-2), (DType::F16, 4e-3)] {
        let on = |dtype: DType, text: &Text| {
            let mut cache = XlCache::new(1, 40, rope());
            let mut from = 0;
            let outs: Vec<Tensor> = [30, 1, 64, 2, 100]
                .into_iter()
                .map(|n| {
                    from += n;
                    text.run(&mut cache, from - n, n).unwrap_or_else(|error| panic!("{dtype:?}: {error}"))
                })
                .collect();
            Tensor::cat(&outs, 1).unwrap()
        };
        let got = on(dtype, &text.on(dtype, dtype, &device));
        let expected = on(DType::F64, &text.on(dtype, DType::F64, &CPU));
        let (beyond, largest) = off(&got, &expected, tolerance);
        assert!(beyond == 0., "{dtype:?}: off by {largest:.3e}");
    }
}
