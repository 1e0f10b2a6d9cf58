//! GGUF files of small models made here, whole and broken.

use std::fs;
use std::io::Cursor;

use candle_core::Tensor;
use candle_core::quantized::gguf_file;
use serde_json::json;

use super::*;

fn config(architecture: &str, tied: bool) -> LlamaConfig {
    let json = json!({
        "model_type": architecture, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 1e5, "max_position_embeddings": 8192,
    });
    LlamaConfig::from_json(&json.to_string()).unwrap()
}

/// Rows in the order that llama.cpp's converter gives them.
fn interleaved(w: &Tensor, head_dim: usize) -> Tensor {
    let rows = w.dims()[0] as u32;
    let dim = head_dim as u32;
    let order = (0..rows).map(|i| i / dim * dim + i % dim % 2 * (dim / 2) + i % dim / 2);
    w.index_select(&Tensor::from_iter(order, &Device::Cpu).unwrap(), 0).unwrap()
}

fn their_name(ours: &str) -> String {
    let rest = match ours {
        EMBEDDING => return "token_embd.weight".into(),
        HEAD => return "output.weight".into(),
        NORM => return "output_norm.weight".into(),
        _ => ours.strip_prefix("model.layers.").unwrap(),
    };
    let (layer, rest) = rest.split_once('.').unwrap();
    let names = [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    let (ours, theirs) = names.into_iter().find(|(ours, _)| rest.starts_with(ours)).unwrap();
    format!("blk.{layer}.{theirs}{}", rest.strip_prefix(ours).unwrap())
}

type Metadata = Vec<(String, Value)>;

fn metadata(config: &LlamaConfig) -> Metadata {
    let name = config.architecture.name();
    let size = |field: &str, size: usize| (format!("{name}.{field}"), Value::U32(size as u32));
    vec![
        ("general.architecture".into(), Value::String(name.into())),
        size("block_count", config.num_hidden_layers),
        size("context_length", config.max_position_embeddings),
        size("embedding_length", config.hidden_size),
        size("feed_forward_length", config.intermediate_size),
        size("attention.head_count", config.num_attention_heads),
        size("attention.head_count_kv", config.num_key_value_heads),
        size("attention.key_length", config.head_dim),
        (format!("{name}.attention.layer_norm_rms_epsilon"), Value::F32(1e-5)),
        (format!("{name}.rope.freq_base"), Value::F32(1e5)),
        ("tokenizer.ggml.bos_token_id".into(), Value::U32(1)),
        ("tokenizer.ggml.eos_token_id".into(), Value::U32(2)),
    ]
}

/// The model's file, matrices quantized.
fn file(model: &Llama, metadata: &Metadata, dtype: GgmlDType, more: &[(&str, Tensor)]) -> Vec<u8> {
    let config = model.config();
    let quantize = |name: &str, w: &Tensor| {
        let w = match name.contains(".q_proj.") || name.contains(".k_proj.") {
            true if config.architecture == Architecture::Llama => interleaved(w, config.head_dim),
            _ => w.clone(),
        };
        QTensor::quantize(&w, if w.rank() == 2 { dtype } else { GgmlDType::F32 }).unwrap()
    };
    let ours = model.weights().map(|(name, w)| (their_name(name), quantize(name, &w.dense().unwrap())));
    let more = more.iter().map(|(name, w)| (name.to_string(), quantize(name, w)));
    let tensors: Vec<(String, QTensor)> = ours.chain(more).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, w)| (name.as_str(), w)).collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &tensors).unwrap();
    bytes.into_inner()
}

fn opened(bytes: &[u8]) -> Result<Llama> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    Gguf::open(file.path())?.load(&Device::Cpu)
}

fn logits(model: &Llama) -> Vec<f32> {
    let ids = Tensor::new(&[[3u32, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8]], &Device::Cpu).unwrap();
    let hidden = model.hidden(&ids, &mut model.window_attention(&ids).unwrap()).unwrap();
    model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn off(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0., f32::max)
}

fn model(config: &LlamaConfig) -> Llama {
    let model = Llama::init(config, 5, DType::F32, &Device::Cpu).unwrap();
    // Ten times as large as at the start: attention that matters.
    for var in model.parameters().values().filter(|var| var.rank() == 2) {
        var.set(&(var.as_tensor() * 10.).unwrap()).unwrap();
    }
    model
}

#[test]
fn a_file_is_the_model_that_it_was_made_of() {
    for (architecture, tied) in [("llama", false), ("llama", true), ("qwen2", true), ("qwen3", false)] {
        let config = config(architecture, tied);
        let model = model(&config);
        let plain = opened(&file(&model, &metadata(&config), GgmlDType::F32, &[])).unwrap();
        assert_eq!(plain.config(), &config);
        assert!(off(&logits(&plain), &logits(&model)) < 1e-5);
        let quantized = opened(&file(&model, &metadata(&config), GgmlDType::Q8_0, &[])).unwrap();
        let is_kept = |w: &Matrix| matches!(w, Matrix::Quantized(_)) == (w.dims().len() == 2);
        assert!(quantized.weights().all(|(_, w)| is_kept(&w)));
        let size = logits(&model).iter().map(|x| x.abs()).fold(0., f32::max);
        let off = off(&logits(&quantized), &logits(&model));
        assert!(off > 0. && off < 0.05 * size, "{architecture}: {off} of {size}");
    }
}

#[test]
fn a_landmark_is_added_to_quantized_tables() {
    use crate::llama::LandmarkConfig;
    let config = config("llama", true);
    let base = opened(&file(&model(&config), &metadata(&config), GgmlDType::Q8_0, &[])).unwrap();
    let before = logits(&base);
    let landmarks =
        LandmarkConfig { mem_id: 40, mem_freq: 4, train_context_length: 64, include_landmark_in_loss: true };
    let with = base.with_landmarks(landmarks, 40).unwrap();
    // The others' logits are what they were.
    let after = logits(&with);
    let kept: Vec<f32> = after.chunks(41).flat_map(|row| row[..40].to_vec()).collect();
    assert_eq!(off(&kept, &before), 0.);
}

#[test]
fn llama_3s_factors_are_recognised() {
    let config = config("llama", true);
    let model = model(&config);
    let llama3 = RopeScaling::Llama3 {
        factor: 32.,
        low_freq_factor: 1.,
        high_freq_factor: 4.,
        original_max_position_embeddings: 8192,
    };
    let of = |scaling| LlamaConfig { rope_scaling: scaling, ..config.clone() }.rope(1).frequencies().to_vec();
    let factors: Vec<f32> = of(RopeScaling::Default).iter().zip(of(llama3)).map(|(a, b)| (a / b) as f32).collect();
    let with = |factors: Vec<f32>| {
        let factors = Tensor::from_vec(factors, 8, &Device::Cpu).unwrap();
        opened(&file(&model, &metadata(&config), GgmlDType::F32, &[(ROPE_FACTORS, factors)]))
    };
    assert_eq!(with(factors.clone()).unwrap().config().rope_scaling, llama3);
    let mut others = factors;
    others[3] *= 1.5;
    let error = with(others).unwrap_err().to_string();
    assert!(error.contains(ROPE_FACTORS), "{error}");
}

#[test]
fn what_cannot_be_read_is_named() {
    let config = config("llama", false);
    let model = model(&config);
    let changed = |key: &str, value: Option<Value>| {
        let mut metadata = metadata(&config);
        metadata.retain(|(other, _)| other != key);
        metadata.extend(value.map(|value| (key.to_string(), value)));
        opened(&file(&model, &metadata, GgmlDType::F32, &[])).unwrap_err().to_string()
    };
    for (key, value) in [
        ("general.architecture", None),
        ("general.architecture", Some(Value::String("gemma".into()))),
        ("general.architecture", Some(Value::U32(1))),
        ("llama.block_count", None),
        ("llama.block_count", Some(Value::String("two".into()))),
        ("llama.embedding_length", Some(Value::I32(-3))),
        ("llama.attention.layer_norm_rms_epsilon", None),
        ("llama.rope.dimension_count", Some(Value::U32(8))),
        ("llama.rope.scaling.type", Some(Value::String("longrope".into()))),
        ("llama.expert_count", Some(Value::U32(8))),
        ("llama.attention.head_count_kv", Some(Value::Array(vec![Value::U32(2)]))),
    ] {
        let error = changed(key, value.clone());
        assert!(error.contains(key), "{key} {value:?}: {error}");
    }
    // Sizes that nothing could be allocated for.
    for (key, value) in [
        ("llama.block_count", Value::U32(u32::MAX)),
        ("llama.attention.head_count", Value::U32(0)),
        ("llama.attention.head_count_kv", Value::U32(3)),
        ("llama.feed_forward_length", Value::U32(1 << 30)),
        ("llama.context_length", Value::U64(1 << 50)),
    ] {
        assert!(!changed(key, Some(value)).is_empty());
    }
    let more = [("blk.0.attn_sinks.weight", Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap())];
    let error = opened(&file(&model, &metadata(&config), GgmlDType::F32, &more)).unwrap_err().to_string();
    assert!(error.contains("attn_sinks"), "{error}");
    let more = [("blk.1.attn_q.weight", Tensor::zeros((64, 64), DType::F32, &Device::Cpu).unwrap())];
    let error = opened(&file(&model, &metadata(&config), GgmlDType::F32, &more)).unwrap_err().to_string();
    assert!(error.contains("blk.1.attn_q.weight") && error.contains("[64, 64]"), "{error}");
}

/// Cut short at any place, or with any byte of the header changed, a file is an error or a model; it is never a panic.
#[test]
fn hostile_files_are_errors() {
    let config = config("llama", true);
    let whole = file(&model(&config), &metadata(&config), GgmlDType::Q8_0, &[]);
    opened(&whole).unwrap();
    for length in (0..3000).step_by(13).chain([whole.len() - 1, whole.len() / 2]) {
        assert!(opened(&whole[..length]).is_err(), "{length}");
    }
    for place in (0..3000).step_by(7) {
        for value in [0, 1, 0x7f, 0xff] {
            let mut changed = whole.clone();
            changed[place] = value;
            let _ = opened(&changed);
        }
    }
    let mut alignment = metadata(&config);
    alignment.push(("general.alignment".into(), Value::U32(0)));
    let error = opened(&file(&model(&config), &alignment, GgmlDType::Q8_0, &[])).unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
}
