//! Models from GGUF files: their weights stay quantized in memory, as the file has them.
//!
//! A GGUF of the LLaMA architecture has the rows of queries and keys in the order of interleaved rotary pairs. Here they are put back into
//! Hugging Face's order, which moves whole rows and changes no bit of them: one model, and adapters that fit both.

mod tokenizer;

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device};
use serde_json::Map;

use super::config::{Architecture, LlamaConfig};
use super::matrix::Matrix;
use super::model::Llama;
use super::parameters::{self, EMBEDDING, HEAD, NORM};
use super::rope::RopeScaling;
use crate::files::at;
use crate::{Error, Result};

/// The factors on the rotary frequencies of a LLaMA 3.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A GGUF file of a model of this family.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    content: Content,
}

impl Gguf {
    /// Reads what the file says of itself; its weights stay where they are.
    ///
    /// # Errors
    /// No GGUF, or one that is damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let mut file = BufReader::new(File::open(&path).map_err(at(&path))?);
        // The reader checks what it reads, but for an alignment of 0, by which it divides.
        let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut file)))
            .unwrap_or_else(|_| Err(candle_core::Error::Msg("damaged: its reader failed".into())));
        let content = content.map_err(|source| Error::WeightsFile { path: path.clone(), source })?;
        Ok(Self { path, content })
    }

    /// The configuration.
    ///
    /// # Errors
    /// A key of the file's metadata by its name: missing, of another type, outside its range, or one that asks for what is not built here.
    pub fn config(&self) -> Result<LlamaConfig> {
        let name = self.required("general.architecture", |value| value.to_string().ok().cloned())?;
        let architecture = match Architecture::named(&name) {
            Some(architecture) if architecture.name() == name => architecture,
            _ => return self.wrong("general.architecture", &format!("{name}, expected llama, qwen2 or qwen3")),
        };
        let key = |field: &str| format!("{name}.{field}");
        let size = |field: &str| self.optional(&key(field), as_size);
        let required = |field: &str| self.required(&key(field), as_size);
        let number = |field: &str| self.optional(&key(field), as_number);
        if size("expert_count")?.is_some_and(|experts| experts > 0) {
            return self.wrong(&key("expert_count"), "above 0, and a mixture of experts is not of this family");
        }
        let (hidden_size, heads) = (required("embedding_length")?, required("attention.head_count")?);
        let head_dim = size("attention.key_length")?.unwrap_or(hidden_size.checked_div(heads).unwrap_or(0));
        if size("attention.value_length")?.is_some_and(|length| length != head_dim) {
            return self.wrong(&key("attention.value_length"), &format!("not that of the keys, {head_dim}"));
        }
        if size("rope.dimension_count")?.is_some_and(|count| count != head_dim) {
            return self.wrong(&key("rope.dimension_count"), &format!("not the channels of a head, {head_dim}"));
        }
        let has = |tensor: &str| self.content.tensor_infos.contains_key(tensor);
        let Some(embedding) = self.content.tensor_infos.get("token_embd.weight") else {
            return Err(Error::MissingTensor { name: "token_embd.weight".into() });
        };
        let max_position_embeddings = required("context_length")?;
        let rope_theta = number("rope.freq_base")?.unwrap_or(10_000.);
        let mut config = LlamaConfig {
            architecture,
            vocab_size: embedding.shape.dims().first().copied().unwrap_or(0),
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            num_hidden_layers: required("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            rms_norm_eps: self.required(&key("attention.layer_norm_rms_epsilon"), as_number)?,
            max_position_embeddings,
            sliding_window: size("attention.sliding_window")?.filter(|&window| window > 0),
            rope_theta,
            rope_scaling: self.rope_scaling(&name, max_position_embeddings)?,
            attention_bias: has("blk.0.attn_q.bias") && architecture != Architecture::Qwen2,
            mlp_bias: has("blk.0.ffn_gate.bias"),
            tie_word_embeddings: !has("output.weight"),
            bos_token_id: self.optional("tokenizer.ggml.bos_token_id", as_id)?,
            eos_token_id: self.optional("tokenizer.ggml.eos_token_id", as_id)?.into_iter().collect(),
            landmarks: None,
            other: Map::new(),
        };
        config.validate()?;
        if has(ROPE_FACTORS) {
            config.rope_scaling = self.llama3(&config)?;
        }
        Ok(config)
    }

    /// The model, which does not learn.
    ///
    /// # Errors
    /// Those of [`Gguf::config`]; a tensor by its name: missing, of another shape, of a type that is not known here, or beyond the file's end.
    pub fn load(&self, device: &Device) -> Result<Llama> {
        let config = self.config()?;
        let mut weights = HashMap::new();
        let mut file = BufReader::new(File::open(&self.path).map_err(at(&self.path))?);
        let specification = parameters::specification(&config);
        // In the order of the file.
        let mut tensors: Vec<_> = self.content.tensor_infos.iter().filter(|(name, _)| *name != ROPE_FACTORS).collect();
        tensors.sort_by_key(|(_, info)| info.offset);
        for (theirs, info) in tensors {
            let unknown = || Error::UnknownTensor { name: theirs.clone() };
            let name = our_name(theirs).ok_or_else(unknown)?;
            // Before a byte of it is read.
            let shape = specification.get(&name).ok_or_else(unknown)?;
            if info.shape.dims() != shape {
                let (got, expected) = (format!("{:?}", info.shape.dims()), format!("{shape:?}"));
                return Err(Error::WrongTensor { name: theirs.clone(), got, expected });
            }
            let unreadable = |source: candle_core::Error| Error::WrongTensor {
                name: theirs.clone(),
                got: source.to_string(),
                expected: "one that can be read".into(),
            };
            let tensor = info.read(&mut file, self.content.tensor_data_offset, &Device::Cpu).map_err(unreadable)?;
            let is_permuted = config.architecture == Architecture::Llama
                && (name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj."));
            let tensor = if is_permuted { in_halves(&tensor, config.head_dim)? } else { tensor };
            let is_plain = matches!(info.ggml_dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
            let matrix = if is_plain || shape.len() == 1 {
                Matrix::Dense(tensor.dequantize(&Device::Cpu)?.to_dtype(DType::F32)?.to_device(device)?)
            } else if device.is_cpu() {
                Matrix::Quantized(Arc::new(tensor))
            } else {
                let storage = QStorage::from_data(tensor.data()?, device, tensor.dtype())?;
                Matrix::Quantized(Arc::new(QTensor::new(storage, shape.as_slice())?))
            };
            weights.insert(name, matrix);
        }
        Llama::frozen(&config, weights)
    }

    /// A string of the metadata, if it is there.
    fn string(&self, key: &str) -> Result<Option<String>> {
        self.optional(key, |value| value.to_string().ok().cloned())
    }

    fn optional<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.content.metadata.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => self.wrong(key, "of another type"),
            },
        }
    }

    fn required<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T> {
        match self.optional(key, read)? {
            Some(value) => Ok(value),
            None => self.wrong(key, "missing"),
        }
    }

    fn wrong<T>(&self, key: &str, how: &str) -> Result<T> {
        Err(Error::NoModel { path: self.path.clone(), reason: format!("{key} is {how}") })
    }

    fn rope_scaling(&self, name: &str, context: usize) -> Result<RopeScaling> {
        let key = |field: &str| format!("{name}.rope.scaling.{field}");
        let number = |field: &str| self.optional(&key(field), as_number);
        let kind = self.string(&key("type"))?.unwrap_or("none".into());
        let factor = || self.required(&key("factor"), as_number);
        match kind.as_str() {
            "none" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "yarn" => {
                let factor = factor()?;
                let original = self.optional(&key("original_context_length"), as_size)?.unwrap_or(context);
                let usual = RopeScaling::yarn_attention_factor(factor, None, None);
                Ok(RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    attention_factor: usual * number("attn_factor")?.unwrap_or(1.),
                    beta_fast: number("yarn_beta_fast")?.unwrap_or(32.),
                    beta_slow: number("yarn_beta_slow")?.unwrap_or(1.),
                    truncate: true,
                })
            }
            _ => self.wrong(&key("type"), &format!("{kind}, expected none, linear or yarn")),
        }
    }

    /// The scaling that the file's factors on the frequencies come from: all LLaMAs 3 have it but for the largest factor.
    fn llama3(&self, config: &LlamaConfig) -> Result<RopeScaling> {
        let wrong = |got: String| {
            let expected = "the factors of a LLaMA 3".to_string();
            Err(Error::WrongTensor { name: ROPE_FACTORS.into(), got, expected })
        };
        let info = &self.content.tensor_infos[ROPE_FACTORS];
        if info.shape.dims() != [config.head_dim / 2] || info.ggml_dtype != GgmlDType::F32 {
            return wrong(format!("{:?} of {:?}", info.shape.dims(), info.ggml_dtype));
        }
        let mut file = BufReader::new(File::open(&self.path).map_err(at(&self.path))?);
        let factors = info.read(&mut file, self.content.tensor_data_offset, &Device::Cpu)?;
        let factors = factors.dequantize(&Device::Cpu)?.to_vec1::<f32>()?;
        let scaling = RopeScaling::Llama3 {
            factor: factors.iter().copied().fold(0., f32::max).into(),
            low_freq_factor: 1.,
            high_freq_factor: 4.,
            original_max_position_embeddings: 8192,
        };
        let of = |scaling| LlamaConfig { rope_scaling: scaling, ..config.clone() }.rope(1).frequencies().to_vec();
        for ((usual, scaled), factor) in of(RopeScaling::Default).into_iter().zip(of(scaling)).zip(&factors) {
            let expected = usual / scaled;
            let off = (f64::from(*factor) / expected - 1.).abs();
            if off.is_nan() || off > 1e-3 {
                return wrong(format!("{factor} in the place of {expected}"));
            }
        }
        Ok(scaling)
    }
}

/// Hugging Face's name of a tensor.
fn our_name(theirs: &str) -> Option<String> {
    match theirs {
        "token_embd.weight" => return Some(EMBEDDING.into()),
        "output.weight" => return Some(HEAD.into()),
        "output_norm.weight" => return Some(NORM.into()),
        _ => {}
    }
    let (layer, rest) = theirs.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// Rows of heads whose rotary pairs are side by side, with the first of all pairs before the second of all.
fn in_halves(tensor: &QTensor, head_dim: usize) -> Result<QTensor> {
    let rows = tensor.shape().dims()[0];
    let bytes = tensor.data()?;
    let row = bytes.len() / rows;
    let mut out = Vec::with_capacity(bytes.len());
    for index in 0..rows {
        let (head, at) = (index / head_dim, index % head_dim);
        let (second, pair) = (at / (head_dim / 2), at % (head_dim / 2));
        out.extend_from_slice(&bytes[(head * head_dim + 2 * pair + second) * row..][..row]);
    }
    let storage = QStorage::from_data(out.into(), &Device::Cpu, tensor.dtype())?;
    Ok(QTensor::new(storage, tensor.shape().clone())?)
}

fn as_size(value: &Value) -> Option<usize> {
    match value {
        &Value::I8(value) => value.try_into().ok(),
        &Value::I16(value) => value.try_into().ok(),
        &Value::I32(value) => value.try_into().ok(),
        &Value::I64(value) => value.try_into().ok(),
        Value::Bool(_) => None,
        _ => usize::try_from(value.to_u64().ok()?).ok(),
    }
}

fn as_id(value: &Value) -> Option<u32> {
    as_size(value).and_then(|id| u32::try_from(id).ok())
}

fn as_number(value: &Value) -> Option<f64> {
    match *value {
        // The shortest decimal that is the same f32: what was written before it was rounded. 1e-5 is 9.999999747378752e-6 as f64.
        Value::F32(x) => x.to_string().parse().ok(),
        Value::F64(x) => Some(x),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
