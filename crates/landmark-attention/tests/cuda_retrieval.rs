//! Retrieval and decoding on GPUs, against plain loops and the CPU's kernels. Where there is no GPU these tests say so and check nothing.
#![cfg(feature = "cuda")]

#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/numbers.rs"]
mod numbers;

use candle_core::{DType, Device, Tensor};
use gpu::gpu;
use landmark_attention::retrieval::{Blocks, Kept, Retrieved, Selection, SlotQueries, attend, join, select};
use landmark_attention::{LandmarkParams, Landmarks, landmark_attention_with_lse};
use numbers::Numbers;

const SELECTIONS: [Selection; 3] = [Selection::PerTokenAndHead, Selection::MaxOverHeads, Selection::MaxOverTokens];

impl Numbers {
    /// About normal.
    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let mut uniform = || (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        let numbers: Vec<f32> =
            (0..shape.iter().product::<usize>()).map(|_| (uniform() + uniform() + uniform()) * 2.).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    }
}

fn to(x: &Tensor, dtype: DType, device: &Device) -> Tensor {
    x.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn list<T: candle_core::WithDType>(x: &Tensor) -> Vec<T> {
    x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn f64s(x: &Tensor) -> Vec<f64> {
    list(&to(x, DType::F64, &Device::Cpu))
}

/// Operands of a retrieval, in f32 on the CPU.
struct Case {
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    landmarks: Tensor,
    first: usize,
    len: usize,
    newest: usize,
    lengths: Option<Vec<u32>>,
    scale: f64,
}

struct Shape {
    batch: usize,
    kv_heads: usize,
    group: usize,
    time: usize,
    head_dim: usize,
    block: usize,
    len: usize,
    newest: usize,
    slots: usize,
}

impl Case {
    /// Random numbers as `rounded` has them.
    fn random(numbers: &mut Numbers, shape: &Shape, rounded: DType) -> Self {
        let &Shape { batch, kv_heads, group, time, head_dim, block, len, newest, slots } = shape;
        let capacity = len + numbers.below(7);
        let mut tensor =
            |dims: &[usize]| to(&to(&numbers.tensor(dims), rounded, &Device::Cpu), DType::F32, &Device::Cpu);
        let queries = tensor(&[slots, batch, kv_heads * group, time, head_dim]);
        let keys = tensor(&[batch, kv_heads, capacity, block, head_dim]);
        let values = tensor(&[batch, kv_heads, capacity, block, head_dim]);
        let landmarks = keys.narrow(3, block - 1, 1).unwrap().squeeze(3).unwrap().contiguous().unwrap();
        let lengths = (numbers.below(2) == 0).then(|| (0..len).map(|_| 1 + numbers.below(block - 1) as u32).collect());
        let scale = 1. / (head_dim as f64).sqrt();
        Self { queries, keys, values, landmarks, first: numbers.below(capacity), len, newest, lengths, scale }
    }

    /// Runs `f` on the operands in `dtype` on `device`.
    fn on<R>(&self, dtype: DType, device: &Device, f: impl FnOnce(SlotQueries, Blocks) -> R) -> R {
        let [queries, keys, values, landmarks] =
            [&self.queries, &self.keys, &self.values, &self.landmarks].map(|x| to(x, dtype, device));
        let queries = SlotQueries { queries: &queries, newest: self.newest, scale: self.scale };
        let (first, len, lengths) = (self.first, self.len, self.lengths.as_deref());
        let kept = Kept::Ring { keys: &keys, values: &values };
        f(queries, Blocks { kept, landmarks: Some(&landmarks), first, len, lengths })
    }

    fn chosen(&self, k: usize, selection: Selection, dtype: DType, device: &Device) -> Tensor {
        self.on(dtype, device, |queries, blocks| select(queries, blocks, k, selection).unwrap())
    }

    fn retrieved(&self, chosen: &Tensor, dtype: DType, device: &Device) -> Retrieved {
        let chosen = chosen.to_device(device).unwrap();
        self.on(dtype, device, |queries, blocks| attend(queries, blocks, &chosen).unwrap())
    }

    /// What blocks rank by, `[batch * heads * time][len]`, in f64.
    fn ranks(&self, selection: Selection) -> Vec<Vec<f64>> {
        let &[_, batch, heads, time, d] = self.queries.dims() else { unreachable!() };
        let &[_, kv_heads, capacity, _] = self.landmarks.dims() else { unreachable!() };
        let (queries, landmarks) = (list::<f32>(&self.queries), list::<f32>(&self.landmarks));
        let rows = batch * heads * time;
        let mut ranks: Vec<Vec<f64>> = (0..rows)
            .map(|row| {
                let head = row / time;
                let kv = head / heads * kv_heads + head % heads / (heads / kv_heads);
                (0..self.len)
                    .map(|i| {
                        let slot = (i + self.newest + 1).saturating_sub(self.len);
                        let query = &queries[(slot * rows + row) * d..][..d];
                        let key = &landmarks[(kv * capacity + (self.first + i) % capacity) * d..][..d];
                        query.iter().zip(key).map(|(q, k)| *q as f64 * *k as f64).sum::<f64>() * self.scale
                    })
                    .collect()
            })
            .collect();
        if selection == Selection::PerTokenAndHead {
            return ranks;
        }
        for row in &mut ranks {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            row.iter_mut().for_each(|x| *x -= lse);
        }
        let shares = |row: usize| -> Vec<usize> {
            let (b, h, t) = (row / (heads * time), row / time % heads, row % time);
            match selection {
                Selection::MaxOverHeads => (0..heads).map(|h| (b * heads + h) * time + t).collect(),
                _ => (0..time).map(|t| (b * heads + h) * time + t).collect(),
            }
        };
        (0..rows)
            .map(|row| {
                let largest =
                    |i: usize| shares(row).into_iter().map(|row| ranks[row][i]).fold(f64::NEG_INFINITY, f64::max);
                (0..self.len).map(largest).collect()
            })
            .collect()
    }
}

/// The chosen blocks are in order, and none that was left out ranks higher by more than `tolerance`.
fn assert_best(what: &str, ranks: &[Vec<f64>], chosen: &[u32], k: usize, tolerance: f64) {
    assert_eq!(chosen.len(), ranks.len() * k, "{what}");
    for (row, (ranks, chosen)) in ranks.iter().zip(chosen.chunks_exact(k)).enumerate() {
        assert!(chosen.is_sorted_by(|a, b| a < b), "{what}: query {row} chose {chosen:?}");
        assert!((chosen[k - 1] as usize) < ranks.len(), "{what}: query {row} chose {chosen:?} of {}", ranks.len());
        let least = chosen.iter().map(|&i| ranks[i as usize]).fold(f64::INFINITY, f64::min);
        for (i, &rank) in ranks.iter().enumerate() {
            let is_chosen = chosen.contains(&(i as u32));
            assert!(
                is_chosen || rank <= least + tolerance,
                "{what}: query {row} left out block {i} at {rank}, the least of its {chosen:?} is at {least}"
            );
        }
    }
}

fn assert_near(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    let (got, expected) = (f64s(got), f64s(expected));
    assert_eq!(got.len(), expected.len(), "{what}");
    let norm = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
    let first = got.iter().zip(&expected).position(|(a, b)| {
        // Rounding is relative to the element, sums are to what is usual.
        ((a - b).abs() / (b.abs() + norm + 1e-3)).partial_cmp(&tolerance) != Some(std::cmp::Ordering::Less)
    });
    assert!(
        first.is_none(),
        "{what}: off by {off:.3e}, norm {norm:.3e}, first at {first:?} of {}: {:?}, expected {:?}",
        got.len(),
        first.map(|i| &got[i..got.len().min(i + 6)]),
        first.map(|i| &expected[i..expected.len().min(i + 6)]),
    );
}

/// Any shapes, dtypes, rings and lengths: the best blocks are chosen, and attention to them is the CPU's.
#[test]
fn random_shapes() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(11);
    for case in 0..180 {
        let len = numbers.of(&[2, 3, 9, 40, 128, 129, 300, 700, 1500]);
        let k = numbers.of(&[1, 2, 4, 7, 20]);
        let newest = if numbers.below(3) == 0 { 0 } else { k.min(len) };
        let shape = Shape {
            batch: numbers.of(&[1, 1, 2]),
            kv_heads: numbers.of(&[1, 2, 3]),
            group: numbers.of(&[1, 1, 2, 4]),
            time: numbers.of(&[1, 1, 2, 5, 9, 17, 33, 70]),
            head_dim: numbers.of(&[2, 8, 16, 33, 40, 64, 64, 80, 128, 128, 160, 256]),
            block: if len > 300 { numbers.of(&[2, 3]) } else { numbers.of(&[2, 3, 8, 51, 64, 100, 150]) },
            len,
            newest,
            slots: k + 1,
        };
        let (dtype, tolerance) = [(DType::F32, 1e-5), (DType::BF16, 1.5e-2), (DType::F16, 2e-3)][case % 3];
        let operands = Case::random(&mut numbers, &shape, dtype);
        let selection = SELECTIONS[case / 3 % 3];
        let what = format!(
            "case {case}: {selection:?} {k} of {len}, {} x {} ({} kv) x {} x {}, block {}, newest {newest}, first {}, {dtype:?}",
            shape.batch,
            shape.kv_heads * shape.group,
            shape.kv_heads,
            shape.time,
            shape.head_dim,
            shape.block,
            operands.first
        );
        let chosen = operands.chosen(k, selection, dtype, &device);
        let k = k.min(len);
        assert_best(&what, &operands.ranks(selection), &list::<u32>(&chosen), k, 1e-5);
        let got = operands.retrieved(&chosen, dtype, &device);
        let expected = operands.retrieved(&chosen.to_device(&Device::Cpu).unwrap(), DType::F64, &Device::Cpu);
        assert_eq!((got.out.dtype(), got.lse.dtype(), got.scores.dtype()), (dtype, DType::F32, DType::F32));
        assert_near(&format!("{what}: scores"), &got.scores, &expected.scores, 1e-5);
        assert_near(&format!("{what}: lse"), &got.lse, &expected.lse, 1e-5);
        assert_near(&format!("{what}: out"), &got.out, &expected.out, tolerance);
    }
}

/// Numbers whose products are exact: ties are ties on any device, and the CPU's choice is the only right one.
#[test]
fn ties_go_to_the_older_block() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(12);
    for (case, len) in [5usize, 100, 128, 260, 1000, 5000, 20_000].into_iter().enumerate() {
        for k in [1, 3, 4, 30] {
            let (k, time) = (k.min(len - 1), [1, 7, 40][case % 3]);
            let newest = [0, k.min(2)][k % 2];
            let shape =
                Shape { batch: 1, kv_heads: 2, group: 2, time, head_dim: 8, block: 2, len, newest, slots: k + 1 };
            let mut operands = Case::random(&mut numbers, &shape, DType::F32);
            // One of a few landmarks, and small integers as queries; the scale turns base 2 into nothing.
            let kinds = [1, 3, 40][case % 3];
            let whole = |x: &Tensor| (x * 3.).unwrap().round().unwrap();
            let table = whole(&numbers.tensor(&[kinds, 8]));
            let pick: Vec<u32> =
                (0..operands.landmarks.elem_count() / 8).map(|_| numbers.below(kinds) as u32).collect();
            let dims = operands.landmarks.dims().to_vec();
            let pick = Tensor::from_vec(pick, operands.landmarks.elem_count() / 8, &Device::Cpu).unwrap();
            operands.landmarks = table.index_select(&pick, 0).unwrap().reshape(dims).unwrap();
            operands.queries = whole(&operands.queries);
            operands.scale = std::f64::consts::LN_2;
            for dtype in [DType::F32, DType::BF16] {
                let got = operands.chosen(k, Selection::PerTokenAndHead, dtype, &device);
                let expected = operands.chosen(k, Selection::PerTokenAndHead, DType::F32, &Device::Cpu);
                assert_eq!(list::<u32>(&got), list::<u32>(&expected), "{k} of {len}, {kinds} kinds, {dtype:?}");
            }
            if kinds == 1 && newest == 0 {
                for selection in SELECTIONS {
                    let got = list::<u32>(&operands.chosen(k, selection, DType::F32, &device));
                    let oldest: Vec<u32> = (0..k as u32).collect();
                    assert!(got.chunks_exact(k).all(|got| got == oldest), "{selection:?}: {k} of {len} equals");
                }
            }
        }
    }
}

/// Many blocks: more tiles than are chosen, and more scores than are held at once.
#[test]
fn many_blocks() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(13);
    for (selection, kv_heads, time) in [
        (Selection::PerTokenAndHead, 16, 64),
        (Selection::PerTokenAndHead, 2, 1),
        (Selection::MaxOverHeads, 2, 33),
        (Selection::MaxOverTokens, 2, 33),
    ] {
        let (k, len) = (5, 70_000);
        let shape = Shape { batch: 1, kv_heads, group: 1, time, head_dim: 8, block: 2, len, newest: k, slots: k + 1 };
        let operands = Case::random(&mut numbers, &shape, DType::F32);
        let chosen = operands.chosen(k, selection, DType::F32, &device);
        let what = format!("{selection:?}, {kv_heads} heads, {time} tokens");
        assert_best(&what, &operands.ranks(selection), &list::<u32>(&chosen), k, 1e-5);
    }
}

#[test]
fn the_same_bits_in_every_run() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(14);
    let shape =
        Shape { batch: 2, kv_heads: 2, group: 2, time: 50, head_dim: 64, block: 51, len: 400, newest: 4, slots: 5 };
    let operands = Case::random(&mut numbers, &shape, DType::BF16);
    for selection in SELECTIONS {
        let once = || {
            let chosen = operands.chosen(4, selection, DType::BF16, &device);
            let Retrieved { out, lse, scores } = operands.retrieved(&chosen, DType::BF16, &device);
            (list::<u32>(&chosen), [out, lse, scores].map(|x| f64s(&x)))
        };
        let first = once();
        for _ in 0..4 {
            assert!(once() == first, "{selection:?}");
        }
    }
}

/// An index of no cached block gives NaN to its query, and to no other.
#[test]
fn an_index_outside_the_ring_reads_nothing() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(15);
    let shape =
        Shape { batch: 1, kv_heads: 1, group: 1, time: 3, head_dim: 64, block: 51, len: 10, newest: 0, slots: 2 };
    let operands = Case::random(&mut numbers, &shape, DType::F32);
    let chosen = Tensor::new(&[[[[1u32, 4], [2, 10], [0, u32::MAX]]]], &Device::Cpu).unwrap();
    let got = operands.retrieved(&chosen, DType::F32, &device);
    let is_nan: Vec<bool> = list::<f32>(&got.out).chunks_exact(64).map(|row| row.iter().all(|x| x.is_nan())).collect();
    assert_eq!(is_nan, [false, true, true]);
    assert!(list::<f32>(&got.out)[..64].iter().all(|x| x.is_finite()));
    assert_eq!(list::<f32>(&got.lse).iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [false, true, true]);
}

#[test]
fn join_is_the_cpus() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(16);
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 1e-2), (DType::F16, 1e-3)] {
        let [a, b] = [(); 2].map(|()| to(&numbers.tensor(&[2, 3, 5, 40]), dtype, &Device::Cpu));
        let [a_lse, b_lse] = [(); 2].map(|()| (numbers.tensor(&[2, 3, 5]) * 4.).unwrap());
        // Queries with nothing on one side or both.
        let hole = Tensor::new(&[0f32, f32::NEG_INFINITY, 0., f32::NEG_INFINITY, 0.], &Device::Cpu).unwrap();
        let both = Tensor::new(&[0f32, 0., 0., f32::NEG_INFINITY, 0.], &Device::Cpu).unwrap();
        let (a_lse, b_lse) = (a_lse.broadcast_add(&hole).unwrap(), b_lse.broadcast_add(&both).unwrap());
        let on = |dtype: DType, device: &Device| {
            let lse = |x: &Tensor| to(x, if dtype == DType::F64 { dtype } else { DType::F32 }, device);
            join((&to(&a, dtype, device), &lse(&a_lse)), (&to(&b, dtype, device), &lse(&b_lse))).unwrap()
        };
        let (got, expected) = (on(dtype, &device), on(DType::F64, &Device::Cpu));
        assert_near("out", &got.0, &expected.0, tolerance);
        let (got, expected) = (f64s(&got.1), f64s(&expected.1));
        assert!(got.iter().zip(&expected).all(|(a, b)| a == b || (a - b).abs() < 1e-5), "{got:?} {expected:?}");
    }
}

#[test]
fn what_a_gpu_does_not_take_is_refused() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(17);
    let shape = |head_dim| Shape {
        batch: 1,
        kv_heads: 1,
        group: 1,
        time: 1,
        head_dim,
        block: 2,
        len: 9000,
        newest: 0,
        slots: 1,
    };
    let case = Case::random(&mut numbers, &shape(2), DType::F32);
    let error = |case: &Case, dtype, k| {
        case.on(dtype, &device, |queries, blocks| {
            select(queries, blocks, k, Selection::default()).unwrap_err().to_string()
        })
    };
    assert_eq!(error(&case, DType::F32, 8193), "select: k is 8193, expected at most 8192 on a GPU");
    assert_eq!(
        error(&case, DType::F64, 1),
        "select: queries has dtype F64, expected f32, bf16 or f16 on a GPU, the same for all"
    );
    assert_eq!(case.chosen(8192, Selection::default(), DType::F32, &device).dims(), [1, 1, 1, 8192]);
    let wide = Case::random(&mut numbers, &Shape { len: 3, ..shape(257) }, DType::F32);
    assert!(error(&wide, DType::F32, 1).contains("a head_dim of at most 256 on a GPU"));
}

/// Few queries over many keys: the keys are shared out, and the parts joined.
#[test]
fn decode_equals_the_cpus_operation() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(18);
    let mask = |numbers: &mut Numbers, batch: usize, kv_len: usize, one_in: usize| {
        let mask: Vec<u8> = (0..batch * kv_len).map(|_| (numbers.below(one_in) == 0) as u8).collect();
        Landmarks::Mask(Tensor::from_vec(mask, (batch, kv_len), &Device::Cpu).unwrap())
    };
    for (q_len, kv_len, head_dim) in [(1, 4000, 64), (1, 700, 128), (3, 2600, 40), (1, 3000, 256), (40, 3000, 64)] {
        for kind in 0..7 {
            let batch = 1 + kind % 2;
            let landmarks = match kind {
                0 => Landmarks::None,
                1 => Landmarks::Every(51),
                2 => Landmarks::Every(64),
                3 => Landmarks::Every(500),
                4 => Landmarks::Every(2),
                5 => mask(&mut numbers, batch, kv_len, 60),
                _ => mask(&mut numbers, batch, kv_len, 400),
            };
            let params = LandmarkParams::new(landmarks);
            let (q, kv) = ([batch, 4, q_len, head_dim], [batch, 2, kv_len, head_dim]);
            let tensors = [numbers.tensor(&q), numbers.tensor(&kv), numbers.tensor(&kv)];
            for (dtype, tolerance) in [(DType::F32, 5e-5), (DType::BF16, 4e-2), (DType::F16, 6e-3)] {
                let rounded = tensors.each_ref().map(|x| to(x, dtype, &Device::Cpu));
                let on = |dtype: DType, device: &Device| {
                    let [q, k, v] = rounded.each_ref().map(|x| to(x, dtype, device));
                    landmark_attention_with_lse(&q, &k, &v, &params).unwrap()
                };
                let (got, expected) = (on(dtype, &device), on(DType::F64, &Device::Cpu));
                let what = format!("{q_len} of {kv_len} x {head_dim}, landmarks of kind {kind}, {dtype:?}");
                assert_near(&format!("{what}: out"), &got.0, &expected.0, tolerance);
                assert_near(&format!("{what}: lse"), &got.1, &expected.1, 2e-5);
                let again = on(dtype, &device);
                assert!(f64s(&again.0) == f64s(&got.0) && f64s(&again.1) == f64s(&got.1), "{what}: other bits");
            }
        }
    }
}
