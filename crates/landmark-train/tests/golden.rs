//! 25 training steps of the authors' code, with the real optimizer and schedule.

use candle_core::{DType, Device, Tensor};
use landmark_data::{Batch, IGNORE};
use landmark_models::gpt::{Gpt, GptConfig};
use landmark_train::{Settings, Trainer};
use std::collections::HashMap;
use std::path::PathBuf;

/// A golden file; its folder can be another one.
fn golden(name: &str) -> HashMap<String, Tensor> {
    let own = || concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").into();
    let folder = std::env::var_os("LANDMARK_GOLDEN_DIR").map_or_else(own, PathBuf::from);
    candle_core::safetensors::load(folder.join(format!("{name}.safetensors")), &Device::Cpu).unwrap()
}

fn settings(iterations: usize) -> Settings {
    let model = GptConfig {
        vocab_size: 96,
        n_embd: 32,
        n_head: 2,
        n_layer: 3,
        landmark_id: 90,
        mem_freq: Some(7),
        sequence_length: 64,
        ..GptConfig::default()
    };
    Settings { acc_steps: 1, iterations, lr: 2e-3, warmup_percent: 0.2, ..Settings::of(model) }
}

fn batch(run: &HashMap<String, Tensor>, step: usize) -> Batch {
    let ids = |name: &str| run[name].get(step).unwrap().flatten_all().unwrap().to_vec1::<i64>().unwrap();
    let (rows, sequence_length) = run["inputs"].get(step).unwrap().dims2().unwrap();
    let inputs = ids("inputs").into_iter().map(|id| id as u32).collect();
    let targets = ids("targets").into_iter().map(|id| u32::try_from(id).unwrap_or(IGNORE)).collect();
    Batch { inputs, targets, weights: None, exercises: 0, rows, sequence_length }
}

fn check(dtype: DType, device: &Device, tolerance: f64) {
    let run = golden("gpt_train_25_steps");
    let losses = run["losses"].to_vec1::<f64>().unwrap();
    let settings = settings(losses.len());
    let weights = golden("gpt_landmark_forward");
    let weights = weights.iter().filter_map(|(name, tensor)| {
        Some((name.strip_prefix("param.")?.to_string(), tensor.to_dtype(dtype).unwrap().to_device(device).unwrap()))
    });
    let model = Gpt::from_tensors(&settings.model, weights.collect()).unwrap();
    let mut trainer = Trainer::new(&settings, model).unwrap();
    for (step, expected) in losses.iter().enumerate() {
        let loss = trainer.step([batch(&run, step)]).unwrap().loss;
        assert!((loss - expected).abs() < tolerance, "step {step}: loss {loss} is not {expected}");
    }
    let mut compared = 0;
    for (name, var) in trainer.model().parameters() {
        let ours = var.as_detached_tensor().to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        let difference = (ours - &run[&format!("final.{name}")]).unwrap().abs().unwrap().flatten_all().unwrap();
        let difference = difference.max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(difference < tolerance, "{name} differs by {difference}");
        compared += 1;
    }
    assert_eq!(compared, run.keys().filter(|name| name.starts_with("final.")).count());
}

#[test]
fn losses_and_weights_are_the_authors_in_f64() {
    check(DType::F64, &Device::Cpu, 1e-9);
}

#[test]
fn losses_and_weights_are_the_authors_in_f32() {
    check(DType::F32, &Device::Cpu, 1e-4);
}

#[cfg(feature = "cuda")]
#[test]
fn losses_and_weights_are_the_authors_on_a_gpu() {
    match Device::new_cuda(0) {
        Ok(gpu) => check(DType::F32, &gpu, 1e-4),
        Err(error) => eprintln!("skipped: no GPU here ({error})"),
    }
}
