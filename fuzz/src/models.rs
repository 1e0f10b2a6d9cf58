//! Models: small ones, and their files with other bytes in the place of one of them.

use std::cell::OnceCell;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device};
use landmark_data::Tokenizer;
use landmark_inference::{
    CacheFlags, DeviceChoice, DeviceFlags, Message, ModelFlags, Opened, Reader, Role, Sampler, SamplingFlags, Template,
};
use landmark_models::gpt::{Gpt, GptConfig};
use landmark_models::llama::{Gguf, LandmarkConfig, Llama, LlamaConfig, LoraConfig};
use serde_json::json;

use crate::place::{self, put};

/// The flags for the model in a folder or a file.
pub fn flags(checkpoint: &Path, adapter: Option<PathBuf>, tokenizer: Option<&str>) -> ModelFlags {
    let device = DeviceFlags { device: DeviceChoice::Cpu, dtype: None };
    ModelFlags { checkpoint: checkpoint.to_path_buf(), adapter, tokenizer: tokenizer.map(str::to_string), device }
}

/// A GPT with landmarks, two layers of two heads with four channels.
pub fn write_gpt(folder: &Path) {
    let config = GptConfig {
        vocab_size: 258,
        landmark_id: 257,
        n_embd: 8,
        n_head: 2,
        n_layer: 2,
        sequence_length: 32,
        mem_freq: Some(4),
        ..GptConfig::default()
    };
    Gpt::init(&config, 1, DType::F32, &Device::Cpu).and_then(|gpt| gpt.save(folder)).expect("a GPT can be written");
    Tokenizer::bytes().save(folder).expect("a tokenizer can be written");
}

fn llama(vocabulary: usize) -> Llama {
    let config = json!({
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": true, "rms_norm_eps": 1e-5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    });
    let config = LlamaConfig::from_json(&config.to_string()).expect("a configuration");
    Llama::init(&config, 1, DType::F32, &Device::Cpu).expect("a LLaMA can be made")
}

const CHAT: &str =
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}\n{% endfor %}<|assistant|>";

fn write_llama(folder: &Path) {
    llama(258).save(folder, DType::F32).expect("a LLaMA can be written");
    Tokenizer::bytes().save(folder).expect("a tokenizer can be written");
    let settings = json!({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "add_bos_token": true, "chat_template": CHAT});
    put(&folder.join("tokenizer_config.json"), settings.to_string().as_bytes());
    let generation =
        json!({"eos_token_id": [256, 10], "temperature": 0.5, "top_p": 0.9, "top_k": 5, "do_sample": true});
    put(&folder.join("generation_config.json"), generation.to_string().as_bytes());
}

fn write_adapter(folder: &Path) {
    let landmarks =
        LandmarkConfig { mem_id: 257, mem_freq: 4, train_context_length: 32, include_landmark_in_loss: true };
    let lora = LoraConfig { r: 1, ..LoraConfig::default() };
    let model = llama(258).with_landmarks(landmarks, 257).and_then(|model| model.with_lora(&lora, 1));
    model.and_then(|model| model.save_adapter(folder, "base")).expect("an adapter can be written");
}

/// The small LLaMA as a GGUF file, with a tokenizer of a few letters.
fn gguf_file() -> Vec<u8> {
    let letters = "Ane was27.Shrdo,\u{120}\u{10a}".chars().filter(|letter| *letter != ' ').map(String::from);
    let letters = letters.chain(["Sh", "<|endoftext|>", "<landmark>"].map(String::from));
    let tokens: Vec<Value> = letters.map(Value::String).collect();
    let special = tokens.len() - 2;
    let model = llama(tokens.len());
    let types = (0..tokens.len()).map(|id| Value::I32(if id < special { 1 } else { 3 })).collect();
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", Value::U32(1)),
        ("llama.context_length", Value::U32(64)),
        ("llama.embedding_length", Value::U32(8)),
        ("llama.feed_forward_length", Value::U32(8)),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.attention.head_count_kv", Value::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(1e4)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens", Value::Array(tokens)),
        ("tokenizer.ggml.token_type", Value::Array(types)),
        ("tokenizer.ggml.merges", Value::Array(vec![Value::String("S h".into())])),
        ("tokenizer.ggml.eos_token_id", Value::U32(special as u32)),
        ("tokenizer.chat_template", Value::String(CHAT.into())),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let name = |ours: &str| {
        let layer = ours.strip_prefix("model.layers.0.");
        let part = layer.and_then(|part| part.strip_suffix(".weight")).map(|part| match part {
            "input_layernorm" => "attn_norm",
            "post_attention_layernorm" => "ffn_norm",
            "self_attn.o_proj" => "attn_output",
            part => &part[part.len() - "q_proj".len()..],
        });
        match part {
            None if ours.contains("embed") => "token_embd.weight".to_string(),
            None => "output_norm.weight".to_string(),
            Some("q_proj") => "blk.0.attn_q.weight".to_string(),
            Some("k_proj") => "blk.0.attn_k.weight".to_string(),
            Some("v_proj") => "blk.0.attn_v.weight".to_string(),
            Some("e_proj") => "blk.0.ffn_gate.weight".to_string(),
            Some("p_proj") => "blk.0.ffn_up.weight".to_string(),
            Some("n_proj") => "blk.0.ffn_down.weight".to_string(),
            Some(part) => format!("blk.0.{part}.weight"),
        }
    };
    let tensors = model.weights().map(|(ours, w)| {
        let w = w.dense().and_then(|w| Ok(QTensor::quantize(&w, GgmlDType::F32)?)).expect("a matrix");
        (name(ours), w)
    });
    let tensors: Vec<(String, QTensor)> = tensors.collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, w)| (name.as_str(), w)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &tensors).expect("a file in memory");
    bytes.into_inner()
}

/// Reads a text with a model that could be opened, and goes on with it.
fn use_model(opened: Opened) -> anyhow::Result<()> {
    let Opened { model, pretrained, .. } = opened;
    if let Some(source) = pretrained.chat_template.clone() {
        let template = Template::new(source, pretrained.bos_token.clone(), pretrained.eos_token.clone())?;
        template.render(&[Message { role: Role::User, content: "Hello".into() }])?;
    }
    let mut reader = Reader::of_pretrained(model, &pretrained, &CacheFlags::default())?;
    let text = pretrained.tokenizer.encode("Anne was 27. She\nread on.")?;
    reader.read(&[&pretrained.begin[..], &text].concat(), |_| true)?;
    let flags = SamplingFlags { temperature: None, top_p: None, top_k: None, seed: 1 };
    let mut sampler = Sampler::new(&flags, reader.sampling())?;
    reader.generate(3, &mut sampler, |_| Ok(true))?;
    Ok(())
}

/// Folders of models, and their files.
struct Folders {
    place: PathBuf,
    files: Vec<(&'static str, String, Vec<u8>)>,
}

fn with_folders<T>(work: impl FnOnce(&Folders) -> T) -> T {
    thread_local! {
        static FOLDERS: OnceCell<Folders> = const { OnceCell::new() };
    }
    let make = || {
        let place = place::folder("models");
        let names = ["gpt", "llama", "shards", "adapter"];
        names.iter().for_each(|name| place::fill(&place.join(name), &[]));
        write_gpt(&place.join("gpt"));
        write_llama(&place.join("llama"));
        write_llama(&place.join("shards"));
        write_adapter(&place.join("adapter"));
        let shards = place.join("shards");
        fs::rename(shards.join("model.safetensors"), shards.join("model-1.safetensors"))
            .expect("a file can be renamed");
        let names_of_weights =
            llama(258).weights().map(|(name, _)| (name.to_string(), json!("model-1.safetensors"))).collect();
        let index = json!({"weight_map": serde_json::Value::Object(names_of_weights)});
        put(&shards.join("model.safetensors.index.json"), index.to_string().as_bytes());
        let files = |name: &&'static str| {
            let name: &'static str = name;
            place::files(&place.join(name)).into_iter().map(move |(file, bytes)| (name, file, bytes))
        };
        Folders { files: names.iter().flat_map(files).collect(), place }
    };
    FOLDERS.with(|folders| work(folders.get_or_init(make)))
}

/// The first byte says which file of which model the rest takes the place of.
pub fn folder(bytes: &[u8]) -> bool {
    with_folders(|Folders { place, files }| {
        let Some((&number, bytes)) = bytes.split_first() else { return false };
        let Some((folder, name, whole)) = files.get(usize::from(number)) else { return false };
        let path = place.join(folder).join(name);
        put(&path, bytes);
        let flags = match *folder {
            "adapter" => flags(&place.join("llama"), Some(place.join(folder)), None),
            folder => flags(&place.join(folder), None, None),
        };
        let is_model = Opened::open(&flags).and_then(use_model).is_ok();
        put(&path, whole);
        is_model
    })
}

pub fn folder_seeds() -> Vec<Vec<u8>> {
    with_folders(|Folders { files, .. }| {
        (0u8..).zip(files).map(|(number, (_, _, bytes))| [&[number][..], bytes].concat()).collect()
    })
}

/// A GGUF file.
pub fn gguf(bytes: &[u8]) -> bool {
    let path = place::folder("gguf").join("model.gguf");
    put(&path, bytes);
    let Ok(file) = Gguf::open(&path) else { return false };
    // Whatever its tokenizer is.
    let _ = file.load(&Device::Cpu);
    Opened::open(&flags(&path, None, None)).and_then(use_model).is_ok()
}

pub fn gguf_seeds() -> Vec<Vec<u8>> {
    vec![gguf_file()]
}
