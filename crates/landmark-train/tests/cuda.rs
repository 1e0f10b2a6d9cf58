//! Training on a GPU: bf16 beside f32, the same bits twice, killed and resumed. Without a GPU each test says that it is skipped.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Tensor};
use landmark_data::Tokenizer;
use landmark_models::gpt::{Gpt, GptConfig, MlpKind, Norm};
use landmark_train::{Corpus, Data, Event, Limits, Outcome, Precision, Resume, Settings, train};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

fn gpu() -> Option<Device> {
    Device::new_cuda(0).map_err(|error| eprintln!("skipped: no GPU here ({error})")).ok()
}

/// Words in an order that a model can learn something of.
fn text() -> String {
    let words = ["the ", "rain ", "fell ", "in ", "torrents ", "upon ", "a ", "dark ", "night ", "of ", "storms. "];
    (0..40_000usize).map(|i| words[(i * i / 7 + i / 3) % words.len()]).collect()
}

fn settings(precision: Precision) -> Settings {
    let model = GptConfig {
        vocab_size: 258,
        landmark_id: 257,
        n_embd: 128,
        n_head: 2,
        n_layer: 2,
        sequence_length: 153,
        mem_freq: Some(50),
        norm: Norm::Rms,
        mlp: MlpKind::Swiglu,
        qk_norm: true,
        ..GptConfig::default()
    };
    let sizes = Settings { batch_size: 8, acc_steps: 2, iterations: 500, lr: 3e-3, ..Settings::of(model) };
    Settings { precision, grad_clip: Some(1.), weight_decay: 0.1, ..sizes }
}

fn data(settings: &Settings) -> Data {
    let tokenizer = Tokenizer::bytes();
    let tokens = tokenizer.encode(&text()).unwrap();
    let (train, validation) = tokens.split_at(tokens.len() * 9 / 10);
    let corpus =
        Corpus { train: train.to_vec().into(), validation: validation.to_vec().into(), tokenizer: Some(tokenizer) };
    corpus.batches(settings).unwrap()
}

fn run(settings: &Settings, device: &Device, folder: Option<&Path>, stop_at: Option<usize>) -> (Vec<f64>, Gpt) {
    let stop = AtomicBool::new(false);
    let mut losses = Vec::new();
    let limits = Limits { experiment: folder, resume: Resume::Newest, stop: Some(&stop), ..Limits::default() };
    let outcome = train(settings, &data(settings), device, &limits, &mut |event| {
        if let Event::Step(iteration, step, _) = event {
            losses.push(step.loss);
            stop.store(Some(iteration) == stop_at, Ordering::Relaxed);
        }
    });
    match outcome.unwrap() {
        Outcome::Finished { model, .. } | Outcome::Stopped { model, .. } => (losses, model),
        Outcome::AlreadyFinished => panic!("nobody ran this before"),
    }
}

fn bits(model: &Gpt) -> Vec<Vec<u32>> {
    let of = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits);
    model
        .parameters()
        .values()
        .map(|var| of(var.as_detached_tensor().to_dtype(DType::F32).unwrap()).collect())
        .collect()
}

#[test]
fn bf16_learns_as_f32_does_and_the_gpu_as_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let of = |precision, device: &Device, iterations| {
        let settings = Settings { iterations, scheduler: landmark_train::Anneal::None, ..settings(precision) };
        run(&settings, device, None, None).0
    };
    let (full, half) = (of(Precision::Float32, &gpu, 500), of(Precision::BFloat16, &gpu, 500));
    for from in (0..500).step_by(50) {
        let (full, half) = (mean(&full[from..from + 50]), mean(&half[from..from + 50]));
        eprintln!("steps {from}..: f32 {full:.4} bf16 {half:.4}");
        // The loss falls by a nat in these steps: a few hundredths are a step or two of delay.
        assert!((full - half).abs() < 0.05, "steps {from}..: f32 {full}, bf16 {half}");
    }
    let cpu = of(Precision::Float32, &Device::Cpu, 10);
    for (step, (cpu, gpu)) in cpu.iter().zip(&full).enumerate() {
        assert!((cpu - gpu).abs() < 1e-3, "step {step}: CPU {cpu}, GPU {gpu}");
    }
}

#[test]
fn a_seed_gives_the_same_bits_also_when_stopped_and_resumed() {
    let Some(gpu) = gpu() else { return };
    let settings = Settings { iterations: 40, ..settings(Precision::BFloat16) };
    let (losses, model) = run(&settings, &gpu, None, None);
    let (again, same) = run(&settings, &gpu, None, None);
    assert_eq!((&losses, bits(&model)), (&again, bits(&same)));
    let recomputed = Settings { activation_checkpointing: true, ..settings.clone() };
    let (again, same) = run(&recomputed, &gpu, None, None);
    assert_eq!((&losses, bits(&model)), (&again, bits(&same)), "with activation checkpointing");
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("run");
    let (first, _) = run(&settings, &gpu, Some(&folder), Some(17));
    let (rest, resumed) = run(&settings, &gpu, Some(&folder), None);
    assert_eq!((first.len(), [first, rest].concat()), (17, losses));
    assert_eq!(bits(&resumed), bits(&model));
}
