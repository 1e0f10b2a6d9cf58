//! The operations on a GPU against the same on the CPU: values and gradients in f32, closely in bf16. Without a GPU each test says that it
//! is skipped.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Result, Tensor, Var};
use landmark_models::IGNORE;
use landmark_models::gpt::{Gpt, GptConfig, WindowAttention};
use landmark_models::ops::{self, Activation, Mlp, NormKind, Recording, Rounded};

const CPU: Device = Device::Cpu;

fn gpu() -> Option<Device> {
    Device::new_cuda(0).map_err(|error| eprintln!("skipped: no GPU here ({error})")).ok()
}

fn values(seed: usize, shape: &[usize]) -> Tensor {
    let n = shape.iter().product::<usize>();
    let values =
        (0..n).map(|i| ((i % 9973 + 1) as f64 * 12.9898 + (seed + i / 9973) as f64 * 78.233).sin() * 43758.5453);
    let values = values.map(|x| (x - x.floor() - 0.5) as f32);
    Tensor::from_iter(values, &CPU).unwrap().reshape(shape).unwrap()
}

/// Runs `f` on the CPU in f32 and on the GPU in f32 and bf16 and compares its results and the gradients of all inputs. `f` is given the inputs
/// and the type of activations, to which it casts what are activations.
fn compare(what: &str, inputs: &[Tensor], f: impl Fn(&[Var], DType) -> landmark_models::Result<Vec<Tensor>>) {
    let Some(gpu) = gpu() else { return };
    let run = |device: &Device, dtype: DType| -> Vec<Tensor> {
        let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(&x.to_device(device).unwrap()).unwrap()).collect();
        let out = f(&vars, dtype).unwrap_or_else(|error| panic!("{what} on {:?}: {error}", device.location()));
        let weighed = out.iter().enumerate().map(|(i, y)| -> Result<Tensor> {
            let weights = values(90 + i, y.dims()).to_device(device)?.to_dtype(y.dtype())?;
            (y * weights)?.to_dtype(DType::F32)?.sum_all()
        });
        let sum = weighed.reduce(|a, b| a? + b?).unwrap().unwrap();
        let grads = sum.backward().unwrap();
        let grads = vars.iter().map(|var| grads.get(var).expect("a gradient for every input").clone());
        let on_cpu = |x: Tensor| x.to_dtype(DType::F32).unwrap().to_device(&CPU).unwrap();
        out.into_iter().chain(grads).map(on_cpu).collect()
    };
    let expected = run(&CPU, DType::F32);
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 2e-2)] {
        let got = run(&gpu, dtype);
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got.dims(), expected.dims(), "{what}, result {i}");
            let largest =
                |x: &Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            let off = largest(&(got - expected).unwrap()) / largest(expected).max(1e-6);
            assert!(off < tolerance, "{what} in {dtype:?}: result {i} is off by {off} of the largest");
        }
        // The same bits every time.
        for (i, (once, twice)) in got.iter().zip(run(&gpu, dtype)).enumerate() {
            let bits = |x: &Tensor| {
                x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert_eq!(bits(once), bits(&twice), "{what} in {dtype:?}: result {i} differs from run to run");
        }
    }
}

#[test]
fn norms() {
    for (shape, width) in
        [([2, 3, 37], 37), ([4, 100, 384], 384), ([2, 70, 1024], 1024), ([30, 200, 64], 64), ([1, 3, 5000], 5000)]
    {
        let (x, w, b) = (values(1, &shape), values(2, &[width]), values(3, &[width]));
        compare("layer norm", &[x.clone(), w.clone(), b], |v, dtype| {
            Ok(vec![ops::norm(&v[0], NormKind::Layer, &v[1], Some(&v[2]), dtype)?])
        });
        compare("rms norm of large eps", &[x.clone(), w.clone()], |v, dtype| {
            Ok(vec![ops::norm(&v[0], NormKind::Rms { eps: 0.1 }, &v[1], None, dtype)?])
        });
        compare("rms norm of activations", &[x, w], |v, dtype| {
            Ok(vec![ops::norm(&v[0].to_dtype(dtype)?, NormKind::Rms { eps: 1e-5 }, &v[1], None, dtype)?])
        });
    }
}

#[test]
fn linear_maps() {
    // The last is large enough for a choice among algorithms.
    for (n, n_in, n_out) in [(7, 24, 40), (130, 384, 1152), (1, 64, 8), (4096, 1024, 1024)] {
        let (x, w, b) = (values(1, &[n, n_in]), values(2, &[n_out, n_in]), values(3, &[n_out]));
        compare("linear", &[x, w, b], |v, dtype| Ok(vec![ops::linear(&v[0].to_dtype(dtype)?, &v[1], Some(&v[2]))?]));
    }
}

#[test]
fn heads() {
    for (batch, time, heads, dim) in [(2, 5, 3, 64), (1, 7, 2, 6), (3, 40, 1, 16)] {
        let c = heads * dim;
        let (x, w) = (values(1, &[batch, time, c]), values(2, &[3 * c, c]));
        compare("project_heads", &[x.clone(), w], |v, dtype| {
            Ok(ops::project_heads(&v[0].to_dtype(dtype)?, &v[1], None, heads)?.to_vec())
        });
        let (w, norm) = (values(2, &[3 * c, c]), values(5, &[dim]));
        compare("norms of heads", &[x.clone(), w, norm], |v, dtype| {
            let heads = ops::project_heads(&v[0].to_dtype(dtype)?, &v[1], None, heads)?;
            heads.iter().map(|heads| ops::norm(heads, NormKind::Rms { eps: 1e-5 }, &v[2], None, dtype)).collect()
        });
        let (o, w) = (values(3, &[batch, heads, time, dim]), values(4, &[c, c]));
        compare("merge_heads", &[o, w, x], |v, dtype| {
            Ok(vec![ops::merge_heads(&v[0].to_dtype(dtype)?, &v[1], None, &v[2], None)?])
        });
    }
}

#[test]
fn heads_of_grouped_queries() {
    for (batch, time, heads, dim) in [(2, 5, 3, 64), (1, 7, 2, 6), (3, 40, 9, 16)] {
        compare("split_heads", &[values(1, &[batch, time, heads * dim])], |v, dtype| {
            Ok(vec![ops::split_heads(&v[0].to_dtype(dtype)?, heads)?])
        });
        compare("join_heads", &[values(1, &[batch, heads, time, dim])], |v, dtype| {
            Ok(vec![ops::join_heads(&v[0].to_dtype(dtype)?)?])
        });
    }
}

#[test]
fn gated_by_another_tensor() {
    for width in [4, 64, 1536] {
        compare("swiglu", &[values(1, &[2, 33, width]), values(2, &[2, 33, width])], |v, dtype| {
            Ok(vec![ops::swiglu(&v[0].to_dtype(dtype)?, &v[1].to_dtype(dtype)?)?])
        });
    }
}

#[test]
fn onto_the_stream() {
    for (n, n_in, n_out) in [(7, 24, 40), (130, 384, 1152), (1, 64, 8)] {
        let (x, w, b) = (values(1, &[n, n_in]), values(2, &[n_out, n_in]), values(3, &[n_out]));
        compare("linear_onto", &[x.clone(), w.clone(), b, values(4, &[n, n_out])], |v, dtype| {
            Ok(vec![ops::linear_onto(&v[0].to_dtype(dtype)?, &v[1], Some(&v[2]), &v[3])?])
        });
        compare("linear_onto, frozen", &[x, values(4, &[n, n_out])], |v, dtype| {
            let w = w.to_device(v[0].device())?;
            Ok(vec![ops::linear_onto(&v[0].to_dtype(dtype)?, &w, None, &v[1])?])
        });
    }
}

#[test]
fn feed_forward() {
    for (activation, hidden) in [(Activation::Gelu, 256), (Activation::Swiglu, 192), (Activation::Swiglu, 20)] {
        let (x, residual) = (values(1, &[2, 33, 64]), values(2, &[2, 33, 64]));
        let up = values(3, &[if activation == Activation::Swiglu { 2 * hidden } else { hidden }, 64]);
        let down = values(4, &[64, hidden]);
        compare("mlp", &[x, residual, up, down], |v, dtype| {
            let [up, down] = [&v[2], &v[3]].map(|w| w.as_tensor().clone());
            let mlp = Mlp { activation, up, up_bias: None, down, down_bias: None };
            Ok(vec![ops::mlp(&v[0].to_dtype(dtype)?, &mlp, &v[1], None)?])
        });
    }
}

#[test]
fn embedding() {
    let ids: Vec<u32> = (0..900).map(|i| if i % 4 == 0 { 3 } else { i * 31 % 57 }).collect();
    let ids = Tensor::from_vec(ids, (9, 100), &CPU).unwrap();
    compare("embedding", &[values(1, &[60, 70])], |v, _| Ok(vec![ops::embedding(&v[0], &ids)?]));
}

#[test]
fn cross_entropy() {
    for (n, vocab, width) in [(50, 96, 24), (300, 8192, 64), (40, 101, 16), (11_000, 50_304, 32)] {
        let targets = (0..n as u32).map(|i| if i % 5 == 0 { IGNORE } else { i * 7919 % vocab as u32 });
        let targets = Tensor::from_iter(targets, &CPU).unwrap();
        let weights = (values(7, &[n]) + 0.6).unwrap();
        let (x, w) = (values(1, &[n, width]), values(2, &[vocab, width]));
        compare(&format!("cross entropy over {vocab}"), &[x.clone(), w.clone()], |v, dtype| {
            Ok(vec![ops::cross_entropy(&v[0].to_dtype(dtype)?, &v[1], &targets, Some(&weights))?])
        });
        let Some(gpu) = gpu() else { return };
        let scores = ops::token_scores(&x.to_device(&gpu).unwrap(), &w.to_device(&gpu).unwrap(), &targets).unwrap();
        for (i, (got, expected)) in scores.iter().zip(ops::token_scores(&x, &w, &targets).unwrap()).enumerate() {
            match (got, expected) {
                (None, None) => {}
                (Some(got), Some(expected)) => {
                    assert!((got.loss - expected.loss).abs() < 1e-4, "{i}: {got:?}, {expected:?}")
                }
                (got, expected) => panic!("{i}: {got:?}, {expected:?}"),
            }
        }
    }
}

#[test]
fn copies_of_parameters_change_no_bit() {
    let Some(gpu) = gpu() else { return };
    let config = GptConfig {
        vocab_size: 300,
        landmark_id: 299,
        n_embd: 128,
        n_head: 2,
        n_layer: 2,
        sequence_length: 80,
        mem_freq: Some(15),
        ..GptConfig::default()
    };
    let model = Gpt::init(&config, 1, DType::F32, &gpu).unwrap().with_activations(DType::BF16).unwrap();
    let id = |i: u32| if i % 16 == 15 { 299 } else { i * 31 % 298 };
    let ids = Tensor::from_iter((0..240).map(id), &CPU).unwrap().reshape((3, 80)).unwrap();
    let run = |rounded: &Rounded| {
        let recording = Recording::start(rounded);
        let mut attention = WindowAttention::new(&config, &ids, Some(1)).unwrap();
        let hidden = model.hidden(&ids, &mut attention, Some(1)).unwrap();
        let loss = model.loss(&hidden, &ids, None).unwrap();
        let mut gradients = recording.backward(&loss).unwrap();
        let gradient = |var| gradients.remove(var).expect("of every parameter").flatten_all().unwrap();
        let gradients: Vec<_> = model.parameters().values().map(gradient).collect();
        let bits = |x: &Tensor| x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        (loss.to_scalar::<f32>().unwrap(), gradients.iter().map(bits).collect::<Vec<_>>())
    };
    let matrices = model.parameters().values().filter(|var| var.rank() == 2);
    let copies = matrices.map(|var| (var.clone(), var.as_detached_tensor().to_dtype(DType::BF16).unwrap())).collect();
    let expected = run(&Rounded::default());
    assert_eq!(run(&copies), expected);
    // They are read: others give something else.
    let matrices = model.parameters().values().filter(|var| var.rank() == 2);
    let zeros = matrices.map(|var| (var.clone(), Tensor::zeros(var.shape(), DType::BF16, &gpu).unwrap())).collect();
    assert_ne!(run(&zeros).0, expected.0);
}
