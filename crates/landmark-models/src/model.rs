//! A model of any family, for what reads with it and does not ask which one it is.

use candle_core::{DType, Device, Tensor};
use landmark_attention::{Attend, Rope};

use crate::Result;
use crate::gpt::{Gpt, Placement, SoftmaxFunc, Variant, WindowAttention};
use crate::llama::Llama;
use crate::ops::TokenScore;

/// A model.
#[derive(Debug)]
pub enum Model {
    /// The reference GPT.
    Gpt(Gpt),
    /// One of the LLaMA family.
    Llama(Llama),
}

/// What a model attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// All tokens before: a model without landmarks.
    Dense,
    /// Blocks, through their landmarks.
    Landmarks,
    /// All tokens before, by a model that has landmarks: an ablation.
    Ablation,
}

/// What those need to know who read a text with a model: its sizes and the conventions of its training.
#[derive(Debug, Clone)]
pub struct Outline {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// The training window: positions, landmarks included.
    pub window: usize,
    /// What it attends to.
    pub attention: Attention,
    /// The landmark's token id, also of a dense model that was trained on data with landmarks.
    pub landmark_id: Option<u32>,
    /// Ordinary tokens of a block in training, or the most of them.
    pub mem_freq: Option<usize>,
    /// Where the landmarks are.
    pub placement: Placement,
    /// Whether there is a context-miss token.
    pub has_miss_token: bool,
    /// With one: a query whose weight on it is below this retrieves nothing.
    pub rem_cutoff: Option<f64>,
    /// The rotary embedding, for positions in the window.
    pub rope: Rope,
}

impl Model {
    /// What it is to those who read with it.
    pub fn outline(&self) -> Outline {
        match self {
            Self::Gpt(gpt) => {
                let config = gpt.config();
                let attention = match (config.model, config.softmax_func) {
                    (Variant::BaseRotary, _) => Attention::Dense,
                    (_, SoftmaxFunc::MemOpt) => Attention::Landmarks,
                    _ => Attention::Ablation,
                };
                Outline {
                    vocab_size: config.vocab_size,
                    layers: config.n_layer,
                    width: config.n_embd,
                    heads: config.n_head,
                    kv_heads: config.n_head,
                    head_dim: config.head_dim(),
                    window: config.sequence_length,
                    attention,
                    landmark_id: Some(config.landmark_id),
                    mem_freq: config.mem_freq,
                    placement: config.landmarks,
                    has_miss_token: config.model == Variant::LandmarkWithCmt,
                    rem_cutoff: config.rem_cutoff,
                    rope: config.rope(),
                }
            }
            Self::Llama(llama) => {
                let config = llama.config();
                Outline {
                    vocab_size: config.vocab_size,
                    layers: config.num_hidden_layers,
                    width: config.hidden_size,
                    heads: config.num_attention_heads,
                    kv_heads: config.num_key_value_heads,
                    head_dim: config.head_dim,
                    window: config.window(),
                    attention: if config.landmarks.is_some() { Attention::Landmarks } else { Attention::Dense },
                    landmark_id: config.landmarks.map(|landmarks| landmarks.mem_id),
                    mem_freq: config.landmarks.map(|landmarks| landmarks.mem_freq),
                    placement: Placement::Regular,
                    has_miss_token: false,
                    rem_cutoff: None,
                    rope: config.rope(config.window()),
                }
            }
        }
    }

    /// Attention inside the window for `ids` `[B, T]`, for evaluation.
    pub fn window_attention(&self, ids: &Tensor) -> Result<WindowAttention> {
        match self {
            Self::Gpt(gpt) => WindowAttention::new(gpt.config(), ids, None),
            Self::Llama(llama) => llama.window_attention(ids),
        }
    }

    /// The hidden states `[B, T, C]` of `ids` `[B, T]`, without dropout.
    pub fn hidden(&self, ids: &Tensor, attention: &mut dyn Attend) -> Result<Tensor> {
        match self {
            Self::Gpt(gpt) => gpt.hidden(ids, attention, None),
            Self::Llama(llama) => llama.hidden(ids, attention),
        }
    }

    /// The logits `[.., V]` of hidden states `[.., C]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gpt(gpt) => gpt.logits(hidden),
            Self::Llama(llama) => llama.logits(hidden),
        }
    }

    /// Loss and accuracy target by target, in row-major order; see [`Gpt::token_scores`].
    pub fn token_scores(&self, hidden: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
        match self {
            Self::Gpt(gpt) => gpt.token_scores(hidden, targets),
            Self::Llama(llama) => llama.token_scores(hidden, targets),
        }
    }

    /// The same model, with the same weights in memory, that leaves no graph for a gradient.
    pub fn detached(&self) -> Self {
        match self {
            Self::Gpt(gpt) => Self::Gpt(gpt.detached()),
            Self::Llama(llama) => Self::Llama(llama.detached()),
        }
    }

    /// The same model whose activations are of this type; see [`Gpt::with_activations`].
    pub fn with_activations(self, dtype: DType) -> Result<Self> {
        Ok(match self {
            Self::Gpt(gpt) => Self::Gpt(gpt.with_activations(dtype)?),
            Self::Llama(llama) => Self::Llama(llama.with_activations(dtype)?),
        })
    }

    /// The element type of the activations, and so of the keys and values that attention is given.
    pub fn activations(&self) -> DType {
        match self {
            Self::Gpt(gpt) => gpt.activations(),
            Self::Llama(llama) => llama.activations(),
        }
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        match self {
            Self::Gpt(gpt) => gpt.device(),
            Self::Llama(llama) => llama.device(),
        }
    }

    /// What kind of model it is, in a word.
    pub fn kind(&self) -> String {
        match self {
            Self::Gpt(gpt) => match gpt.config().model {
                Variant::BaseRotary => "base_rotary".into(),
                Variant::Landmark => "landmark".into(),
                Variant::LandmarkWithCmt => "landmark_with_cmt".into(),
            },
            Self::Llama(llama) => llama.config().model_type().into(),
        }
    }

    /// The number of its weights.
    pub fn parameters(&self) -> usize {
        match self {
            Self::Gpt(gpt) => gpt.parameters().values().map(|var| var.elem_count()).sum(),
            Self::Llama(llama) => llama.weights().map(|(_, w)| w.dims().iter().product::<usize>()).sum(),
        }
    }
}
