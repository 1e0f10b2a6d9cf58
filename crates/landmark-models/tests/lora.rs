//! LoRA against the model that it is merged into, whose gradients `llama.rs` checks.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use landmark_models::llama::{LORA_MODULES, Llama, LlamaConfig, LoraConfig, Matrix};
use landmark_models::ops::{Gradients, Recording, Rounded};
use serde_json::json;

const CPU: Device = Device::Cpu;
const LANDMARK: u32 = 30;
const ROW: &str = "model.embed_tokens.token_adapter.trainable_tokens_delta";

fn config(tied: bool) -> LlamaConfig {
    let json = json!({
        "model_type": "qwen2", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied,
        "mem_id": LANDMARK, "mem_freq": 4, "train_context_length": 64,
    });
    LlamaConfig::from_json(&json.to_string()).unwrap()
}

fn lora(modules: &[&str]) -> LoraConfig {
    let target_modules = modules.iter().map(|module| module.to_string()).collect();
    LoraConfig { r: 3, lora_alpha: 5., lora_dropout: 0., target_modules }
}

/// Adapters that change something.
fn adapted(model: Llama, lora: &LoraConfig) -> Llama {
    let model = model.with_lora(lora, 3).unwrap();
    for (seed, var) in model.parameters().values().enumerate() {
        let values = (0..var.elem_count()).map(|i| 0.3 * ((i * 7 + seed * 13) as f64 * 0.37).sin());
        let values = Tensor::from_iter(values, &CPU).unwrap().reshape(var.shape()).unwrap();
        var.set(&values.to_dtype(var.dtype()).unwrap()).unwrap();
    }
    model
}

fn windows() -> (Tensor, Tensor) {
    let ids: Vec<u32> = (0..26).map(|i| if i % 13 % 5 == 4 { LANDMARK } else { (i * 7) % 29 }).collect();
    let targets: Vec<u32> = (0..26).map(|i| (i * 11) % 29).collect();
    let tensor = |ids| Tensor::from_vec(ids, (2, 13), &CPU).unwrap();
    (tensor(ids), tensor(targets))
}

fn loss_and_gradients(model: &Llama, record: bool, seed: Option<u64>) -> (f64, BTreeMap<String, Tensor>) {
    let (ids, targets) = windows();
    let recording = record.then(|| Recording::start(&Rounded::default()));
    let mut attention = model.window_attention(&ids).unwrap();
    let hidden = model.hidden_in_training(&ids, &mut attention, seed).unwrap();
    let loss = model.loss(&hidden, &targets, None).unwrap();
    let mut gradients: Gradients = match recording {
        Some(recording) => recording.backward(&loss).unwrap(),
        None => loss.backward().unwrap().into(),
    };
    let of = |(name, var): (&String, &Var)| Some((name.clone(), gradients.remove(var)?));
    let gradients = model.parameters().iter().filter_map(of).collect();
    (loss.to_dtype(DType::F64).unwrap().to_scalar().unwrap(), gradients)
}

/// The same weights in a model all of which learns.
fn whole(model: &Llama) -> Llama {
    let weights: HashMap<_, _> = model.weights().map(|(name, w)| (name.to_string(), w.dense().unwrap())).collect();
    Llama::from_tensors(model.config(), weights).unwrap()
}

fn off(a: &Tensor, b: &Tensor) -> f64 {
    let off = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    off.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

/// With W' = W + s B A: the same loss, dA = s B^T dW' and dB = s dW' A^T; the landmark's row has its gradient of the whole embedding.
#[test]
fn gradients_are_those_of_the_merged_model() {
    for tied in [false, true] {
        let lora = lora(&LORA_MODULES);
        let model = adapted(Llama::init(&config(tied), 1, DType::F64, &CPU).unwrap(), &lora);
        let frozen = adapted(Llama::init(&config(tied), 1, DType::F64, &CPU).unwrap(), &lora).freeze().unwrap();
        assert!(frozen.parameters().is_empty() && frozen.lora().is_none());
        let (expected, of_whole) = loss_and_gradients(&whole(&frozen), true, None);
        for record in [false, true] {
            let (loss, gradients) = loss_and_gradients(&model, record, None);
            assert!((loss - expected).abs() < 1e-12, "{loss} {expected}");
            assert_eq!(gradients.len(), 2 * 2 * LORA_MODULES.len() + 1);
            let scale = lora.lora_alpha / lora.r as f64;
            for (name, gradient) in &gradients {
                let expected = if name == ROW {
                    of_whole["model.embed_tokens.weight"].narrow(0, LANDMARK as usize, 1).unwrap()
                } else {
                    let module = name.rsplit_once(".lora_").unwrap().0;
                    let dw = &of_whole[&format!("{module}.weight")];
                    let half =
                        |half: &str| model.parameters()[&format!("{module}.lora_{half}.weight")].as_detached_tensor();
                    let product = match name.contains(".lora_A.") {
                        true => half("B").t().unwrap().matmul(dw).unwrap(),
                        false => dw.matmul(&half("A").t().unwrap()).unwrap(),
                    };
                    (product * scale).unwrap()
                };
                assert!(off(gradient, &expected) < 1e-12, "{tied} {name}: {}", off(gradient, &expected));
            }
        }
        // Layers computed again: the same bits.
        let (loss, gradients) = loss_and_gradients(&model, true, None);
        let (again, recomputed) = loss_and_gradients(&model.with_activation_checkpointing(true), true, None);
        assert_eq!(loss, again);
        assert!(gradients.iter().all(|(name, gradient)| off(gradient, &recomputed[name]) == 0.));
    }
}

/// New adapters change nothing; dropout is a function of its seed, and nothing without one.
#[test]
fn new_adapters_change_nothing_and_dropout_is_seeded() {
    let plain = Llama::init(&config(true), 1, DType::F32, &CPU).unwrap();
    let (expected, _) = loss_and_gradients(&plain, true, None);
    let lora = LoraConfig { lora_dropout: 0.5, ..lora(&["q_proj", "up_proj"]) };
    let model = plain.with_lora(&lora, 7).unwrap();
    assert!((loss_and_gradients(&model, true, Some(1)).0 - expected).abs() < 1e-6);
    let model = adapted(model, &lora);
    let loss = |seed| loss_and_gradients(&model, true, seed).0;
    assert_eq!(loss(Some(1)), loss(Some(1)));
    assert!(loss(Some(1)) != loss(Some(2)) && loss(Some(1)) != loss(None));
    let merged = loss_and_gradients(
        &whole(&adapted(Llama::init(&config(true), 1, DType::F32, &CPU).unwrap(), &lora).freeze().unwrap()),
        true,
        None,
    )
    .0;
    assert!((loss(None) - merged).abs() < 1e-5);
}

/// Beside quantized weights the adapters learn as beside what those stand for.
#[test]
fn quantized_weights_stay_and_gradients_go_through_them() {
    let lora = lora(&["q_proj", "o_proj", "down_proj"]);
    let model = Llama::init(&config(false), 1, DType::F32, &CPU).unwrap();
    let quantized: HashMap<String, Matrix> = model
        .weights()
        .map(|(name, w)| match w.dims().len() {
            2 => {
                let w = QTensor::quantize(&w.dense().unwrap(), GgmlDType::Q8_0).unwrap();
                (name.to_string(), Matrix::Quantized(Arc::new(w)))
            }
            _ => (name.to_string(), w),
        })
        .collect();
    let dense = quantized.iter().map(|(name, w)| (name.clone(), Matrix::Dense(w.dense().unwrap()))).collect();
    let of = |weights| adapted(Llama::frozen(&config(false), weights).unwrap(), &lora);
    let (quantized, dense) = (of(quantized), of(dense));
    let (loss, gradients) = loss_and_gradients(&quantized, true, None);
    let (expected, expected_gradients) = loss_and_gradients(&dense, true, None);
    assert!((loss - expected).abs() < 1e-3, "{loss} {expected}");
    for (name, gradient) in &gradients {
        let expected = &expected_gradients[name];
        let size = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() as f64;
        assert!(off(gradient, expected) < 0.02 * size, "{name}: {} of {size}", off(gradient, expected));
    }
    assert!(quantized.weights().filter(|(_, w)| matches!(w, Matrix::Quantized(_))).count() == 16);
}

#[test]
fn adapters_go_round_and_what_cannot_be_read_is_named() {
    let lora = lora(&["q_proj", "down_proj"]);
    let base = || Llama::init(&config(true), 1, DType::F32, &CPU).unwrap();
    let model = adapted(base(), &lora);
    let dir = tempfile::tempdir().unwrap();
    model.save_adapter(dir.path(), "the/base").unwrap();
    assert_eq!(LlamaConfig::load(dir.path()).unwrap().landmarks, model.config().landmarks);
    let again = base().with_adapter(dir.path()).unwrap();
    assert_eq!(again.lora(), Some(&lora));
    for (name, var) in model.parameters() {
        assert_eq!(off(var, &again.parameters()[name]), 0., "{name}");
    }
    assert!(base().save_adapter(dir.path(), "").is_err());

    let path = dir.path().join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to, expected) in [
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
        ("\"fan_in_fan_out\": false", "\"use_dora\": true", "use_dora"),
        ("\"r\": 3", "\"r\": 4", "lora_A"),
        ("\"q_proj\"", "\"wte\"", "lora_target_modules"),
        ("30", "29", "trainable_token_indices"),
        ("{", "[", "adapter_config.json"),
    ] {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        fs::write(&path, changed).unwrap();
        let error = base().with_adapter(dir.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    fs::write(&path, text).unwrap();
    let weights = dir.path().join("adapter_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    assert!(base().with_adapter(dir.path()).unwrap_err().to_string().contains("adapter_model.safetensors"));
    for wrong in [LoraConfig { r: 0, ..lora.clone() }, LoraConfig { lora_dropout: 1., ..lora.clone() }] {
        assert!(base().with_lora(&wrong, 0).is_err());
    }
}
