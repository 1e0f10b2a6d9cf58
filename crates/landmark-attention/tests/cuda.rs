//! The kernels for GPUs: the authors' numbers, and the reference on shapes that nobody chose. Where there is no GPU these tests say so
//! and check nothing.
#![cfg(feature = "cuda")]

#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/numbers.rs"]
mod numbers;

use candle_core::{DType, Device, Tensor, Var};
use gpu::gpu;
use landmark_attention::{
    Dropout, LandmarkParams, Landmarks, Softmax, landmark_attention, landmark_attention_backward,
    landmark_attention_with_lse, reference,
};
use numbers::Numbers;

impl Numbers {
    /// About normal: a sum of four uniform numbers.
    fn tensor(&mut self, shape: (usize, usize, usize, usize)) -> Tensor {
        let mut uniform = || (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        let numbers: Vec<f32> = (0..shape.0 * shape.1 * shape.2 * shape.3)
            .map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.7)
            .collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    }
}

type Op = fn(&Tensor, &Tensor, &Tensor, &LandmarkParams) -> landmark_attention::Result<Tensor>;

/// Output, dq, dk, dv, in f64 on the CPU. `dtype` is what is computed in, of inputs that are rounded to `rounded` first.
fn run(
    op: Op,
    tensors: &[Tensor; 4],
    params: &LandmarkParams,
    rounded: DType,
    dtype: DType,
    device: &Device,
) -> [Tensor; 4] {
    let input = |x: &Tensor| x.to_dtype(rounded).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap();
    let var = |x: &Tensor| Var::from_tensor(&input(x)).unwrap();
    let (q, k, v) = (var(&tensors[0]), var(&tensors[1]), var(&tensors[2]));
    let out = op(&q, &k, &v, params).unwrap();
    let grads = (&out * input(&tensors[3])).unwrap().sum_all().unwrap().backward().unwrap();
    [out.clone(), grads.get(&q).unwrap().clone(), grads.get(&k).unwrap().clone(), grads.get(&v).unwrap().clone()]
        .map(|x| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap())
}

fn norm(x: &Tensor) -> f64 {
    x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

fn assert_near(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    let (off, size) = (norm(&(got - expected).unwrap()), norm(expected));
    // Differences of equal numbers (gradients of a softmax of one) have a size of rounding errors.
    let near = off <= tolerance * size.max(0.1 * (expected.elem_count() as f64).sqrt());
    assert!(near, "{what}: off by {off:e} of {size:e}, more than {tolerance:e}");
}

const TYPES: [(DType, f64); 3] = [(DType::F32, 1e-4), (DType::F16, 4e-3), (DType::BF16, 2e-2)];

fn check(what: &str, tensors: &[Tensor; 4], params: &LandmarkParams, device: &Device) {
    for (dtype, tolerance) in TYPES {
        let expected = run(reference::landmark_attention, tensors, params, dtype, DType::F64, &Device::Cpu);
        let got = run(landmark_attention, tensors, params, dtype, dtype, device);
        for ((got, expected), name) in got.iter().zip(&expected).zip(["out", "dq", "dk", "dv"]) {
            assert_near(&format!("{what} {dtype:?} {name}"), got, expected, tolerance);
        }
    }
}

#[test]
fn golden_cases() {
    let Some(device) = gpu() else { return };
    let dir = std::env::var("LANDMARK_GOLDEN_DIR")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").to_string());
    let mut cases = 0;
    for entry in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{dir}: {e}")) {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("op_") {
            continue;
        }
        let golden = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let tensors = ["q", "k", "v", "dout"].map(|name| golden[name].clone());
        let params = LandmarkParams::new(Landmarks::Mask(golden["is_landmark"].clone()));
        for (dtype, tolerance) in TYPES {
            let got = run(landmark_attention, &tensors, &params, dtype, dtype, &device);
            for (got, part) in got.iter().zip(["out", "dq", "dk", "dv"]) {
                let expected = golden[part].to_dtype(DType::F64).unwrap();
                assert_near(&format!("{name} {dtype:?} {part}"), got, &expected, tolerance);
            }
        }
        cases += 1;
    }
    assert!(cases > 0, "{dir}: no golden cases");
}

/// Every size of block that has a way of its own through the kernels.
#[test]
fn blocks() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(1);
    for block in [2, 16, 48, 49, 50, 51, 56, 57, 63, 64, 65, 100, 128, 500, 4096] {
        let kv_len = if block == 4096 { 4400 } else { 3 * block.max(70) + 11 };
        for (head_dim, history) in [(128, 0), (64, 37)] {
            let q_len = (kv_len - history).min(300);
            let q = |n: &mut Numbers| n.tensor((1, 2, q_len, head_dim));
            let kv = |n: &mut Numbers| n.tensor((1, 1, kv_len, head_dim));
            let tensors = [q(&mut numbers), kv(&mut numbers), kv(&mut numbers), q(&mut numbers)];
            let params = LandmarkParams::new(Landmarks::Every(block));
            check(&format!("block {block} head_dim {head_dim}"), &tensors, &params, &device);
        }
    }
}

/// A landmark that follows a landmark closes a block of nothing.
#[test]
fn landmarks_side_by_side() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(6);
    for landmarks in [vec![49, 50, 100, 101, 102, 160, 200, 201, 260, 300], vec![3, 4, 90, 91, 300, 301]] {
        let mask: Vec<u8> = (0..420).map(|j| landmarks.contains(&j) as u8).collect();
        let params = LandmarkParams::new(Landmarks::Mask(Tensor::from_vec(mask, (1, 420), &Device::Cpu).unwrap()));
        let (q, kv) = ((1, 2, 420, 64), (1, 1, 420, 64));
        let tensors = [numbers.tensor(q), numbers.tensor(kv), numbers.tensor(kv), numbers.tensor(q)];
        check(&format!("landmarks {landmarks:?}"), &tensors, &params, &device);
    }
}

#[test]
fn random_shapes() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(2);
    for case in 0..300 {
        let batch = numbers.of(&[1, 1, 2, 3]);
        let kv_heads = numbers.of(&[1, 2]);
        let heads = kv_heads * numbers.of(&[1, 1, 2, 3]);
        let head_dim = numbers.of(&[8, 32, 33, 40, 64, 64, 64, 80, 96, 128, 128, 128, 160, 256]);
        let kv_len: usize = numbers.of(&[1, 7, 64, 65, 100, 128, 130, 200, 256, 300]);
        let q_len = numbers.of(&[kv_len, kv_len, kv_len, 1, kv_len.div_ceil(2), kv_len - kv_len / 9]);
        let landmarks = match numbers.below(10) {
            0 => Landmarks::None,
            1..6 => Landmarks::Every(numbers.of(&[2, 3, 8, 16, 50, 51, 63, 64, 65, 100])),
            _ => {
                let one_in = numbers.of(&[2, 10, 50, 100]);
                let mask: Vec<u8> = (0..batch * kv_len).map(|_| (numbers.below(one_in) == 0) as u8).collect();
                Landmarks::Mask(Tensor::from_vec(mask, (batch, kv_len), &Device::Cpu).unwrap())
            }
        };
        let softmax =
            numbers.of(&[Softmax::Grouped, Softmax::Grouped, Softmax::Grouped, Softmax::NoMem, Softmax::IgnoreMem]);
        let scale = numbers.of(&[None, None, None, Some(0.3), Some(-0.2)]);
        let what = format!(
            "case {case}: {batch} x {heads} ({kv_heads}) x {q_len} of {kv_len} x {head_dim}, {softmax:?}, scale {scale:?}"
        );
        let params = LandmarkParams { softmax, scale, ..LandmarkParams::new(landmarks) };
        let q = (batch, heads, q_len, head_dim);
        let kv = (batch, kv_heads, kv_len, head_dim);
        let tensors = [numbers.tensor(q), numbers.tensor(kv), numbers.tensor(kv), numbers.tensor(q)];
        let (dtype, tolerance) = TYPES[case % 3];
        let expected = run(reference::landmark_attention, &tensors, &params, dtype, DType::F64, &Device::Cpu);
        let got = run(landmark_attention, &tensors, &params, dtype, dtype, &device);
        for ((got, expected), name) in got.iter().zip(&expected).zip(["out", "dq", "dk", "dv"]) {
            assert_near(&format!("{what} {dtype:?} {name}"), got, expected, tolerance);
        }
    }
}

/// Strided inputs, as a model's projections are, and the log-sum-exps, which are the CPU's.
#[test]
fn strides_and_log_sum_exps() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(3);
    let qkv = numbers.tensor((2, 300, 3, 4 * 64)).reshape((2, 300, 3 * 4, 64)).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let qkv = qkv.to_dtype(dtype).unwrap();
        let on = |device: &Device| {
            let qkv = qkv.to_device(device).unwrap();
            let part = |i: usize| qkv.narrow(2, 4 * i, 4).unwrap().transpose(1, 2).unwrap();
            let params = LandmarkParams::new(Landmarks::Every(51));
            let (out, lse) = landmark_attention_with_lse(&part(0), &part(1), &part(2), &params).unwrap();
            [out, lse].map(|x| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap())
        };
        let (got, expected) = (on(&device), on(&Device::Cpu));
        assert_near("out", &got[0], &expected[0], if dtype == DType::F32 { 1e-5 } else { 5e-3 });
        assert_near("lse", &got[1], &expected[1], 1e-5);
    }
}

#[test]
fn the_same_bits_in_every_run() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(4);
    for (block, dtype) in [(51, DType::BF16), (64, DType::F16), (20, DType::BF16), (500, DType::BF16), (51, DType::F32)]
    {
        let (q, kv) = ((2, 4, 1100, 128), (2, 2, 1100, 128));
        let tensors = [numbers.tensor(q), numbers.tensor(kv), numbers.tensor(kv), numbers.tensor(q)];
        let params = LandmarkParams::new(Landmarks::Every(block));
        let once = || run(landmark_attention, &tensors, &params, dtype, dtype, &device);
        let first = once();
        for _ in 0..5 {
            for (a, b) in first.iter().zip(&once()) {
                assert_eq!(norm(&(a - b).unwrap()), 0., "block {block} {dtype:?}");
            }
        }
    }
}

/// Without candle's graph the gradients are the graph's, bit for bit.
#[test]
fn gradients_without_a_graph() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(6);
    for (block, dtype) in [(51, DType::BF16), (64, DType::F16), (500, DType::BF16), (20, DType::F32)] {
        let (q, kv) = ((2, 4, 1100, 128), (2, 2, 1100, 128));
        let tensors = [numbers.tensor(q), numbers.tensor(kv), numbers.tensor(kv), numbers.tensor(q)];
        let params = LandmarkParams::new(Landmarks::Every(block));
        let [_, graph @ ..] = run(landmark_attention, &tensors, &params, dtype, dtype, &device);
        let [q, k, v, dout] = tensors.map(|x| x.to_dtype(dtype).unwrap().to_device(&device).unwrap());
        let (out, lse) = landmark_attention_with_lse(&q, &k, &v, &params).unwrap();
        let direct = landmark_attention_backward([&q, &k, &v], &params, &out, &lse, &dout).unwrap();
        for (direct, graph) in direct.iter().zip(&graph) {
            let direct = direct.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
            assert_eq!(norm(&(direct - graph).unwrap()), 0., "block {block} {dtype:?}");
        }
    }
}

/// A GPU drops what the CPU drops.
#[test]
fn dropout() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(6);
    for (block, head_dim, q_len, kv_len) in
        [(5, 64, 90, 97), (51, 128, 200, 200), (64, 64, 130, 300), (100, 64, 300, 300), (51, 64, 1, 900)]
    {
        let q = |n: &mut Numbers| n.tensor((2, 4, q_len, head_dim));
        let kv = |n: &mut Numbers| n.tensor((2, 2, kv_len, head_dim));
        let tensors = [q(&mut numbers), kv(&mut numbers), kv(&mut numbers), q(&mut numbers)];
        for (weights, groups) in [(0.3, 0.), (0., 0.4), (0.2, 0.3)] {
            let dropout = Some(Dropout { weights, groups, seed: 1 << 40 | 9 });
            let params = LandmarkParams { dropout, ..LandmarkParams::new(Landmarks::Every(block)) };
            for (dtype, tolerance) in TYPES {
                let expected = run(landmark_attention, &tensors, &params, dtype, DType::F64, &Device::Cpu);
                let got = run(landmark_attention, &tensors, &params, dtype, dtype, &device);
                for ((got, expected), name) in got.iter().zip(&expected).zip(["out", "dq", "dk", "dv"]) {
                    assert_near(
                        &format!("block {block} {weights} {groups} {dtype:?} {name}"),
                        got,
                        expected,
                        tolerance,
                    );
                }
            }
        }
    }
}

/// A landmark that opens the text has nothing to attend to: zeros, and no gradient, never NaN.
#[test]
fn a_query_without_candidates_gets_zeros() {
    let Some(device) = gpu() else { return };
    let mut numbers = Numbers(5);
    let tensors = [(); 4].map(|()| numbers.tensor((1, 1, 6, 64)));
    let params = LandmarkParams::new(Landmarks::Mask(Tensor::new(&[[1u8, 1, 0, 0, 1, 0]], &Device::Cpu).unwrap()));
    for (dtype, _) in TYPES {
        let [out, dq, dk, dv] = run(landmark_attention, &tensors, &params, dtype, dtype, &device);
        assert_eq!(norm(&out.narrow(2, 0, 1).unwrap()), 0.);
        assert!([out, dq, dk, dv].iter().all(|x| norm(x).is_finite()));
    }
}

#[test]
fn what_only_the_cpu_does_is_refused() {
    let Some(device) = gpu() else { return };
    let x = |head_dim: usize, dtype| Tensor::zeros((1, 1, 4, head_dim), dtype, &device).unwrap();
    let params = LandmarkParams::new(Landmarks::None);
    let error = |x: &Tensor, params: &LandmarkParams| landmark_attention(x, x, x, params).unwrap_err().to_string();
    assert!(error(&x(64, DType::F64), &params).contains("q has dtype F64, expected f32, bf16 or f16 on a GPU"));
    assert!(error(&x(300, DType::F32), &params).contains("a head_dim of at most 256 on a GPU"));
    let (q, k) = (x(64, DType::F32), x(64, DType::F32).to_device(&Device::Cpu).unwrap());
    assert!(landmark_attention(&q, &k, &k, &params).unwrap_err().to_string().contains("k is on Cpu"));
}
