//! The GPT against the authors' implementation, LLaMAs against `transformers`.

mod support;

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};
use landmark_models::gpt::{Gpt, GptConfig, SoftmaxFunc, Variant, WindowAttention};
use landmark_models::llama::{Llama, LlamaConfig};
use support::{Golden, assert_close, golden_file};

fn config() -> GptConfig {
    GptConfig {
        vocab_size: 96,
        n_embd: 32,
        n_head: 2,
        n_layer: 3,
        sequence_length: 256,
        mem_freq: Some(7),
        landmark_id: 90,
        ..GptConfig::default()
    }
}

fn check_logits(config: &GptConfig, weights: &str, case: &str) {
    for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
        let golden = Golden::read(case);
        let model = Gpt::from_tensors(config, Golden::read(weights).under("param.", dtype)).unwrap();
        let ids = golden.ids("input_ids");
        for model in [model.detached(), model] {
            let mut attention = WindowAttention::new(config, &ids, None).unwrap();
            let logits = model.logits(&model.hidden(&ids, &mut attention, None).unwrap()).unwrap();
            assert_close(&format!("{case} in {dtype:?}"), &logits, golden.get("logits"), tolerance);
        }
    }
}

#[test]
fn landmark_forward() {
    check_logits(&config(), "gpt_landmark_forward", "gpt_landmark_forward");
}

#[test]
fn softmax_nomem() {
    let config = GptConfig { softmax_func: SoftmaxFunc::NoMem, ..config() };
    check_logits(&config, "gpt_landmark_forward", "gpt_softmax_nomem");
}

#[test]
fn softmax_ignore_mem() {
    let config = GptConfig { softmax_func: SoftmaxFunc::IgnoreMem, ..config() };
    check_logits(&config, "gpt_landmark_forward", "gpt_softmax_ignore_mem");
}

#[test]
fn context_miss_forward() {
    let config = GptConfig { model: Variant::LandmarkWithCmt, ..config() };
    check_logits(&config, "gpt_cmt_forward", "gpt_cmt_forward");
}

#[test]
fn llamas() {
    for case in ["llama2_like", "llama3_like"] {
        let json = std::fs::read_to_string(golden_file(&format!("{case}.config.json"))).unwrap();
        let config = LlamaConfig::from_json(&json).unwrap();
        let golden = Golden::read(&format!("{case}_logits"));
        for dtype in [DType::F32, DType::F64] {
            let weights = Golden::read(&format!("{case}.model")).under("", dtype);
            let model = Llama::from_tensors(&config, weights).unwrap();
            let ids = golden.ids("input_ids");
            for model in [model.detached(), model] {
                let mut attention = model.window_attention(&ids).unwrap();
                let logits = model.logits(&model.hidden(&ids, &mut attention).unwrap()).unwrap();
                assert_close(&format!("{case} in {dtype:?}"), &logits, golden.get("logits"), 1e-4);
            }
        }
    }
}

#[test]
fn train_25_steps() {
    for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
        let golden = Golden::read("gpt_train_25_steps");
        let weights = Golden::read("gpt_landmark_forward").under("param.", dtype);
        let model = Gpt::from_tensors(&config(), weights).unwrap();
        let (inputs, targets) = (golden.ids("inputs"), golden.ids("targets"));
        let rates = golden.get("lrs").to_vec1::<f64>().unwrap();
        let mut moments = BTreeMap::new();
        for (step, rate) in rates.iter().enumerate() {
            let (ids, targets) = (inputs.get(step).unwrap(), targets.get(step).unwrap());
            let mut attention = WindowAttention::new(&config(), &ids, Some(step as u64)).unwrap();
            let hidden = model.hidden(&ids, &mut attention, Some(step as u64)).unwrap();
            let loss = model.loss(&hidden, &targets, None).unwrap();
            let what = format!("loss of step {step} in {dtype:?}");
            assert_close(&what, &loss, &golden.get("losses").get(step).unwrap(), tolerance);
            adamw(&model, &loss, &mut moments, step, *rate).unwrap();
        }
        for (name, expected) in golden.under("final.", DType::F64) {
            assert_close(&format!("{name} in {dtype:?}"), &model.parameters()[&name], &expected, tolerance);
        }
    }
}

/// One step of AdamW: betas 0.9 and 0.95, eps 1e-8, weight decay 1e-3 except on norms and the tied embedding.
fn adamw(
    model: &Gpt,
    loss: &Tensor,
    moments: &mut BTreeMap<String, (Tensor, Tensor)>,
    step: usize,
    rate: f64,
) -> Result<()> {
    let grads = loss.backward()?;
    let correction = |beta: f64| 1. - beta.powi(step as i32 + 1);
    for (name, parameter) in model.parameters() {
        let grad = grads.get(parameter).expect("a gradient for every parameter");
        let (m, v) = match moments.remove(name) {
            Some((m, v)) => (((m * 0.9)? + (grad * 0.1)?)?, ((v * 0.95)? + (grad.sqr()? * 0.05)?)?),
            None => ((grad * 0.1)?, (grad.sqr()? * 0.05)?),
        };
        let decay = if name.contains("ln_") || name.contains("wte") { 0. } else { 1e-3 };
        let denominator = ((&v / correction(0.95))?.sqrt()? + 1e-8)?;
        let update = ((&m / correction(0.9))? / denominator)?;
        parameter.set(&((parameter.as_tensor() * (1. - rate * decay))? - (update * rate)?)?)?;
        moments.insert(name.clone(), (m, v));
    }
    Ok(())
}
