//! Rotary position embedding on GPUs against the CPU's. Where there is no GPU these tests say so and check nothing.
#![cfg(feature = "cuda")]

#[path = "support/gpu.rs"]
mod gpu;

use candle_core::{DType, Device, Tensor, Var};
use gpu::gpu;
use landmark_attention::{Pairs, Rope};

fn numbers(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed;
    let numbers: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.
        })
        .collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    let on_cpu = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let difference = (on_cpu(a) - on_cpu(b)).unwrap().abs().unwrap();
    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Both kinds of pairs, positions for all rows and for each, heads of even and odd numbers of pairs, tensors as projections give them.
#[test]
fn rotation_and_gradient_are_the_cpus() {
    let Some(device) = gpu() else { return };
    let (batch, heads) = (3, 4);
    for (head_dim, time) in [(64, 33), (128, 70), (16, 1), (6, 5), (80, 9), (256, 3)] {
        for pairs in [Pairs::Interleaved, Pairs::Halves] {
            for rows in [1, batch] {
                let positions: Vec<i64> = (0..(rows * time) as i64).map(|i| i * 7919 % 40_000 - 3).collect();
                let rotation = Rope::new(head_dim, 10_000., pairs).at(&positions);
                let (x, grad) =
                    (numbers(&[batch, time, heads, head_dim], 1), numbers(&[batch, time, heads, head_dim], 2));
                let on = |device: &Device, dtype: DType| {
                    let input = |x: &Tensor| x.to_device(device).unwrap().to_dtype(dtype).unwrap();
                    let x = Var::from_tensor(&input(&x)).unwrap();
                    let out = rotation.apply(&x.transpose(1, 2).unwrap()).unwrap();
                    let loss = (&out * input(&grad).transpose(1, 2).unwrap()).unwrap().sum_all().unwrap();
                    let gradients = loss.backward().unwrap();
                    (out, gradients.get(&x).unwrap().clone())
                };
                let expected = on(&Device::Cpu, DType::F64);
                for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 2e-2), (DType::F16, 3e-3)] {
                    let got = on(&device, dtype);
                    let off = [largest_difference(&got.0, &expected.0), largest_difference(&got.1, &expected.1)];
                    let what = format!("{head_dim} x {time}, {pairs:?}, {rows} rows of positions, {dtype:?}");
                    assert!(off.iter().all(|&off| off <= tolerance), "{what}: off by {off:?}");
                }
            }
        }
    }
}

#[test]
fn f64_is_refused() {
    let Some(device) = gpu() else { return };
    let x = Tensor::zeros((1, 1, 2, 8), DType::F64, &device).unwrap();
    let error = Rope::new(8, 10_000., Pairs::Halves).at(&[0, 1]).apply(&x).unwrap_err().to_string();
    assert_eq!(error, "rope: x has dtype F64, expected f32, bf16 or f16 on a GPU");
}
