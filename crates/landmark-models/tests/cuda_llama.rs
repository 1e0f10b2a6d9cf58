//! A LLaMA on a GPU against the same on the CPU: loss, gradients, logits; whole, with adapters, quantized. Without a GPU each test says that
//! it is skipped.
#![cfg(feature = "cuda")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use landmark_models::IGNORE;
use landmark_models::gpt::NegativeRows;
use landmark_models::llama::{LORA_MODULES, Llama, LlamaConfig, LoraConfig, Matrix};
use landmark_models::ops::{Recording, Rounded};
use serde_json::json;

const CPU: Device = Device::Cpu;
const LANDMARK: u32 = 300;
const ROWS: usize = 4;
const TIME: usize = 6 * 64;

fn gpu() -> Option<Device> {
    Device::new_cuda(0).map_err(|error| eprintln!("skipped: no GPU here ({error})")).ok()
}

/// SmolLM2's heads and blocks, and a vocabulary that is no multiple of anything.
fn config(tied: bool) -> LlamaConfig {
    let json = json!({
        "model_type": "llama", "vocab_size": 301, "hidden_size": 576, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 512, "tie_word_embeddings": tied,
        "mem_id": LANDMARK, "mem_freq": 63, "train_context_length": TIME,
    });
    LlamaConfig::from_json(&json.to_string()).unwrap()
}

/// On the CPU and on the GPU.
fn weights(config: &LlamaConfig, change: impl Fn(&str, Tensor) -> Matrix) -> HashMap<String, Matrix> {
    let model = Llama::init(config, 1, DType::F32, &CPU).unwrap();
    model.weights().map(|(name, w)| (name.to_string(), change(name, w.dense().unwrap()))).collect()
}

fn windows() -> (Tensor, Tensor) {
    let id = |i: usize| if i % 64 == 63 { LANDMARK } else { (i * i % 7919 % 299) as u32 };
    let ids = Tensor::from_iter((0..ROWS * TIME).map(id), &CPU).unwrap().reshape((ROWS, TIME)).unwrap();
    let target = |i: usize| if i % 64 == 63 { IGNORE } else { id(if i % 64 == 62 { i + 2 } else { i + 1 }) };
    (ids, Tensor::from_iter((0..ROWS * TIME).map(target), &CPU).unwrap().reshape((ROWS, TIME)).unwrap())
}

fn loss_and_gradients(model: &Llama, negatives: bool) -> (f32, BTreeMap<String, Tensor>) {
    let (ids, targets) = windows();
    let recording = Recording::start(&Rounded::default());
    let options = NegativeRows { negative_rows: 2, negative_share: 0.5, negative_top_k: 2 };
    let mut attention = match negatives {
        true => model.window_attention_with_negatives(&ids, (options, 1, 9)),
        false => model.window_attention(&ids),
    }
    .unwrap();
    let hidden = model.hidden_in_training(&ids, &mut attention, Some(9)).unwrap();
    let loss = model.loss(&hidden, &targets, None).unwrap();
    let mut gradients = recording.backward(&loss).unwrap();
    let mut of = |var| gradients.remove(var).expect("of every parameter").to_device(&CPU).unwrap();
    let gradients = model.parameters().iter().map(|(name, var)| (name.clone(), of(var))).collect();
    (loss.to_scalar().unwrap(), gradients)
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Checks a model in f32 and in bf16 on the GPU against one on the CPU.
fn compare(what: &str, on: impl Fn(&Device) -> Llama, gpu: &Device, negatives: bool) {
    let (expected, expected_gradients) = loss_and_gradients(&on(&CPU), negatives);
    for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::BF16, 5e-2)] {
        for recomputes in [false, true] {
            let model = on(gpu).with_activations(dtype).unwrap().with_activation_checkpointing(recomputes);
            let (loss, gradients) = loss_and_gradients(&model, negatives);
            let mut worst = (0f32, "");
            for (name, expected) in &expected_gradients {
                let off = largest(&(&gradients[name] - expected).unwrap()) / largest(expected).max(1e-6);
                worst = if off > worst.0 { (off, name.as_str()) } else { worst };
            }
            println!("{what} {dtype:?} recomputed {recomputes}: loss {loss} for {expected}; worst gradient {worst:?}");
            assert!((loss - expected).abs() < tolerance / 10. * expected, "{what} {dtype:?}: {loss} for {expected}");
            assert!(worst.0 < tolerance, "{what} {dtype:?}: gradient of {} off by {}", worst.1, worst.0);
        }
    }
}

fn dense(config: &LlamaConfig, device: &Device) -> HashMap<String, Tensor> {
    let to = |(name, w): (String, Matrix)| (name, w.dense().unwrap().to_device(device).unwrap());
    weights(config, |_, w| Matrix::Dense(w)).into_iter().map(to).collect()
}

#[test]
fn gradients_of_a_whole_model() {
    let Some(gpu) = gpu() else { return };
    for tied in [true, false] {
        let config = config(tied);
        for negatives in [false, true] {
            let model = |device: &Device| Llama::from_tensors(&config, dense(&config, device)).unwrap();
            compare(&format!("whole, tied {tied}, negatives {negatives}"), model, &gpu, negatives);
        }
    }
}

#[test]
fn gradients_of_adapters() {
    let Some(gpu) = gpu() else { return };
    let modules = LORA_MODULES.map(String::from).into();
    let lora = LoraConfig { r: 8, lora_alpha: 20., lora_dropout: 0., target_modules: modules };
    for (tied, half) in [(true, false), (true, true), (false, true)] {
        let config = config(tied);
        let model = |device: &Device| {
            // In bf16 on the GPU, and of the same values on the CPU.
            let matrix = |x: Tensor| match (half && x.rank() == 2, device.is_cpu()) {
                (true, true) => x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap(),
                (true, false) => x.to_dtype(DType::BF16).unwrap().to_device(device).unwrap(),
                (false, _) => x.to_device(device).unwrap(),
            };
            let model = Llama::frozen(&config, weights(&config, |_, w| Matrix::Dense(matrix(w)))).unwrap();
            let model = model.with_lora(&lora, 3).unwrap();
            for (seed, var) in model.parameters().values().enumerate() {
                let values = (0..var.elem_count()).map(|i| 0.05 * ((i * 7 + seed * 13) as f32 * 0.37).sin());
                var.set(&Tensor::from_iter(values, device).unwrap().reshape(var.shape()).unwrap()).unwrap();
            }
            model
        };
        if !half {
            compare(&format!("adapters, tied {tied}"), model, &gpu, false);
            continue;
        }
        // Frozen matrices of bf16 meet activations of bf16 alone.
        let (expected, gradients) = loss_and_gradients(&model(&CPU), true);
        let (loss, got) = loss_and_gradients(&model(&gpu).with_activations(DType::BF16).unwrap(), true);
        assert!((loss - expected).abs() < 5e-3 * expected, "{loss} for {expected}");
        for (name, expected) in &gradients {
            let off = largest(&(&got[name] - expected).unwrap()) / largest(expected).max(1e-6);
            assert!(off < 5e-2, "{name}: off by {off}");
        }
    }
}

fn logits(model: &Llama) -> Tensor {
    let (ids, _) = windows();
    let mut attention = model.window_attention(&ids).unwrap();
    let hidden = model.hidden(&ids, &mut attention).unwrap();
    model.logits(&hidden).unwrap().to_dtype(DType::F32).unwrap().to_device(&CPU).unwrap()
}

/// Quantized weights on the GPU: their own products round activations to 8 bits, dense copies of them do not.
#[test]
fn quantized_weights() {
    let Some(gpu) = gpu() else { return };
    let config = LlamaConfig { intermediate_size: 192, ..config(true) };
    for (dtype, name) in [(GgmlDType::Q4_1, "Q4_1"), (GgmlDType::Q8_0, "Q8_0"), (GgmlDType::Q4_0, "Q4_0")] {
        let model = |device: &Device| {
            let quantized = |name: &str, x: Tensor| match x.rank() {
                2 if name != "model.norm.weight" => {
                    let w = QTensor::quantize(&x, dtype).unwrap();
                    let bytes = w.data().unwrap().into_owned();
                    let storage = candle_core::quantized::QStorage::from_data(bytes.into(), device, dtype).unwrap();
                    Matrix::Quantized(Arc::new(QTensor::new(storage, x.shape()).unwrap()))
                }
                _ => Matrix::Dense(x.to_device(device).unwrap()),
            };
            Llama::frozen(&config, weights(&config, quantized)).unwrap()
        };
        let expected = logits(&model(&CPU));
        let deviation = expected.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let check = |what: &str, model: Llama, tolerance: f32| {
            let off = (logits(&model) - &expected).unwrap().sqr().unwrap().mean_all().unwrap();
            let off = off.to_scalar::<f32>().unwrap().sqrt() / deviation;
            println!("{name} {what}: off by {off} of the deviation");
            assert!(off < tolerance, "{name} {what}: off by {off} of the deviation");
        };
        let half = |model: Llama| model.with_activations(DType::BF16).unwrap();
        check("f32", model(&gpu), 0.05);
        check("bf16", half(model(&gpu)), 0.05);
        check("dense f32", model(&gpu).dequantized(DType::F32).unwrap(), 1e-4);
        check("dense bf16", half(model(&gpu).dequantized(DType::BF16).unwrap()), 0.03);
        // Adapters beside them, for reading.
        let lora = LoraConfig { target_modules: vec!["q_proj".into(), "down_proj".into()], ..LoraConfig::default() };
        let adapted = half(model(&gpu).with_lora(&lora, 1).unwrap().for_reading().unwrap());
        check("with adapters that change nothing", adapted, 0.05);
    }
}
