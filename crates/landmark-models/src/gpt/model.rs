//! The model: token ids to hidden states, hidden states to logits or a loss.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

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
    layers: Vec<Arc<Layer>>,
    ln_f: Norm,
    activations: DType,
    recomputes: bool,
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

impl Layer {
    /// `x` `[B, T, C]` as this layer, the `index`-th, leaves it.
    fn forward(
        &self,
        x: &Tensor,
        index: usize,
        attention: &mut dyn Attend,
        heads: usize,
        activations: DType,
        dropout: [Option<Dropout>; 2],
    ) -> Result<Tensor> {
        let (w, b) = &self.c_attn;
        let normal = self.ln_1.apply(x, activations)?;
        let [mut q, mut k, v] = ops::project_heads(&normal, w, b.as_ref(), heads)?;
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            (q, k) = (q_norm.apply(&q, activations)?, k_norm.apply(&k, activations)?);
        }
        let o = ops::attend(attention, index, [&q, &k, &v], activations)?;
        let (w, b) = &self.c_proj;
        let x = ops::merge_heads(&o, w, b.as_ref(), x, dropout[0])?;
        ops::mlp(&self.ln_2.apply(&x, activations)?, &self.mlp, &x, dropout[1])
    }

    fn parameters(&self) -> Vec<&Tensor> {
        let Self { ln_1, c_attn, qk_norm, c_proj, ln_2, mlp } = self;
        let norms = [ln_1, ln_2].into_iter().chain(qk_norm.iter().flatten());
        let norms = norms.map(|norm| (&norm.w, &norm.b));
        let maps =
            [(&c_attn.0, &c_attn.1), (&c_proj.0, &c_proj.1), (&mlp.up, &mlp.up_bias), (&mlp.down, &mlp.down_bias)];
        norms.chain(maps).flat_map(|(w, b)| std::iter::once(w).chain(b)).collect()
    }
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
        let Self { activations, recomputes, .. } = *self;
        Self { activations, recomputes, ..Self::assemble(self.config.clone(), self.parameters.clone(), false) }
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
            Arc::new(Layer {
                ln_1: norm(&format!("{h}.ln_1"), kind),
                c_attn: pair(&format!("{h}.attn.c_attn")),
                qk_norm: config
                    .qk_norm
                    .then(|| ["q_norm", "k_norm"].map(|name| norm(&format!("{h}.attn.{name}"), RMS))),
                c_proj: pair(&format!("{h}.attn.c_proj")),
                ln_2: norm(&format!("{h}.ln_2"), kind),
                mlp: Mlp { activation, up, up_bias, down, down_bias },
            })
        };
        let (wte, _) = pair("transformer.wte");
        let miss_token = get("rem_token_embedding.weight");
        let layers = (0..config.n_layer).map(layer).collect();
        let ln_f = norm("transformer.ln_f", kind);
        let activations = wte.dtype();
        Self { config, wte, miss_token, layers, ln_f, parameters, activations, recomputes: false }
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

    /// The same model, which keeps of a training step the input of each layer alone and computes the layer again on the way back: a third more
    /// work for the memory of one layer's activations instead of all. Loss and gradients are the same bits. Attention has to be such that it
    /// can be computed again, see [`Attend::again`]; under another one all is kept.
    pub fn with_activation_checkpointing(mut self, on: bool) -> Self {
        self.recomputes = on;
        self
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
            let (heads, activations) = (self.config.n_head, self.activations);
            let dropout = [drop(2 * index + 1), drop(2 * index + 2)];
            x = match self.recomputes.then(|| attention.again()).flatten() {
                None => layer.forward(&x, index, attention, heads, activations, dropout)?,
                Some(again) => {
                    let (of, again) = (layer.clone(), Mutex::new(again));
                    ops::recomputed(&x, &layer.parameters(), move |x| {
                        let mut again = again.lock().unwrap_or_else(PoisonError::into_inner);
                        of.forward(x, index, &mut **again, heads, activations, dropout)
                    })?
                }
            };
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
