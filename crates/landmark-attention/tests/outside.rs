//! Keys outside the window: against the reference, against finite differences, and on a GPU against the CPU.

#[cfg(feature = "cuda")]
#[path = "support/gpu.rs"]
mod support;

use candle_core::{D, DType, Device, Tensor, Var};
use landmark_attention::outside::log_sum_exp;
use landmark_attention::{
    Error, LandmarkParams, Landmarks, Softmax, landmark_attention, landmark_attention_with_lse,
    landmark_attention_with_outside, reference,
};

/// Numbers in -2..2 that depend on the seed alone.
fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let mix = |i: u64| {
        let z = (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..n as u64).map(|i| (mix(i + 1) >> 11) as f64 / (1u64 << 53) as f64 * 4. - 2.).collect()
}

fn tensor(seed: u64, shape: &[usize]) -> Tensor {
    Tensor::from_vec(numbers(seed, shape.iter().product()), shape, &Device::Cpu).unwrap()
}

type Op = fn(&Tensor, &Tensor, &Tensor, &LandmarkParams, &Tensor) -> landmark_attention::Result<Tensor>;

/// q, k, v, the gradient of the output, and log-sum-exps of which every third is minus infinity.
struct Case {
    tensors: [Tensor; 5],
    params: LandmarkParams,
}

impl Case {
    fn new(seed: u64, [batch, heads, kv_heads, q_len, kv_len, dim]: [usize; 6], block: usize) -> Self {
        let outside = numbers(seed + 4, batch * heads * q_len);
        let hidden = |(i, x): (usize, f64)| if i % 3 == 0 { f64::NEG_INFINITY } else { 3. * x };
        let outside: Vec<f64> = outside.into_iter().enumerate().map(hidden).collect();
        let tensors = [
            tensor(seed, &[batch, heads, q_len, dim]),
            tensor(seed + 1, &[batch, kv_heads, kv_len, dim]),
            tensor(seed + 2, &[batch, kv_heads, kv_len, dim]),
            tensor(seed + 3, &[batch, heads, q_len, dim]),
            Tensor::from_vec(outside, (batch, heads, q_len), &Device::Cpu).unwrap(),
        ];
        let landmarks = if block == 0 { Landmarks::None } else { Landmarks::Every(block) };
        Self { tensors, params: LandmarkParams::new(landmarks) }
    }

    /// Output and the gradients of q, k, v and outside, computed in `dtype` on `device`, as f64 on the CPU.
    fn run(&self, op: Op, dtype: DType, device: &Device) -> [Tensor; 5] {
        let lse = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let var = |i: usize, dtype| Var::from_tensor(&self.input(i, dtype, device)).unwrap();
        let (q, k, v, outside) = (var(0, dtype), var(1, dtype), var(2, dtype), var(4, lse));
        let out = op(&q, &k, &v, &self.params, &outside).unwrap();
        let grads = (&out * self.input(3, dtype, device)).unwrap().sum_all().unwrap().backward().unwrap();
        let grad = |var: &Var| grads.get(var).unwrap().clone();
        [out.clone(), grad(&q), grad(&k), grad(&v), grad(&outside)]
            .map(|x| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap())
    }

    /// Rounded as bf16 rounds, so that all dtypes are given the same numbers.
    fn input(&self, i: usize, dtype: DType, device: &Device) -> Tensor {
        let x = self.tensors[i].to_dtype(DType::BF16).unwrap().to_dtype(dtype).unwrap();
        x.to_device(device).unwrap()
    }
}

fn off(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap();
    if f64::is_nan(difference) { f64::INFINITY } else { difference }
}

const NAMES: [&str; 5] = ["out", "dq", "dk", "dv", "d outside"];

fn cases() -> Vec<Case> {
    let shapes = [
        ([1, 1, 1, 7, 7, 8], 3),
        ([2, 4, 2, 130, 130, 16], 17),
        ([2, 2, 1, 60, 211, 64], 51),
        ([1, 2, 2, 40, 40, 8], 0),
    ];
    shapes.into_iter().enumerate().map(|(i, (shape, block))| Case::new(10 * i as u64, shape, block)).collect()
}

#[test]
fn the_fused_operation_is_the_reference() {
    for case in cases() {
        let expected = case.run(reference::landmark_attention_with_outside, DType::F64, &Device::Cpu);
        for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 2e-4), (DType::BF16, 0.1)] {
            let got = case.run(landmark_attention_with_outside, dtype, &Device::Cpu);
            for ((got, expected), name) in got.iter().zip(&expected).zip(NAMES) {
                let off = off(got, expected);
                assert!(off < tolerance, "{:?} {dtype:?} {name}: off by {off:e}", case.tensors[0].dims());
            }
        }
    }
}

#[test]
fn gradients_are_the_finite_differences() {
    let case = Case::new(5, [1, 2, 1, 11, 11, 4], 4);
    let inputs = [0, 1, 2, 4].map(|i| case.input(i, DType::F64, &Device::Cpu));
    let [_, grads @ ..] = case.run(landmark_attention_with_outside, DType::F64, &Device::Cpu);
    let loss = |inputs: &[Tensor; 4]| -> f64 {
        let [q, k, v, outside] = inputs;
        let out = landmark_attention_with_outside(q, k, v, &case.params, outside).unwrap();
        (out * case.input(3, DType::F64, &Device::Cpu)).unwrap().sum_all().unwrap().to_scalar().unwrap()
    };
    const STEP: f64 = 1e-5;
    for (i, grad) in grads.iter().enumerate() {
        let (values, grad) = (inputs[i].flatten_all().unwrap().to_vec1::<f64>().unwrap(), grad.flatten_all().unwrap());
        for (place, grad) in grad.to_vec1::<f64>().unwrap().into_iter().enumerate() {
            let moved = |step: f64| {
                let mut values = values.clone();
                values[place] += step;
                let mut inputs = inputs.clone();
                inputs[i] = Tensor::from_vec(values, inputs[i].shape(), &Device::Cpu).unwrap();
                loss(&inputs)
            };
            let slope = (moved(STEP) - moved(-STEP)) / (2. * STEP);
            assert!((slope - grad).abs() < 1e-7, "{} {place}: {grad} and {slope}", NAMES[i + 1]);
        }
    }
}

#[test]
fn keys_that_nobody_sees_change_nothing_and_overwhelming_ones_take_all() {
    let case = Case::new(3, [1, 2, 2, 50, 50, 16], 9);
    let [q, k, v] = [0, 1, 2].map(|i| case.input(i, DType::F32, &Device::Cpu));
    let outside = |lse: f32| Tensor::full(lse, (1, 2, 50), &Device::Cpu).unwrap();
    let plain = landmark_attention(&q, &k, &v, &case.params).unwrap();
    let same = landmark_attention_with_outside(&q, &k, &v, &case.params, &outside(f32::NEG_INFINITY)).unwrap();
    let bits = |x: &Tensor| -> Vec<u32> {
        x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(&plain), bits(&same));
    let nothing = landmark_attention_with_outside(&q, &k, &v, &case.params, &outside(1e4)).unwrap();
    assert!(nothing.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|&x| x == 0.));
    // Keys with the window's own sum take one half; any softmax.
    for softmax in [Softmax::Grouped, Softmax::NoMem, Softmax::IgnoreMem] {
        let params = LandmarkParams { softmax, ..case.params.clone() };
        let (plain, lse) = landmark_attention_with_lse(&q, &k, &v, &params).unwrap();
        let half = landmark_attention_with_outside(&q, &k, &v, &params, &lse).unwrap();
        assert!(off(&(half * 2.).unwrap().to_dtype(DType::F64).unwrap(), &plain.to_dtype(DType::F64).unwrap()) < 1e-5);
    }
}

#[test]
fn log_sum_exps_and_their_gradient() {
    let scores = Var::from_tensor(&tensor(8, &[2, 3, 5, 70])).unwrap();
    let weights = tensor(9, &[2, 3, 5]);
    let gradient = |lse: Tensor| {
        let grads = (&lse * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        [lse, grads.get(&scores).unwrap().clone()]
    };
    let ours = gradient(log_sum_exp(&scores, 0.7).unwrap());
    let plain = gradient((&*scores * 0.7).unwrap().exp().unwrap().sum(D::Minus1).unwrap().log().unwrap());
    assert!(ours.iter().zip(&plain).all(|(ours, plain)| off(ours, plain) < 1e-12));
    let infinite = log_sum_exp(&Tensor::full(f32::NEG_INFINITY, (2, 3), &Device::Cpu).unwrap(), 1.).unwrap();
    assert_eq!(infinite.to_vec1::<f32>().unwrap(), [f32::NEG_INFINITY; 2]);
}

#[test]
fn what_does_not_fit_is_named() {
    let case = Case::new(1, [1, 2, 2, 5, 5, 8], 3);
    let [q, k, v] = [0, 1, 2].map(|i| case.input(i, DType::F32, &Device::Cpu));
    let call = |outside: &Tensor| landmark_attention_with_outside(&q, &k, &v, &case.params, outside).unwrap_err();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    assert!(matches!(call(&zeros(&[1, 2, 4], DType::F32)), Error::Shape { tensor: "outside", .. }));
    assert!(matches!(call(&zeros(&[1, 2, 5], DType::F64)), Error::DType { tensor: "outside", .. }));
    assert!(matches!(log_sum_exp(&zeros(&[3, 0], DType::F32), 1.), Err(Error::Shape { tensor: "scores", .. })));
    let plain = LandmarkParams { softmax: Softmax::NoMem, ..case.params };
    let refused = reference::landmark_attention_with_outside(&q, &k, &v, &plain, &zeros(&[1, 2, 5], DType::F32));
    assert!(matches!(refused, Err(Error::Param { name: "softmax", .. })));
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::support::gpu;
    use super::*;

    /// The largest difference as a share of the largest number.
    fn share_off(got: &Tensor, expected: &Tensor) -> f64 {
        let largest: f64 = expected.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap();
        off(got, expected) / largest
    }

    const TYPES: [(DType, f64); 3] = [(DType::F32, 1e-4), (DType::F16, 1e-2), (DType::BF16, 6e-2)];

    #[test]
    fn a_gpu_computes_what_the_reference_defines() {
        let Some(device) = gpu() else { return };
        // The last one is the shape that Hopper's own kernels take.
        let more = Case::new(77, [3, 2, 2, 510, 510, 64], 51);
        for case in cases().into_iter().chain([more]) {
            let expected = case.run(reference::landmark_attention_with_outside, DType::F64, &Device::Cpu);
            for (dtype, tolerance) in TYPES {
                let got = case.run(landmark_attention_with_outside, dtype, &device);
                for ((got, expected), name) in got.iter().zip(&expected).zip(NAMES) {
                    let off = share_off(got, expected);
                    println!("{:?} {dtype:?} {name}: {off:e}", case.tensors[0].dims());
                    assert!(off < tolerance, "{:?} {dtype:?} {name}: off by {off:e}", case.tensors[0].dims());
                }
            }
        }
    }

    #[test]
    fn log_sum_exps_on_a_gpu() {
        let Some(device) = gpu() else { return };
        for (rows, keys) in [(5, 1), (37, 31), (64, 320), (9, 1000)] {
            for (dtype, tolerance) in TYPES {
                let run = |dtype: DType, device: &Device| {
                    let input = |x: Tensor, dtype| {
                        x.to_dtype(DType::BF16).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap()
                    };
                    let scores = Var::from_tensor(&input(tensor(3, &[2, rows, keys]), dtype)).unwrap();
                    let lse = log_sum_exp(&scores, 0.3).unwrap();
                    let weights = input(tensor(4, &[2, rows]), lse.dtype());
                    let grads = (&lse * &weights).unwrap().sum_all().unwrap().backward().unwrap();
                    [lse.clone(), grads.get(&scores).unwrap().clone()]
                        .map(|x| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap())
                };
                let (got, expected) = (run(dtype, &device), run(DType::F64, &Device::Cpu));
                for ((got, expected), name) in got.iter().zip(&expected).zip(["lse", "d scores"]) {
                    let off = share_off(got, expected);
                    println!("{rows} x {keys} {dtype:?} {name}: {off:e}");
                    assert!(off < tolerance, "{rows} x {keys} {dtype:?} {name}: off by {off:e}");
                }
            }
        }
    }
}
