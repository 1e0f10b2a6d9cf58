//! The LLaMA family against the same models written with plain tensor operations over the reference attention.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use landmark_attention::{LandmarkParams, Landmarks, reference};
use landmark_models::llama::{LandmarkConfig, Llama, LlamaConfig, Matrix};
use landmark_models::ops::{Gradients, Recording, Rounded};
use landmark_models::{Error, IGNORE};
use serde_json::{Value, json};

const CPU: Device = Device::Cpu;
const LANDMARK: u32 = 30;

fn config(changes: Value) -> LlamaConfig {
    let mut json = json!({
        "model_type": "llama", "vocab_size": 32, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "mem_id": LANDMARK, "mem_freq": 4, "train_context_length": 64,
    });
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    LlamaConfig::from_json(&json.to_string()).unwrap()
}

/// One of each family, with everything that their files can ask for.
fn configs() -> Vec<LlamaConfig> {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    });
    vec![
        config(json!({"model_type": "llama_with_landmark"})),
        config(json!({"rope_scaling": llama3, "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true})),
        config(json!({"model_type": "mistral", "rope_scaling": {"type": "linear", "factor": 2.0}})),
        config(json!({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}})),
        config(json!({
            "model_type": "qwen3", "tie_word_embeddings": true, "max_position_embeddings": 10,
            "rope_scaling": {"type": "dynamic", "factor": 4.0},
        })),
    ]
}

/// Every weight far from its usual start, so that none of them can be left out.
fn model(config: &LlamaConfig) -> Llama {
    let model = Llama::init(config, 1, DType::F64, &CPU).unwrap();
    for (seed, var) in model.parameters().values().enumerate() {
        let values = (0..var.elem_count()).map(|i| ((i * 7 + seed * 13) as f64 * 12.9898).sin() * 43758.5453);
        let values = values.map(|x| 0.6 * (x - x.floor() - 0.5) + if var.rank() == 1 { 0.5 } else { 0. });
        var.set(&Tensor::from_iter(values, &CPU).unwrap().reshape(var.shape()).unwrap()).unwrap();
    }
    model
}

/// Landmarks at regular places, and at others in each row.
fn windows() -> [(Tensor, Landmarks); 2] {
    let ids = |is_landmark: &dyn Fn(u32, u32) -> bool| {
        let rows: Vec<Vec<u32>> = (0..2)
            .map(|row| (0..13).map(|t| if is_landmark(row, t) { LANDMARK } else { (t * 7 + row * 5) % 29 }).collect())
            .collect();
        Tensor::new(rows, &CPU).unwrap()
    };
    let regular = ids(&|_, t| t % 5 == 4);
    let ragged = ids(&|row, t| (t + row) % 4 == 3 || t == 6);
    let mask = ragged.eq(LANDMARK).unwrap();
    [(regular, Landmarks::Every(5)), (ragged, Landmarks::Mask(mask))]
}

/// The same model in the plainest words.
struct Plain<'a> {
    config: &'a LlamaConfig,
    model: &'a Llama,
}

impl Plain<'_> {
    fn get(&self, name: &str) -> Option<&Tensor> {
        self.model.parameters().get(name).map(Var::as_tensor)
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let y = x.broadcast_matmul(&self.get(&format!("{name}.weight")).unwrap().t()?)?;
        match self.get(&format!("{name}.bias")) {
            Some(b) => y.broadcast_add(b),
            None => Ok(y),
        }
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let squares = (x.sqr()?.mean_keepdim(D::Minus1)? + self.config.rms_norm_eps)?;
        x.broadcast_div(&squares.sqrt()?)?.broadcast_mul(self.get(&format!("{name}.weight")).unwrap())
    }

    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (time, dim) = (x.dim(2)?, x.dim(3)?);
        let rope = self.config.rope(time);
        let angles = (0..time).flat_map(|t| rope.frequencies().iter().map(move |f| t as f64 * f));
        let angles = Tensor::from_iter(angles, &CPU)?.reshape((time, dim / 2))?;
        // Of YaRN; the factor of this test's model.
        let scale = if self.config.to_json().contains("yarn") { 0.1 * 4f64.ln() + 1. } else { 1. };
        let (cos, sin) = ((angles.cos()? * scale)?, (angles.sin()? * scale)?);
        let (a, b) = (x.narrow(3, 0, dim / 2)?, x.narrow(3, dim / 2, dim / 2)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], 3)
    }

    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, time, width) = x.dims3()?;
        x.reshape((batch, time, width / self.config.head_dim, self.config.head_dim))?.transpose(1, 2)
    }

    fn loss(&self, ids: &Tensor, targets: &Tensor, landmarks: &Landmarks) -> Result<Tensor> {
        let (batch, time) = ids.dims2()?;
        let embedding = self.get("model.embed_tokens.weight").unwrap();
        let mut x = embedding.index_select(&ids.flatten_all()?, 0)?.reshape((batch, time, ()))?;
        for layer in 0..self.config.num_hidden_layers {
            let layer = format!("model.layers.{layer}");
            let normal = self.norm(&x, &format!("{layer}.input_layernorm"))?;
            let project = |name: &str| self.heads(&self.linear(&normal, &format!("{layer}.self_attn.{name}_proj"))?);
            let (mut q, mut k, v) = (project("q")?, project("k")?, project("v")?);
            if self.get(&format!("{layer}.self_attn.q_norm.weight")).is_some() {
                q = self.norm(&q, &format!("{layer}.self_attn.q_norm"))?;
                k = self.norm(&k, &format!("{layer}.self_attn.k_norm"))?;
            }
            let params = LandmarkParams::new(landmarks.clone());
            let o = reference::landmark_attention(&self.rotate(&q)?, &self.rotate(&k)?, &v.contiguous()?, &params)?;
            let o = o.transpose(1, 2)?.reshape((batch, time, ()))?;
            x = (x + self.linear(&o, &format!("{layer}.self_attn.o_proj"))?)?;
            let normal = self.norm(&x, &format!("{layer}.post_attention_layernorm"))?;
            let gate = self.linear(&normal, &format!("{layer}.mlp.gate_proj"))?;
            let silu = (&gate / (gate.neg()?.exp()? + 1.)?)?;
            let inner = (silu * self.linear(&normal, &format!("{layer}.mlp.up_proj"))?)?;
            x = (x + self.linear(&inner, &format!("{layer}.mlp.down_proj"))?)?;
        }
        let x = self.norm(&x, "model.norm")?;
        let head = self.get("lm_head.weight").unwrap_or(embedding);
        let logits = x.broadcast_matmul(&head.t()?)?.flatten(0, 1)?;
        let lse = logits.exp()?.sum_keepdim(1)?.log()?;
        let (mut places, mut wanted) = (Vec::new(), Vec::new());
        for (place, target) in (0u32..).zip(targets.flatten_all()?.to_vec1::<u32>()?) {
            if target != IGNORE {
                places.push(place);
                wanted.push(target);
            }
        }
        let n = wanted.len();
        let losses = lse.broadcast_sub(&logits)?.index_select(&Tensor::new(places, &CPU)?, 0)?;
        losses.gather(&Tensor::from_vec(wanted, (n, 1), &CPU)?, 1)?.mean_all()
    }
}

/// Next tokens; none where the next is a landmark.
fn targets(ids: &Tensor) -> Tensor {
    let rows = ids.to_vec2::<u32>().unwrap().into_iter();
    let shifted = rows.map(|row| -> Vec<u32> {
        let next = row[1..].iter().chain([&3]);
        next.map(|&id| if id == LANDMARK { IGNORE } else { id }).collect()
    });
    Tensor::new(shifted.collect::<Vec<_>>(), &CPU).unwrap()
}

fn off(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Loss and gradients in f64, by both ways back.
#[test]
fn gradients_are_those_of_the_reference() {
    for config in configs() {
        let model = model(&config);
        for (ids, landmarks) in windows() {
            let targets = targets(&ids);
            let expected = Plain { config: &config, model: &model }.loss(&ids, &targets, &landmarks).unwrap();
            let expected_grads = expected.backward().unwrap();
            for record in [false, true] {
                let recording = record.then(|| Recording::start(&Rounded::default()));
                let mut attention = model.window_attention(&ids).unwrap();
                let loss = model.loss(&model.hidden(&ids, &mut attention).unwrap(), &targets, None).unwrap();
                assert!(off(&loss, &expected) < 1e-12, "{:?}: {loss} {expected}", config.architecture);
                let mut grads: Gradients = match recording {
                    Some(recording) => recording.backward(&loss).unwrap(),
                    None => loss.backward().unwrap().into(),
                };
                for (name, var) in model.parameters() {
                    let got = grads.remove(var).unwrap_or_else(|| panic!("{name} has no gradient"));
                    let expected = expected_grads.get(var).unwrap();
                    let size =
                        expected.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
                    assert!(size > 1e-6, "{name}: the test has no gradient of it");
                    assert!(off(&got, expected) < 1e-9, "{name}: off by {:e}", off(&got, expected));
                }
            }
        }
    }
}

#[test]
fn layers_that_are_computed_again_change_no_bit() {
    for config in configs() {
        let (ids, _) = &windows()[1];
        let run = |again: bool| {
            let model = model(&config).with_activation_checkpointing(again);
            let recording = Recording::start(&Rounded::default());
            let mut attention = model.window_attention(ids).unwrap();
            let loss = model.loss(&model.hidden(ids, &mut attention).unwrap(), &targets(ids), None).unwrap();
            let mut grads = recording.backward(&loss).unwrap();
            let bits = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits);
            let grads = model.parameters().values().map(|var| grads.remove(var).expect("of every parameter"));
            grads.chain([loss.clone()]).flat_map(bits).collect::<Vec<_>>()
        };
        assert_eq!(run(true), run(false), "{:?}", config.architecture);
    }
}

#[test]
fn what_does_not_learn_computes_the_same() {
    let config = configs().remove(1);
    let model = model(&config);
    let (ids, _) = &windows()[0];
    let hidden = |model: &Llama| model.hidden(ids, &mut model.window_attention(ids).unwrap()).unwrap();
    let expected = hidden(&model);
    let detached = model.detached();
    assert!(!hidden(&detached).track_op() && off(&hidden(&detached), &expected) == 0.);
    let names = model.parameters().len();
    let frozen = model.freeze().unwrap();
    assert!(frozen.parameters().is_empty() && frozen.weights().count() == names);
    assert!(!hidden(&frozen).track_op() && off(&hidden(&frozen), &expected) == 0.);
}

#[test]
fn windows_are_checked() {
    let config = config(json!({"model_type": "mistral", "sliding_window": 12}));
    let model = model(&config);
    let (ids, _) = &windows()[0];
    assert!(matches!(model.window_attention(ids), Err(Error::Shape { tensor: "ids", .. })));
    let ids = ids.narrow(1, 0, 12).unwrap();
    let mut attention = model.window_attention(&ids).unwrap();
    model.hidden(&ids, &mut attention).unwrap();
    assert!(matches!(model.hidden(&ids.get(0).unwrap(), &mut attention), Err(Error::Shape { tensor: "ids", .. })));
    let beyond = Tensor::full(32u32, (1, 3), &CPU).unwrap();
    let mut attention = model.window_attention(&beyond).unwrap();
    assert!(matches!(model.hidden(&beyond, &mut attention), Err(Error::Value { name: "tokens", .. })));
    // A batch that the attention was not made for.
    assert!(model.hidden(&ids, &mut attention).is_err());
}

#[test]
fn the_landmark_begins_as_the_mean_of_the_tokens() {
    let plain = json!({"mem_id": null, "mem_freq": null});
    let landmarks =
        |mem_id| LandmarkConfig { mem_id, mem_freq: 4, train_context_length: 64, include_landmark_in_loss: true };
    for tied in [false, true] {
        let mut plain = plain.clone();
        plain["tie_word_embeddings"] = tied.into();
        let tables =
            if tied { vec!["model.embed_tokens.weight"] } else { vec!["model.embed_tokens.weight", "lm_head.weight"] };
        // In the padding; right after the table; one further on.
        for (known, mem_id, rows) in [(20, 20, 32), (32, 32, 33), (32, 33, 34)] {
            for freeze in [false, true] {
                let base = model(&config(plain.clone()));
                let before: HashMap<&str, Tensor> = tables
                    .iter()
                    .map(|&name| (name, base.parameters()[name].as_detached_tensor().copy().unwrap()))
                    .collect();
                let base = if freeze { base.freeze().unwrap() } else { base };
                let model = base.with_landmarks(landmarks(mem_id), known).unwrap();
                assert_eq!((model.config().vocab_size, model.config().landmarks), (rows, Some(landmarks(mem_id))));
                assert_eq!(model.parameters().is_empty(), freeze);
                for (&name, before) in &before {
                    let (_, after) = model.weights().find(|(other, _)| *other == name).unwrap();
                    let Matrix::Dense(after) = after else { panic!() };
                    assert_eq!(after.dims(), [rows, 24]);
                    let mean = before.narrow(0, 0, known).unwrap().mean(0).unwrap();
                    assert!(off(&after.get(mem_id as usize).unwrap(), &mean) < 1e-15);
                    for row in (0..32).filter(|&row| row != mem_id as usize) {
                        assert_eq!(off(&after.get(row).unwrap(), &before.get(row).unwrap()), 0.);
                    }
                }
                let ids = Tensor::new(&[[1u32, 2, 3, 4, mem_id, 5]], &CPU).unwrap();
                let mut attention = model.window_attention(&ids).unwrap();
                let logits = model.logits(&model.hidden(&ids, &mut attention).unwrap()).unwrap();
                assert_eq!(logits.dims(), [1, 6, rows]);
            }
        }
        for (known, mem_id, field) in [(20, 19, "mem_id"), (20, 900, "mem_id"), (33, 33, "known"), (0, 1, "known")] {
            let error = model(&config(plain.clone())).with_landmarks(landmarks(mem_id), known).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}

#[test]
fn weights_are_checked() {
    let config = config(json!({}));
    let tensors = || -> HashMap<String, Tensor> {
        model(&config).parameters().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
    };
    let name = "model.layers.1.self_attn.k_proj.weight";
    let mut missing = tensors();
    missing.remove(name);
    let error = Llama::from_tensors(&config, missing).unwrap_err();
    assert!(matches!(&error, Error::MissingTensor { name: got } if got == name), "{error}");
    let mut wrong = tensors();
    wrong.insert(name.into(), Tensor::zeros((24, 24), DType::F64, &CPU).unwrap());
    let error = Llama::from_tensors(&config, wrong).unwrap_err();
    assert!(matches!(&error, Error::WrongTensor { name: got, .. } if got == name), "{error}");
    let mut mixed = tensors();
    mixed.insert(name.into(), Tensor::zeros((16, 24), DType::F32, &CPU).unwrap());
    let error = Llama::from_tensors(&config, mixed).unwrap_err();
    assert!(matches!(&error, Error::WrongTensor { name: got, .. } if got == name), "{error}");
    let mut more = tensors();
    more.insert("model.layers.2.self_attn.k_proj.weight".into(), Tensor::zeros((16, 24), DType::F64, &CPU).unwrap());
    assert!(matches!(Llama::from_tensors(&config, more), Err(Error::UnknownTensor { .. })));
    // What old checkpoints have beside.
    let mut old = tensors();
    old.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), Tensor::zeros(4, DType::F32, &CPU).unwrap());
    Llama::from_tensors(&config, old).unwrap();
}
