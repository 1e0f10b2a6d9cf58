//! Landmarks of other texts among those that a query chooses from in training.
//!
//! A window has a handful of blocks, a long text has thousands, and a score that is good enough among the former is lost among the latter. So
//! some rows of a batch lend the keys of their landmarks, and the queries of others see them in their outer softmax: with no value, from
//! where the [cache](https://arxiv.org/abs/2305.16300) puts far blocks. What they take is missing elsewhere, and the loss teaches
//! the queries to score them lower. Inference does not change.
//!
//! In a cache of more than `k` blocks, a landmark that is not among the newest `k` is scored in slot 0, at position `L - 1`, by a query whose
//! chunk begins at `(k + 1) L`: for offset `t` in its own block, the `c`-th of the chunk, the distance is `k L + 1 + t + c L`. Here `c` is
//! random for each row.

use candle_core::Tensor;
use landmark_attention::outside::log_sum_exp;
use landmark_attention::{Rope, Rotation};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use std::ops::Range;

use super::attention::below;
use crate::ops::mix64;
use crate::{Error, Result};

/// Which rows lend the keys of their landmarks, and which see them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NegativeRows {
    /// The rows that lend, the last ones of a batch; they are no exercises.
    pub negative_rows: usize,
    /// The share of the other rows that see these keys, of exercises and plain text alike; above 0 and at most 1.
    pub negative_share: f64,
    /// The number of blocks that a query is to retrieve in inference, `k`: it decides from where keys are seen.
    pub negative_top_k: usize,
}

impl NegativeRows {
    /// Refuses what cannot be, in batches of `batch_size` rows of `window` positions, a landmark after every `mem_freq` tokens; the first rows
    /// are `exercises`.
    pub fn check(&self, window: usize, mem_freq: Option<usize>, batch_size: usize, exercises: usize) -> Result<()> {
        let wrong =
            |field, got: String, expected: &str| Err(Error::Config { field, got, expected: expected.to_string() });
        let &Self { negative_rows, negative_share, negative_top_k } = self;
        // Somebody must be left to see them.
        let plain = batch_size.saturating_sub(exercises).min(batch_size - 1);
        if !(1..=plain).contains(&negative_rows) {
            let expected =
                format!("at least 1, and at most the {plain} rows that are no exercises and not the only ones");
            return wrong("negative_rows", negative_rows.to_string(), &expected);
        }
        if !(negative_share > 0. && negative_share <= 1.) {
            return wrong("negative_share", negative_share.to_string(), "a share above 0 and at most 1");
        }
        if self.seeing(batch_size, exercises).is_empty() {
            return wrong("negative_share", negative_share.to_string(), "a share that is half a row at least");
        }
        let Some(mem_freq) = mem_freq else {
            return wrong("negative_rows", negative_rows.to_string(), "none, since there are no landmarks");
        };
        let blocks = window / (mem_freq + 1);
        if negative_top_k == 0 || blocks < negative_top_k.saturating_add(2) {
            let expected = format!("at least 1, and at most the {blocks} blocks of a window less 2");
            return wrong("negative_top_k", negative_top_k.to_string(), &expected);
        }
        Ok(())
    }

    /// The rows that see: the last of the exercises and the first of the others, so that they are neighbours.
    fn seeing(&self, rows: usize, exercises: usize) -> Range<usize> {
        let others = rows - exercises - self.negative_rows;
        let share = |rows: usize| (self.negative_share * rows as f64).round() as usize;
        exercises - share(exercises)..exercises + share(others)
    }
}

/// What decides from where keys are seen.
#[derive(Debug)]
pub(crate) struct Distances {
    /// The rotary embedding.
    pub rope: Rope,
    /// Positions of a window.
    pub window: usize,
    /// Ordinary tokens of a block.
    pub mem_freq: Option<usize>,
}

/// The rows of one batch, and from where they are seen.
#[derive(Debug, Clone)]
pub(super) struct Negatives {
    seeing: Range<usize>,
    lending: Range<usize>,
    /// Places of the landmarks among the positions of all lending rows.
    places: Vec<u32>,
    /// The queries' positions, from that of a landmark in slot 0.
    queries: Rotation,
    /// `-c L`, for each `c`, at every key.
    keys: Rotation,
    /// The `c` of each seeing row.
    chunk_blocks: Vec<u32>,
    distances: usize,
}

impl Negatives {
    /// For a batch whose first rows are `exercises`. `None` where no row has a landmark to lend.
    pub fn new(
        options: &NegativeRows,
        of: &Distances,
        is_landmark: &[u8],
        time: usize,
        exercises: usize,
        seed: u64,
    ) -> Result<Option<Self>> {
        let rows = is_landmark.len() / time;
        options.check(of.window, of.mem_freq, rows, exercises)?;
        let (seeing, lending) = (options.seeing(rows, exercises), rows - options.negative_rows..rows);
        let lent = &is_landmark[lending.start * time..];
        let places: Vec<u32> = (0..lent.len() as u32).filter(|&place| lent[place as usize] != 0).collect();
        if places.is_empty() {
            return Ok(None);
        }
        let block = of.mem_freq.map_or(0, |mem_freq| mem_freq + 1) as i64;
        let k = options.negative_top_k;
        let distances = of.window / block as usize - k - 1;
        let mut rng = ChaCha8Rng::seed_from_u64(mix64(seed ^ NEGATIVES));
        let chunk_blocks = seeing.clone().map(|_| below(&mut rng, distances as u64) as u32).collect();
        let keys: Vec<i64> =
            (0..distances as i64).flat_map(|c| std::iter::repeat_n(-c * block, places.len())).collect();
        let queries = offsets(&is_landmark[seeing.start * time..seeing.end * time], time);
        let queries: Vec<i64> = queries.into_iter().map(|offset| k as i64 * block + 1 + offset).collect();
        let (queries, keys) = (of.rope.at(&queries), of.rope.at(&keys));
        Ok(Some(Self { seeing, lending, places, queries, keys, chunk_blocks, distances }))
    }

    /// The log-sum-exp of each query's scores for the lent keys, `[B, H, T]` in f32 (f64 for f64), minus infinity for rows that do not see
    /// them. `q` `[B, H, T, D]` and `k` `[B, kv_heads, T, D]` are before rotation.
    pub fn outside(&self, q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
        let (batch, heads, time, dim) = q.dims4()?;
        let (device, kv_heads) = (q.device(), k.dim(1)?);
        let (lent, seeing, n) = (self.lending.len(), self.seeing.len(), self.places.len());
        let places = Tensor::from_slice(&self.places, n, device)?;
        let keys = k.narrow(0, self.lending.start, lent)?.transpose(0, 1)?.contiguous()?;
        let keys = keys.reshape((kv_heads, lent * time, dim))?.index_select(&places, 1)?;
        let keys = keys.unsqueeze(0)?.broadcast_as((self.distances, kv_heads, n, dim))?.contiguous()?;
        let chunk_blocks = Tensor::from_slice(&self.chunk_blocks, seeing, device)?;
        let keys = self.keys.apply(&keys)?.index_select(&chunk_blocks, 0)?;
        let queries = self.queries.apply(&q.narrow(0, self.seeing.start, seeing)?)?;
        // Queries that share a head of keys, one after the other.
        let queries = queries.contiguous()?.reshape((seeing, kv_heads, heads / kv_heads * time, dim))?;
        let lse = log_sum_exp(&queries.matmul(&keys.t()?)?, scale)?.reshape((seeing, heads, time))?;
        let unseen = |rows: usize| -> Result<Option<Tensor>> {
            let none = Tensor::full(f32::NEG_INFINITY, (rows.max(1), heads, time), device)?.to_dtype(lse.dtype())?;
            Ok((rows > 0).then_some(none))
        };
        let (before, after) = (unseen(self.seeing.start)?, unseen(batch - self.seeing.end)?);
        let rows: Vec<&Tensor> = before.iter().chain([&lse]).chain(&after).collect();
        Ok(Tensor::cat(&rows, 0)?)
    }
}

/// The offset of each position in its own block, row by row: `[T]` if all rows are alike.
fn offsets(is_landmark: &[u8], time: usize) -> Vec<i64> {
    let mut offsets = Vec::with_capacity(is_landmark.len());
    for row in is_landmark.chunks(time) {
        let mut offset = 0;
        for &is_landmark in row {
            offsets.push(offset);
            offset = if is_landmark != 0 { 0 } else { offset + 1 };
        }
    }
    if offsets.chunks(time).all(|row| *row == offsets[..time]) {
        offsets.truncate(time);
    }
    offsets
}

/// Tells the draw from others of one seed.
const NEGATIVES: u64 = 0x6e65_6761;

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{D, DType, Device, Var};

    const BLOCK: usize = 5;

    fn distances() -> Distances {
        let rope = Rope::new(8, 10_000., landmark_attention::Pairs::Interleaved);
        Distances { rope, window: 6 * BLOCK, mem_freq: Some(BLOCK - 1) }
    }

    const OPTIONS: NegativeRows = NegativeRows { negative_rows: 2, negative_share: 0.5, negative_top_k: 2 };
    const ROWS: usize = 8;
    const EXERCISES: usize = 4;

    fn negatives(is_landmark: &[u8], seed: u64) -> Negatives {
        Negatives::new(&OPTIONS, &distances(), is_landmark, 6 * BLOCK, EXERCISES, seed).unwrap().unwrap()
    }

    fn regular() -> Vec<u8> {
        (0..ROWS * 6 * BLOCK).map(|i| (i % BLOCK == BLOCK - 1) as u8).collect()
    }

    fn tensor(seed: u64) -> Tensor {
        let shape = (ROWS, 2, 6 * BLOCK, 8);
        let n = shape.0 * shape.1 * shape.2 * shape.3;
        let x: Vec<f64> = (0..n as u64).map(|i| (mix64(seed ^ i) >> 11) as f64 / (1u64 << 52) as f64 - 1.).collect();
        Tensor::from_vec(x, shape, &Device::Cpu).unwrap()
    }

    /// One query and one key at a time, at their distance.
    #[test]
    fn keys_are_seen_from_slot_0() {
        let mut ragged = regular();
        ragged[7 * 6 * BLOCK + 7] = 1;
        ragged[3 * 6 * BLOCK + 2] = 1;
        for is_landmark in [regular(), ragged] {
            let negatives = negatives(&is_landmark, 9);
            let (q, k) = (tensor(1), tensor(2));
            let outside = negatives.outside(&q, &k, 0.4).unwrap();
            assert_eq!(negatives.seeing, 2..5);
            let (rope, time) = (distances().rope, 6 * BLOCK);
            let row = |x: &Tensor, b: usize, h: usize, t: usize, position: i64| -> Vec<f64> {
                let x = x.narrow(0, b, 1).unwrap().narrow(1, h, 1).unwrap().narrow(2, t, 1).unwrap();
                rope.at(&[position]).apply(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap()
            };
            for (b, h, t) in [(2, 0, 0), (3, 1, 4), (4, 1, 29), (3, 0, 17), (3, 0, 3), (0, 0, 5), (6, 1, 9)] {
                let got: f64 = outside.get(b).unwrap().get(h).unwrap().get(t).unwrap().to_scalar().unwrap();
                if !(2..5).contains(&b) {
                    assert_eq!(got, f64::NEG_INFINITY);
                    continue;
                }
                let own = &is_landmark[b * time..][..t];
                let offset = t - own.iter().rposition(|&l| l != 0).map_or(0, |last| last + 1);
                let c = negatives.chunk_blocks[b - 2] as usize;
                assert!(c < 3);
                let query = row(&q, b, h, t, (3 * BLOCK + c * BLOCK + offset) as i64);
                let mut sum = 0.;
                for place in (6 * time..8 * time).filter(|&place| is_landmark[place] != 0) {
                    let key = row(&k, place / time, h, place % time, BLOCK as i64 - 1);
                    sum += (0.4 * query.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>()).exp();
                }
                assert!((got - sum.ln()).abs() < 1e-9, "{b} {h} {t}: {got} {}", sum.ln());
            }
        }
    }

    #[test]
    fn gradients_reach_queries_that_see_and_landmarks_that_lend() {
        let (q, k) = (Var::from_tensor(&tensor(1)).unwrap(), Var::from_tensor(&tensor(2)).unwrap());
        let outside = negatives(&regular(), 9).outside(&q, &k, 0.4).unwrap();
        let loss = outside.narrow(0, 2, 3).unwrap().sqr().unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let size = |x: &Tensor| -> Vec<f64> {
            x.sqr().unwrap().sum(D::Minus1).unwrap().sum(1).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        for (place, size) in size(grads.get(&q).unwrap()).into_iter().enumerate() {
            assert_eq!(size > 0., (2..5).contains(&(place / (6 * BLOCK))), "query {place}");
        }
        for (place, size) in size(grads.get(&k).unwrap()).into_iter().enumerate() {
            assert_eq!(size > 0., place >= 6 * 6 * BLOCK && place % BLOCK == BLOCK - 1, "key {place}");
        }
        assert_eq!(outside.dtype(), DType::F64);
    }

    #[test]
    fn without_exercises_the_first_rows_see() {
        let negatives = Negatives::new(&OPTIONS, &distances(), &regular(), 6 * BLOCK, 0, 9).unwrap().unwrap();
        assert_eq!((&negatives.seeing, &negatives.lending), (&(0..3), &(6..8)));
        let outside = negatives.outside(&tensor(1), &tensor(2), 0.4).unwrap().max(D::Minus1).unwrap().max(1).unwrap();
        let seen: Vec<bool> = outside.to_vec1::<f64>().unwrap().into_iter().map(f64::is_finite).collect();
        assert_eq!(seen, [true, true, true, false, false, false, false, false]);
    }

    #[test]
    fn the_seed_alone_decides() {
        let drawn = |seed| negatives(&regular(), seed).chunk_blocks;
        assert_eq!(drawn(1), drawn(1));
        assert!((0..20).any(|seed| drawn(seed) != drawn(1)));
        let none = vec![0; ROWS * 6 * BLOCK];
        assert!(Negatives::new(&OPTIONS, &distances(), &none, 6 * BLOCK, EXERCISES, 1).unwrap().is_none());
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let check = |options: NegativeRows, mem_freq, expected: &str| {
            let error = options.check(6 * BLOCK, mem_freq, ROWS, EXERCISES).unwrap_err();
            assert!(matches!(error, Error::Config { field, .. } if field == expected), "{error}");
        };
        let mem_freq = Some(BLOCK - 1);
        OPTIONS.check(6 * BLOCK, mem_freq, ROWS, EXERCISES).unwrap();
        check(NegativeRows { negative_rows: 5, ..OPTIONS }, mem_freq, "negative_rows");
        check(NegativeRows { negative_rows: 0, ..OPTIONS }, mem_freq, "negative_rows");
        let all = NegativeRows { negative_rows: ROWS, ..OPTIONS }.check(6 * BLOCK, mem_freq, ROWS, 0).unwrap_err();
        assert!(matches!(all, Error::Config { field: "negative_rows", .. }), "{all}");
        check(NegativeRows { negative_share: 1.5, ..OPTIONS }, mem_freq, "negative_share");
        check(NegativeRows { negative_share: 0.01, ..OPTIONS }, mem_freq, "negative_share");
        check(NegativeRows { negative_top_k: 5, ..OPTIONS }, mem_freq, "negative_top_k");
        check(OPTIONS, None, "negative_rows");
    }

    /// Query head h sees the keys of head h / 2, as when each key head is there twice.
    #[test]
    fn heads_that_share_keys_see_what_they_share() {
        let (q, k) = (tensor(1), tensor(2).narrow(1, 0, 1).unwrap());
        let twice = Tensor::cat(&[&k, &k], 1).unwrap();
        let outside = |k: &Tensor| {
            let outside = negatives(&regular(), 9).outside(&q, k, 0.4).unwrap().narrow(0, 2, 3).unwrap();
            outside.flatten_all().unwrap().to_vec1::<f64>().unwrap()
        };
        for (shared, apart) in outside(&k).into_iter().zip(outside(&twice)) {
            assert!((shared - apart).abs() < 1e-12);
        }
    }

    /// Log-sum-exps and the gradients of queries and keys.
    #[cfg(feature = "cuda")]
    fn on(device: &Device, dtype: DType) -> Vec<f64> {
        let input = |seed| {
            let x = tensor(seed).to_dtype(DType::BF16).unwrap().to_dtype(dtype).unwrap();
            Var::from_tensor(&x.to_device(device).unwrap()).unwrap()
        };
        let (q, k) = (input(1), input(2));
        let outside = negatives(&regular(), 9).outside(&q, &k, 0.4).unwrap();
        let loss = outside.narrow(0, 2, 3).unwrap().sqr().unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let all = [outside.narrow(0, 2, 3).unwrap(), grads.get(&q).unwrap().clone(), grads.get(&k).unwrap().clone()];
        let numbers = |x: &Tensor| x.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        all.iter().flat_map(numbers).map(f64::from).collect()
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn negatives_on_a_gpu_are_those_of_the_cpu() {
        let Ok(device) = Device::new_cuda(0) else {
            eprintln!("skipped: no GPU here");
            return;
        };
        let expected = on(&Device::Cpu, DType::F32);
        for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::BF16, 0.15)] {
            let off = on(&device, dtype).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
            println!("{dtype:?}: off by {off:e}");
            assert!(off < tolerance, "{dtype:?}: off by {off:e}");
        }
    }
}
