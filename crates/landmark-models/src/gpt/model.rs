//! The model: token ids to hidden states, hidden states to logits or a loss.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use landmark_attention::Attend;

use super::config::{self, GptConfig, MlpKind, Variant};
use super::parameters;
use crate::ops::{self, Activation, Dropout, Mlp, NormKind, TokenScore};
use crate::{Error, Result};

/// RMSNorm with the epsilon of the LayerNorm.
const RMS: NormKind = NormKind::Rms { eps: 1e-5 };

/// A GPT and its parameters.
///
/// Legend: B batch, T time, C width, H heads, D head_dim, V vocabulary.
#[derive(Debug)]
pub struct Gpt {
    config: GptConfig,
    parameters: BTreeMap<String, Var>,
    wte: Tensor,
    miss_token: Option<Tensor>,
    layers: Vec<Layer>,
    ln_f: Norm,
    activations: DType,
}

#[derive(Debug)]
struct Norm {
    kind: NormKind,
    w: Tensor,
    b: Option<Tensor>,
}

impl Norm {
    fn apply(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        ops::norm(x, self.kind, &self.w, self.b.as_ref(), dtype)
    }
}

#[derive(Debug)]
struct Layer {
    ln_1: Norm,
    c_attn: (Tensor, Option<Tensor>),
    qk_norm: Option<[Norm; 2]>,
    c_proj: (Tensor, Option<Tensor>),
    ln_2: Norm,
    mlp: Mlp,
}

impl Gpt {
    /// A new model: weights N(0, 0.02), those that write to the residual stream N(0, 0.02 / sqrt(2 n_layer)), norms 1, biases 0; a
    /// function of the configuration and the seed. `dtype` is f32, or f64 on the CPU.
    pub fn init(config: &GptConfig, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        const OP: &str = "Gpt::init";
        config.validate()?;
        if !matches!(dtype, DType::F32 | DType::F64) {
            return Err(Error::DType { op: OP, tensor: "dtype", got: dtype, expected: "f32 or f64".into() });
        }
        if !device.is_cpu() && !cfg!(feature = "cuda") {
            return Err(Error::Device { op: OP, tensor: "device", got: format!("{:?}", device.location()) });
        }
        Ok(Self::assemble(config.clone(), parameters::init(config, seed, dtype, device)?, true))
    }

    /// A model with these weights: exactly the parameters of the configuration, all f32 or all f64. The weights are copied.
    pub fn from_tensors(config: &GptConfig, tensors: HashMap<String, Tensor>) -> Result<Self> {
        config.validate()?;
        Ok(Self::assemble(config.clone(), parameters::from_tensors(config, tensors)?, true))
    }

    /// The same model, with the same parameters in memory, that leaves no graph for a gradient: for evaluation. It sees every later
    /// change of the parameters.
    pub fn detached(&self) -> Self {
        Self { activations: self.activations, ..Self::assemble(self.config.clone(), self.parameters.clone(), false) }
    }

    fn assemble(config: GptConfig, parameters: BTreeMap<String, Var>, tracked: bool) -> Self {
        let get = |name: &str| {
            let tensor = parameters.get(name)?.as_tensor();
            Some(if tracked { tensor.clone() } else { tensor.detach() })
        };
        let pair = |name: &str| {
            let weight = get(&format!("{name}.weight")).expect("the parameters follow the specification");
            (weight, get(&format!("{name}.bias")))
        };
        let norm = |name: &str, kind: NormKind| {
            let (w, b) = pair(name);
            Norm { kind, w, b }
        };
        let kind = match config.norm {
            config::Norm::Layer => NormKind::Layer,
            config::Norm::Rms => RMS,
        };
        let activation = match config.mlp {
            MlpKind::Gelu => Activation::Gelu,
            MlpKind::Swiglu => Activation::Swiglu,
        };
        let layer = |layer: usize| {
            let h = format!("transformer.h.{layer}");
            let ((up, up_bias), (down, down_bias)) = (pair(&format!("{h}.mlp.c_fc")), pair(&format!("{h}.mlp.c_proj")));
            Layer {
                ln_1: norm(&format!("{h}.ln_1"), kind),
                c_attn: pair(&format!("{h}.attn.c_attn")),
                qk_norm: config
                    .qk_norm
                    .then(|| ["q_norm", "k_norm"].map(|name| norm(&format!("{h}.attn.{name}"), RMS))),
                c_proj: pair(&format!("{h}.attn.c_proj")),
                ln_2: norm(&format!("{h}.ln_2"), kind),
                mlp: Mlp { activation, up, up_bias, down, down_bias },
            }
        };
        let (wte, _) = pair("transformer.wte");
        let miss_token = get("rem_token_embedding.weight");
        let layers = (0..config.n_layer).map(layer).collect();
        let ln_f = norm("transformer.ln_f", kind);
        let activations = wte.dtype();
        Self { config, wte, miss_token, layers, ln_f, parameters, activations }
    }

    /// The configuration.
    pub fn config(&self) -> &GptConfig {
        &self.config
    }

    /// The parameters by name; embedding and head are one.
    pub fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.parameters
    }

    /// The same model whose activations are of this type: that of the parameters, or on a GPU bf16, the reference's autocast. The
    /// residual stream keeps the parameters' type.
    pub fn with_activations(mut self, dtype: DType) -> Result<Self> {
        let bf16_on_gpu = dtype == DType::BF16 && self.wte.device().is_cuda() && self.dtype() == DType::F32;
        if dtype != self.dtype() && !bf16_on_gpu {
            let expected = format!("{:?}, or bf16 on a GPU", self.dtype());
            return Err(Error::DType { op: "Gpt::with_activations", tensor: "dtype", got: dtype, expected });
        }
        self.activations = dtype;
        Ok(self)
    }

    /// The element type of the activations, and so of the keys and values that attention is given.
    pub fn activations(&self) -> DType {
        self.activations
    }

    /// Where the parameters are.
    pub fn device(&self) -> &Device {
        self.wte.device()
    }

    /// The element type of the parameters.
    pub fn dtype(&self) -> DType {
        self.wte.dtype()
    }

    /// The hidden states `[B, T, C]`, after the last normalisation, of `ids` `[B, T]` (u32, best on the CPU, where they are checked). `dropout` is the seed of a training step's
    /// dropout; without one nothing is dropped.
    ///
    /// With a context-miss token, `attention` is given 1 + T rows, of which row 0 is the token: its output there is to be
    /// zero (see [`WindowAttention`](super::WindowAttention)).
    pub fn hidden(&self, ids: &Tensor, attention: &mut dyn Attend, dropout: Option<u64>) -> Result<Tensor> {
        let &[batch, time] = ids.dims() else {
            let expected = "[batch, time]".to_string();
            return Err(Error::Shape { op: "Gpt::hidden", tensor: "ids", got: ids.dims().to_vec(), expected });
        };
        let width = self.config.n_embd;
        // Each place that drops draws by a seed of its own.
        let seed = dropout.filter(|_| self.config.dropout > 0.);
        let drop = |place: usize| {
            seed.map(|seed| Dropout { p: self.config.dropout, seed: ops::mix64(seed ^ ops::mix64(place as u64)) })
        };
        let mut x = ops::embedding(&self.wte, ids)?;
        if let Some(dropout) = drop(0) {
            x = ops::dropout(&x, dropout)?;
        }
        if let Some(miss_token) = &self.miss_token {
            x = ops::bridge([miss_token, &x], |[token, x]| {
                Tensor::cat(&[&token.broadcast_as((batch, 1, width))?, x], 1)
            })?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let (w, b) = &layer.c_attn;
            let normal = layer.ln_1.apply(&x, self.activations)?;
            let [mut q, mut k, v] = ops::project_heads(&normal, w, b.as_ref(), self.config.n_head)?;
            if let Some([q_norm, k_norm]) = &layer.qk_norm {
                (q, k) = (q_norm.apply(&q, self.activations)?, k_norm.apply(&k, self.activations)?);
            }
            let o = ops::attend(attention, index, [&q, &k, &v], self.activations)?;
            let (w, b) = &layer.c_proj;
            x = ops::merge_heads(&o, w, b.as_ref(), &x, drop(2 * index + 1))?;
            x = ops::mlp(&layer.ln_2.apply(&x, self.activations)?, &layer.mlp, &x, drop(2 * index + 2))?;
        }
        if self.config.model == Variant::LandmarkWithCmt {
            x = ops::bridge([&x], |[x]| x.narrow(1, 1, time))?;
        }
        self.ln_f.apply(&x, self.activations)
    }

    /// The logits `[.., V]` of hidden states `[.., C]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        ops::linear(hidden, &self.wte, None)
    }

    /// The mean cross entropy of `targets` `[..]` (u32, [`IGNORE`](crate::IGNORE) where there is none) under hidden states `[.., C]`, by
    /// `weights` `[..]` (f32) if there are any: a scalar, differentiable. The logits are never all in memory.
    pub fn loss(&self, hidden: &Tensor, targets: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
        ops::cross_entropy(hidden, &self.wte, targets, weights)
    }

    /// Loss and accuracy target by target, in row-major order, `None` where there is no target; arguments as for [`Gpt::loss`].
    pub fn token_scores(&self, hidden: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
        ops::token_scores(hidden, &self.wte, targets)
    }
}
