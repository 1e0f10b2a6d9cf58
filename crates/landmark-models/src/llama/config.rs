//! The configuration of a LLaMA, as a Hugging Face folder's `config.json` has it.

use landmark_attention::Rope;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::rope::RopeScaling;
use crate::{Error, Result};

/// Which family's conventions hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// LLaMA 1, 2, 3 and what is built like them.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2 and Qwen2.5: queries, keys and values have biases.
    Qwen2,
    /// Qwen3: queries and keys are normalised.
    Qwen3,
}

/// `model_type` of a LLaMA with landmarks, as its authors spell it.
const WITH_LANDMARK: &str = "llama_with_landmark";

impl Architecture {
    /// Hugging Face's `model_type`, or a GGUF's `general.architecture`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "llama" | WITH_LANDMARK => Some(Self::Llama),
            "mistral" => Some(Self::Mistral),
            "qwen2" => Some(Self::Qwen2),
            "qwen3" => Some(Self::Qwen3),
            _ => None,
        }
    }

    /// `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The class of `transformers` that runs it.
    fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// What a model with landmarks says of them, under the authors' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LandmarkConfig {
    /// The landmark's token id.
    pub mem_id: u32,
    /// Ordinary tokens of a block.
    pub mem_freq: usize,
    /// The training window, landmarks included.
    pub train_context_length: usize,
    /// Whether the token after a landmark is a target in training.
    pub include_landmark_in_loss: bool,
}

/// A model of the LLaMA family: sizes, conventions, positions and landmarks. Read with [`LlamaConfig::from_json`].
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Which family.
    pub architecture: Architecture,
    /// Rows of the embedding: entries of the vocabulary, and of the padding after it if there is any.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between up and down of the feed-forward half.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values, each shared by as many heads of queries.
    pub num_key_value_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// What keeps the norms finite.
    pub rms_norm_eps: f64,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// The farthest that a token sees, for a model that was trained so. Here such a model is run within that distance only, where it makes no
    /// difference.
    pub sliding_window: Option<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How they are stretched.
    pub rope_scaling: RopeScaling,
    /// Whether the projections of attention have biases (Qwen2's have some in any case).
    pub attention_bias: bool,
    /// Whether those of the feed-forward half have.
    pub mlp_bias: bool,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Those that end one.
    pub eos_token_id: Vec<u32>,
    /// The landmarks, if the model was trained with some.
    pub landmarks: Option<LandmarkConfig>,
    /// What else the file says: kept for when it is written again.
    pub other: Map<String, Value>,
}

impl LlamaConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// A field by its name: missing, of another type, outside its range, or one that asks for what is not built here.
    pub fn from_json(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).map_err(|source| Error::Json { what: "config.json", source })?;
        let Value::Object(map) = value else {
            return wrong("config.json", &value, "an object");
        };
        let mut fields = Fields(map);
        let model_type: String = fields.required("model_type")?;
        let Some(architecture) = Architecture::named(&model_type) else {
            return wrong("model_type", &model_type.into(), "llama, llama_with_landmark, mistral, qwen2 or qwen3");
        };
        let act: String = fields.or("hidden_act", "silu".into())?;
        if act != "silu" {
            return wrong("hidden_act", &act.into(), "silu");
        }
        if let Some(quantization) = fields.take::<Value>("quantization_config")? {
            return wrong("quantization_config", &quantization, "none: quantized models are read from GGUF files");
        }
        let heads: usize = fields.required("num_attention_heads")?;
        let hidden_size: usize = fields.required("hidden_size")?;
        let is_qwen = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3);
        let key_value_heads = match fields.nullable("num_key_value_heads")? {
            Some(given) => given.unwrap_or(heads),
            None if is_qwen => 32,
            None if architecture == Architecture::Mistral => 8,
            None => heads,
        };
        let derived = hidden_size.checked_div(heads).unwrap_or(0);
        let usual_dim = if architecture == Architecture::Qwen3 { 128 } else { derived };
        let max_position_embeddings = match architecture {
            Architecture::Llama => 2048,
            Architecture::Mistral => 131_072,
            Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
        };
        let max_position_embeddings = fields.or("max_position_embeddings", max_position_embeddings)?;
        let (rope_theta, rope_scaling) = rope(&mut fields, max_position_embeddings)?;
        let config = Self {
            architecture,
            vocab_size: fields.required("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required("intermediate_size")?,
            num_hidden_layers: fields.required("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: key_value_heads,
            head_dim: fields.or("head_dim", usual_dim)?,
            rms_norm_eps: fields.or("rms_norm_eps", 1e-6)?,
            max_position_embeddings,
            sliding_window: sliding_window(&mut fields, architecture)?,
            rope_theta,
            rope_scaling,
            attention_bias: fields.or("attention_bias", false)?,
            mlp_bias: fields.or("mlp_bias", false)?,
            tie_word_embeddings: fields.or("tie_word_embeddings", false)?,
            bos_token_id: fields.take("bos_token_id")?,
            eos_token_id: eos(&mut fields)?,
            landmarks: landmarks(&mut fields, model_type == WITH_LANDMARK)?,
            other: fields.0,
        };
        config.validate()?;
        Ok(config)
    }

    /// The `config.json` that `transformers` reads, and of a LLaMA with landmarks the authors' code.
    pub fn to_json(&self) -> String {
        let mut map = self.other.clone();
        let mut set = |name: &str, value: Value| _ = map.insert(name.to_string(), value);
        set("architectures", json!([self.architecture.class()]));
        set("model_type", json!(self.model_type()));
        set("vocab_size", json!(self.vocab_size));
        set("hidden_size", json!(self.hidden_size));
        set("intermediate_size", json!(self.intermediate_size));
        set("num_hidden_layers", json!(self.num_hidden_layers));
        set("num_attention_heads", json!(self.num_attention_heads));
        set("num_key_value_heads", json!(self.num_key_value_heads));
        set("head_dim", json!(self.head_dim));
        set("hidden_act", json!("silu"));
        set("rms_norm_eps", json!(self.rms_norm_eps));
        set("max_position_embeddings", json!(self.max_position_embeddings));
        if self.architecture != Architecture::Llama {
            set("sliding_window", json!(self.sliding_window));
        }
        set("rope_theta", json!(self.rope_theta));
        set("rope_scaling", self.rope_scaling.to_json());
        if self.architecture != Architecture::Qwen2 && self.architecture != Architecture::Mistral {
            set("attention_bias", json!(self.attention_bias));
        }
        if self.architecture == Architecture::Llama {
            set("mlp_bias", json!(self.mlp_bias));
        }
        set("tie_word_embeddings", json!(self.tie_word_embeddings));
        set("bos_token_id", json!(self.bos_token_id));
        let eos = match *self.eos_token_id {
            [] => Value::Null,
            [one] => json!(one),
            ref several => json!(several),
        };
        set("eos_token_id", eos);
        if let Some(landmarks) = self.landmarks {
            set("mem_id", json!(landmarks.mem_id));
            set("mem_freq", json!(landmarks.mem_freq));
            set("train_context_length", json!(landmarks.train_context_length));
            set("include_landmark_in_loss", json!(landmarks.include_landmark_in_loss));
        }
        serde_json::to_string_pretty(&Value::Object(map)).expect("a map of strings to JSON is JSON") + "\n"
    }

    /// `model_type` of a `config.json`.
    pub fn model_type(&self) -> &'static str {
        match self.architecture {
            Architecture::Llama if self.landmarks.is_some() => WITH_LANDMARK,
            other => other.name(),
        }
    }

    /// Checks every field against its range and the others.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        // So large that no product of two of them overflows.
        if let Some((field, size)) = sizes.into_iter().find(|(_, size)| !(1..=1 << 30).contains(size)) {
            return wrong(field, &size.into(), "1 to 2^30");
        }
        if self.num_hidden_layers > 1 << 14 {
            return wrong("num_hidden_layers", &self.num_hidden_layers.into(), "1 to 16384");
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads, {}", self.num_attention_heads);
            return wrong("num_key_value_heads", &self.num_key_value_heads.into(), &expected);
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim < 4 {
            return wrong("head_dim", &self.head_dim.into(), "an even number from 4");
        }
        if !(self.rms_norm_eps > 0. && self.rms_norm_eps < 1.) {
            return wrong("rms_norm_eps", &self.rms_norm_eps.into(), "a number between 0 and 1");
        }
        if !(self.rope_theta > 1. && self.rope_theta.is_finite()) {
            return wrong("rope_theta", &self.rope_theta.into(), "a number above 1");
        }
        if self.sliding_window == Some(0) {
            return wrong("sliding_window", &0.into(), "at least 1, or null");
        }
        self.rope_scaling.validate()?;
        if let Some(LandmarkConfig { mem_id, mem_freq, train_context_length, .. }) = self.landmarks {
            if mem_id as usize >= self.vocab_size {
                return wrong("mem_id", &mem_id.into(), &format!("below vocab_size = {}", self.vocab_size));
            }
            if train_context_length > 1 << 30 {
                return wrong("train_context_length", &train_context_length.into(), "at most 2^30");
            }
            if mem_freq == 0 || mem_freq >= train_context_length {
                let expected = format!("1 to {}, train_context_length less 1", train_context_length.saturating_sub(1));
                return wrong("mem_freq", &mem_freq.into(), &expected);
            }
        }
        Ok(())
    }

    /// The rotary embedding, for texts of at most `length` positions (which matters to [`RopeScaling::Dynamic`] alone).
    pub fn rope(&self, length: usize) -> Rope {
        self.rope_scaling.rope(self.head_dim, self.rope_theta, self.max_position_embeddings, length)
    }

    /// The positions that the model was trained on: the training window of one with landmarks.
    pub fn window(&self) -> usize {
        match self.landmarks {
            Some(landmarks) => landmarks.train_context_length,
            None => self.sliding_window.unwrap_or(usize::MAX).min(self.max_position_embeddings),
        }
    }

    /// Whether queries, keys and values have biases, and whether what comes out of attention has.
    pub(super) fn attention_biases(&self) -> (bool, bool) {
        match self.architecture {
            Architecture::Qwen2 => (true, false),
            _ => (self.attention_bias, self.attention_bias),
        }
    }

    /// Whether queries and keys are normalised head by head.
    pub(super) fn qk_norm(&self) -> bool {
        self.architecture == Architecture::Qwen3
    }
}

fn wrong<T>(field: &'static str, got: &Value, expected: &str) -> Result<T> {
    let mut got = got.to_string();
    if let Some((cut, _)) = got.char_indices().nth(80) {
        got.truncate(cut);
        got += "...";
    }
    Err(Error::Config { field, got, expected: expected.into() })
}

/// The fields that are not yet read.
struct Fields(Map<String, Value>);

impl Fields {
    /// A field; `None` if it is missing, `Some(None)` if it is null.
    fn nullable<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<Option<Option<T>>> {
        let Some(value) = self.0.remove(name) else { return Ok(None) };
        match serde_json::from_value(value.clone()) {
            Ok(read) => Ok(Some(read)),
            Err(error) => wrong(name, &value, &format!("another type ({error})")),
        }
    }

    /// A field that may be missing or null.
    fn take<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<Option<T>> {
        Ok(self.nullable(name)?.flatten())
    }

    fn or<T: DeserializeOwned>(&mut self, name: &'static str, default: T) -> Result<T> {
        Ok(self.take(name)?.unwrap_or(default))
    }

    fn required<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T> {
        match self.take(name)? {
            Some(value) => Ok(value),
            None => Err(Error::Config { field: name, got: "missing".into(), expected: "a value".into() }),
        }
    }
}

/// `rope_parameters`, or in older files `rope_theta` and `rope_scaling`.
fn rope(fields: &mut Fields, max_position_embeddings: usize) -> Result<(f64, RopeScaling)> {
    let theta: Option<f64> = fields.take("rope_theta")?;
    let scaling: Option<Map<String, Value>> = fields.take("rope_scaling")?;
    let parameters: Option<Map<String, Value>> = fields.take("rope_parameters")?;
    let mut rope = Fields(parameters.or(scaling).unwrap_or_default());
    let theta = rope.take("rope_theta")?.or(theta).unwrap_or(10_000.);
    let partial: f64 = rope.or("partial_rotary_factor", fields.or("partial_rotary_factor", 1.)?)?;
    if partial != 1. {
        return wrong("partial_rotary_factor", &partial.into(), "1");
    }
    let old_name: Option<String> = rope.take("type")?;
    let kind: String = rope.or("rope_type", old_name.unwrap_or("default".into()))?;
    let original = rope.take("original_max_position_embeddings")?.unwrap_or(max_position_embeddings);
    let scaling = match kind.as_str() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: rope.required("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: rope.required("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: rope.required("factor")?,
            low_freq_factor: rope.required("low_freq_factor")?,
            high_freq_factor: rope.required("high_freq_factor")?,
            original_max_position_embeddings: original,
        },
        "yarn" => {
            let factor = match rope.take("factor")? {
                Some(factor) => factor,
                None => max_position_embeddings as f64 / original as f64,
            };
            let usual = RopeScaling::yarn_attention_factor(factor, rope.take("mscale")?, rope.take("mscale_all_dim")?);
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                attention_factor: rope.or("attention_factor", usual)?,
                beta_fast: rope.or("beta_fast", 32.)?,
                beta_slow: rope.or("beta_slow", 1.)?,
                truncate: rope.or("truncate", true)?,
            }
        }
        _ => return wrong("rope_type", &kind.into(), "default, linear, dynamic, llama3 or yarn"),
    };
    Ok((theta, scaling))
}

impl RopeScaling {
    fn validate(&self) -> Result<()> {
        let factor = match *self {
            Self::Default => return Ok(()),
            Self::Linear { factor } | Self::Dynamic { factor } => factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                if original_max_position_embeddings == 0 {
                    return wrong("original_max_position_embeddings", &0.into(), "at least 1");
                }
                if !(low_freq_factor < high_freq_factor && high_freq_factor.is_finite()) {
                    let expected = format!("more than low_freq_factor, {low_freq_factor}");
                    return wrong("high_freq_factor", &high_freq_factor.into(), &expected);
                }
                factor
            }
            Self::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate: _,
            } => {
                if original_max_position_embeddings == 0 {
                    return wrong("original_max_position_embeddings", &0.into(), "at least 1");
                }
                if !(attention_factor > 0. && attention_factor.is_finite()) {
                    return wrong("attention_factor", &attention_factor.into(), "a number above 0");
                }
                if !(beta_slow > 0. && beta_fast >= beta_slow && beta_fast.is_finite()) {
                    return wrong("beta_fast", &beta_fast.into(), &format!("at least beta_slow, {beta_slow}, above 0"));
                }
                factor
            }
        };
        if factor > 0. && factor.is_finite() {
            return Ok(());
        }
        wrong("factor", &factor.into(), "a number above 0")
    }

    /// `rope_scaling`, which `transformers` of all versions read.
    fn to_json(self) -> Value {
        match self {
            Self::Default => Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "type": "linear", "factor": factor}),
            Self::Dynamic { factor } => json!({"rope_type": "dynamic", "type": "dynamic", "factor": factor}),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            Self::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
            } => json!({
                "rope_type": "yarn",
                "type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original_max_position_embeddings,
                "attention_factor": attention_factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "truncate": truncate,
            }),
        }
    }
}

/// The distance that a sliding window of some layer allows.
fn sliding_window(fields: &mut Fields, architecture: Architecture) -> Result<Option<usize>> {
    let given: Option<Option<usize>> = fields.nullable("sliding_window")?;
    let is_used = match architecture {
        Architecture::Llama => false,
        Architecture::Mistral => true,
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let types: Vec<String> = fields.or("layer_types", Vec::new())?;
            fields.or("use_sliding_window", false)? || types.iter().any(|layer| layer == "sliding_attention")
        }
    };
    Ok(if is_used { given.unwrap_or(Some(4096)) } else { None })
}

fn eos(fields: &mut Fields) -> Result<Vec<u32>> {
    match fields.take::<Value>("eos_token_id")? {
        None => Ok(Vec::new()),
        Some(value) => {
            let list = if value.is_array() { value.clone() } else { json!([value]) };
            serde_json::from_value(list).or_else(|_| wrong("eos_token_id", &value, "a token id, or a list of some"))
        }
    }
}

/// The authors' keys. Their code writes `mem_id` of a model without landmarks as null.
fn landmarks(fields: &mut Fields, is_with_landmark: bool) -> Result<Option<LandmarkConfig>> {
    let (mem_id, mem_freq): (Option<u32>, Option<usize>) = (fields.take("mem_id")?, fields.take("mem_freq")?);
    let train_context_length = fields.or("train_context_length", 512)?;
    let include_landmark_in_loss = fields.or("include_landmark_in_loss", true)?;
    let missing = |field| Error::Config { field, got: "missing".into(), expected: "that of the landmarks".into() };
    match mem_id {
        None if is_with_landmark => Err(missing("mem_id")),
        None => Ok(None),
        Some(mem_id) => {
            let mem_freq = mem_freq.ok_or_else(|| missing("mem_freq"))?;
            Ok(Some(LandmarkConfig { mem_id, mem_freq, train_context_length, include_landmark_in_loss }))
        }
    }
}

#[cfg(test)]
mod tests;
