//! The model: token ids to hidden states, hidden states to logits or a loss.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor, Var};
use landmark_attention::Attend;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Normal};

use super::config::{LandmarkConfig, LlamaConfig};
use super::lora::{Adapter, LANDMARK_ROW, LoraConfig};
use super::matrix::Matrix;
use super::parameters::{self, EMBEDDING, HEAD, NORM};
use crate::gpt::{Distances, NegativeRows, WindowAttention};
use crate::ops::{self, Map, NormKind, TokenScore};
use crate::{Error, Result};

/// A LLaMA and its weights.
///
/// Legend: B batch, T time, C hidden_size, H heads, D head_dim, V vocabulary.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    weights: Weights,
    lora: Option<LoraConfig>,
    embedding: Matrix,
    landmark_row: Option<Tensor>,
    layers: Vec<Arc<Layer>>,
    norm: Norm,
    head: Matrix,
    activations: DType,
    recomputes: bool,
}

/// All weights, under Hugging Face's names.
#[derive(Debug, Clone, Default)]
pub(super) struct Weights {
    /// Those that learn; of a model with adapters these alone.
    pub parameters: BTreeMap<String, Var>,
    /// Those that do not.
    pub frozen: BTreeMap<String, Matrix>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    qk_norm: Option<[Norm; 2]>,
    o: Linear,
    post_attention_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Norm {
    w: Tensor,
    eps: f64,
}

impl Norm {
    fn apply(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        ops::norm(x, NormKind::Rms { eps: self.eps }, &self.w, None, dtype)
    }
}

#[derive(Debug)]
struct Linear {
    w: Matrix,
    b: Option<Tensor>,
    adapter: Option<Adapter>,
    /// Tells the dropout of one adapter from that of another.
    place: u64,
}

impl Linear {
    /// The map, or `residual` and the map. `seed` is a training step's.
    fn apply(&self, x: &Tensor, residual: Option<&Tensor>, seed: Option<u64>) -> Result<Tensor> {
        let y = self.w.linear(x, self.b.as_ref(), residual)?;
        match &self.adapter {
            None => Ok(y),
            Some(adapter) => adapter.onto(x, &y, seed.map(|seed| ops::mix64(seed ^ ops::mix64(self.place)))),
        }
    }

    /// What each map makes of x: of dense ones in one operation, which goes through x once on the way back.
    fn together<const N: usize>(
        of: [&Self; N],
        x: &Tensor,
        residual: Option<&Tensor>,
        seed: Option<u64>,
    ) -> Result<[Tensor; N]> {
        let map = |linear: &'_ &Self| match (&linear.w, &linear.adapter) {
            (Matrix::Dense(_), Some(adapter)) => !adapter.drops(seed),
            (w, _) => matches!(w, Matrix::Dense(_)),
        };
        if of.iter().all(map) {
            let maps = of.map(|linear| {
                let Matrix::Dense(w) = &linear.w else { unreachable!("all are dense") };
                Map { w, b: linear.b.as_ref(), low: linear.adapter.as_ref().map(Adapter::low_rank) }
            });
            return ops::linears(x, maps, residual);
        }
        let each = of.iter().map(|linear| linear.apply(x, residual, seed)).collect::<Result<Vec<_>>>()?;
        Ok(each.try_into().expect("one for each map"))
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let w = if let Matrix::Dense(w) = &self.w { Some(w) } else { None };
        w.into_iter().chain(&self.b).chain(self.adapter.iter().flat_map(Adapter::tensors))
    }
}

/// What a layer needs to know of the model and of the step.
#[derive(Debug, Clone, Copy)]
struct Step {
    heads: usize,
    kv_heads: usize,
    activations: DType,
    seed: Option<u64>,
}

impl Layer {
    /// `x` `[B, T, C]` as this layer, the `index`-th, leaves it.
    fn forward(&self, x: &Tensor, index: usize, attention: &mut dyn Attend, step: Step) -> Result<Tensor> {
        let Step { heads, kv_heads, activations, seed } = step;
        let normal = self.input_norm.apply(x, activations)?;
        let [q, k, v] = Linear::together([&self.q, &self.k, &self.v], &normal, None, seed)?;
        let mut q = ops::split_heads(&q, heads)?;
        let mut k = ops::split_heads(&k, kv_heads)?;
        let v = ops::split_heads(&v, kv_heads)?;
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            (q, k) = (q_norm.apply(&q, activations)?, k_norm.apply(&k, activations)?);
        }
        let o = ops::attend(attention, index, [&q, &k, &v], activations)?;
        let [x] = Linear::together([&self.o], &ops::join_heads(&o)?, Some(x), seed)?;
        let normal = self.post_attention_norm.apply(&x, activations)?;
        let [gate, up] = Linear::together([&self.gate, &self.up], &normal, None, seed)?;
        let [x] = Linear::together([&self.down], &ops::swiglu(&gate, &up)?, Some(&x), seed)?;
        Ok(x)
    }

    /// What learns of it.
    fn variables(&self) -> Vec<&Tensor> {
        let Self { input_norm, q, k, v, qk_norm, o, post_attention_norm, gate, up, down } = self;
        let norms = [input_norm, post_attention_norm].into_iter().chain(qk_norm.iter().flatten()).map(|norm| &norm.w);
        let linears = [q, k, v, o, gate, up, down].into_iter().flat_map(Linear::tensors);
        norms.chain(linears).filter(|tensor| tensor.is_variable()).collect()
    }
}

impl Llama {
    /// A new model: matrices N(0, 0.02), norms 1, biases 0; a function of the configuration and the seed. `dtype` is f32, or f64 on the CPU.
    pub fn init(config: &LlamaConfig, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        config.validate()?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let normal = Normal::new(0., 0.02).expect("a finite deviation");
        let mut tensors = HashMap::new();
        for (name, shape) in parameters::specification(config) {
            let tensor = match shape.as_slice() {
                [_, _] => {
                    let values: Vec<f64> = (0..shape.iter().product()).map(|_| normal.sample(&mut rng)).collect();
                    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?
                }
                _ if name.ends_with(".bias") => Tensor::zeros(shape, dtype, device)?,
                _ => Tensor::ones(shape, dtype, device)?,
            };
            tensors.insert(name, tensor);
        }
        Self::from_tensors(config, tensors)
    }

    /// A model that learns, with these weights: exactly the parameters of the configuration, all f32 or all f64. The weights are copied.
    pub fn from_tensors(config: &LlamaConfig, tensors: HashMap<String, Tensor>) -> Result<Self> {
        let mut parameters = BTreeMap::new();
        let (mut dtype, mut device) = (None, None::<Device>);
        for (name, tensor) in checked(config, tensors, |tensor| tensor.dims())? {
            let dtype = *dtype.get_or_insert(tensor.dtype());
            if tensor.dtype() != dtype || !matches!(dtype, DType::F32 | DType::F64) {
                let (got, expected) = (format!("{:?}", tensor.dtype()), "f32 or f64, the same for all".to_string());
                return Err(Error::WrongTensor { name, got, expected });
            }
            let device = device.get_or_insert_with(|| tensor.device().clone());
            if !tensor.device().same_device(device) {
                let got = format!("on {:?}", tensor.device().location());
                let expected = format!("on {:?}, as the others", device.location());
                return Err(Error::WrongTensor { name, got, expected });
            }
            // A copy: the parameter must not share its storage with a tensor that the caller keeps.
            parameters.insert(name, Var::from_tensor(&tensor.force_contiguous()?.detach())?);
        }
        Self::assemble(config.clone(), Weights { parameters, frozen: BTreeMap::new() }, None, true)
    }

    /// A model that does not learn, with these weights: exactly the parameters of the configuration; its matrices may be quantized, or of bf16
    /// on a GPU, and all else is f32.
    pub fn frozen(config: &LlamaConfig, weights: HashMap<String, Matrix>) -> Result<Self> {
        let weights = checked(config, weights, |matrix| matrix.dims())?;
        for (name, matrix) in &weights {
            let Matrix::Dense(tensor) = matrix else { continue };
            let is_half = tensor.dtype() == DType::BF16 && tensor.rank() == 2 && tensor.device().is_cuda();
            if !is_half && tensor.dtype() != DType::F32 {
                let (got, expected) =
                    (format!("{:?}", tensor.dtype()), "f32, or a matrix of bf16 on a GPU".to_string());
                return Err(Error::WrongTensor { name: name.clone(), got, expected });
            }
        }
        Self::assemble(
            config.clone(),
            Weights { parameters: BTreeMap::new(), frozen: weights.into_iter().collect() },
            None,
            false,
        )
    }

    /// The same model, with the same weights in memory, that leaves no graph for a gradient: for evaluation. It sees every later
    /// change of the parameters.
    pub fn detached(&self) -> Self {
        let model = Self::assemble(self.config.clone(), self.weights.clone(), self.lora.clone(), false);
        let Self { activations, recomputes, .. } = *self;
        Self { activations, recomputes, ..model.expect("the weights were checked") }
    }

    fn assemble(config: LlamaConfig, weights: Weights, lora: Option<LoraConfig>, tracked: bool) -> Result<Self> {
        config.validate()?;
        let parameter = |name: &str| {
            let var = weights.parameters.get(name)?;
            Some(if tracked { var.as_tensor().clone() } else { var.as_detached_tensor() })
        };
        let find = |name: &str| parameter(name).map(Matrix::Dense).or_else(|| weights.frozen.get(name).cloned());
        let matrix = |name: &str| find(name).expect("the weights were checked");
        let vector = |name: &str| find(name).as_ref().map(Matrix::dense).transpose();
        let norm = |name: &str| {
            Ok::<_, Error>(Norm { w: vector(name)?.expect("the weights were checked"), eps: config.rms_norm_eps })
        };
        let adapter = |name: &str| {
            let LoraConfig { r, lora_alpha, lora_dropout: dropout, .. } = *lora.as_ref()?;
            let [a, b] = ["A", "B"].map(|half| parameter(&format!("{name}.lora_{half}.weight")));
            Some(Adapter { a: a?, b: b?, scale: lora_alpha / r as f64, dropout })
        };
        let linear = |name: String, place: u64| {
            let (w, b) = (matrix(&format!("{name}.weight")), vector(&format!("{name}.bias"))?);
            Ok::<_, Error>(Linear { w, b, adapter: adapter(&name), place })
        };
        let layer = |index: usize| {
            let layer = format!("model.layers.{index}");
            let norm = |name: &str| norm(&format!("{layer}.{name}.weight"));
            let mut place = 7 * index as u64;
            let mut linear = |name: &str| {
                place += 1;
                linear(format!("{layer}.{name}"), place)
            };
            let qk_norm = match config.qk_norm() {
                true => Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]),
                false => None,
            };
            Ok(Arc::new(Layer {
                input_norm: norm("input_layernorm")?,
                q: linear("self_attn.q_proj")?,
                k: linear("self_attn.k_proj")?,
                v: linear("self_attn.v_proj")?,
                qk_norm,
                o: linear("self_attn.o_proj")?,
                post_attention_norm: norm("post_attention_layernorm")?,
                gate: linear("mlp.gate_proj")?,
                up: linear("mlp.up_proj")?,
                down: linear("mlp.down_proj")?,
            }))
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let (embedding, norm) = (matrix(EMBEDDING), norm(NORM)?);
        let head = if config.tie_word_embeddings { embedding.clone() } else { matrix(HEAD) };
        let (landmark_row, activations) = (parameter(LANDMARK_ROW), norm.w.dtype());
        let recomputes = false;
        Ok(Self { config, weights, lora, embedding, landmark_row, layers, norm, head, activations, recomputes })
    }

    /// The configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The parameters that learn, by Hugging Face's names; a tied head is the embedding. Of a model with adapters by `peft`'s, without their
    /// prefix.
    pub fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.weights.parameters
    }

    /// All weights, by Hugging Face's names, without adapters.
    pub fn weights(&self) -> impl Iterator<Item = (&str, Matrix)> {
        let learn = self.weights.parameters.iter().filter(|_| self.lora.is_none());
        let learn = learn.map(|(name, w)| (name.as_str(), Matrix::Dense(w.as_detached_tensor())));
        learn.chain(self.weights.frozen.iter().map(|(name, w)| (name.as_str(), w.clone())))
    }

    pub(super) fn all_weights(&self) -> &Weights {
        &self.weights
    }

    pub(super) fn weight(&self, name: &str) -> Matrix {
        self.weights().find(|(other, _)| *other == name).expect("the weights were checked").1
    }

    /// The adapters, if there are some.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// The same model, none of whose weights learns from now on. Adapters are merged into the weights, and quantized ones that have an adapter
    /// become dense.
    pub fn freeze(self) -> Result<Self> {
        let frozen = match &self.lora {
            Some(lora) => self.merge(lora)?,
            None => self.weights().map(|(name, w)| (name.to_string(), w)).collect(),
        };
        let model = Self::assemble(self.config, Weights { parameters: BTreeMap::new(), frozen }, None, false)?;
        Ok(Self { activations: self.activations, recomputes: self.recomputes, ..model })
    }

    /// The same model, whose quantized weights become dense ones of this type: their products are faster then, and take more memory.
    pub fn dequantized(self, dtype: DType) -> Result<Self> {
        let Self { config, weights: Weights { parameters, mut frozen }, lora, activations, recomputes, .. } = self;
        for w in frozen.values_mut() {
            if let Matrix::Quantized(_) = w {
                *w = Matrix::Dense(w.dense()?.to_dtype(dtype)?);
            }
        }
        let tracked = !parameters.is_empty();
        Ok(Self { activations, recomputes, ..Self::assemble(config, Weights { parameters, frozen }, lora, tracked)? })
    }

    /// The same model for reading: nothing learns. Adapters are merged into dense weights, and stay beside quantized ones, which stay as they are.
    pub fn for_reading(self) -> Result<Self> {
        let quantized = self.weights.frozen.values().any(|w| matches!(w, Matrix::Quantized(_)));
        let Some(lora) = self.lora.clone().filter(|_| quantized) else { return self.freeze() };
        let Self { config, weights: Weights { mut parameters, mut frozen }, activations, recomputes, .. } = self;
        let row = parameters.remove(LANDMARK_ROW);
        if let (Some(row), Some(landmarks), Some(table)) = (row, config.landmarks, frozen.get_mut(EMBEDDING)) {
            *table = table.with_row(landmarks.mem_id as usize, &row.as_detached_tensor())?;
        }
        let model = Self::assemble(config, Weights { parameters, frozen }, Some(lora), false)?;
        Ok(Self { activations, recomputes, ..model })
    }

    /// A frozen model with these adapters.
    pub(super) fn with_parameters(self, parameters: BTreeMap<String, Var>, lora: LoraConfig) -> Result<Self> {
        let Self { config, weights: Weights { frozen, .. }, activations, recomputes, .. } = self;
        let model = Self::assemble(config, Weights { parameters, frozen }, Some(lora), true)?;
        Ok(Self { activations, recomputes, ..model })
    }

    /// The same model, which keeps of a training step the input of each layer alone and computes the layer again on the way back, as
    /// [`Gpt::with_activation_checkpointing`](crate::gpt::Gpt::with_activation_checkpointing).
    pub fn with_activation_checkpointing(mut self, on: bool) -> Self {
        self.recomputes = on;
        self
    }

    /// The same model whose activations are of this type: that of the parameters, or on a GPU bf16. The residual stream keeps the
    /// parameters' type.
    pub fn with_activations(mut self, dtype: DType) -> Result<Self> {
        let bf16_on_gpu = dtype == DType::BF16 && self.device().is_cuda() && self.dtype() == DType::F32;
        if dtype != self.dtype() && !bf16_on_gpu {
            let expected = format!("{:?}, or bf16 on a GPU", self.dtype());
            return Err(Error::DType { op: "Llama::with_activations", tensor: "dtype", got: dtype, expected });
        }
        self.activations = dtype;
        Ok(self)
    }

    /// The element type of the activations, and so of the keys and values that attention is given.
    pub fn activations(&self) -> DType {
        self.activations
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.norm.w.device()
    }

    /// The element type of the residual stream.
    pub fn dtype(&self) -> DType {
        self.norm.w.dtype()
    }

    /// The model with landmarks. The landmark's token, `landmarks.mem_id`, comes after the `known` tokens of the tokenizer; its rows of embedding
    /// and head are the mean of theirs. If the tables have no row for it, which padding may be, they grow.
    ///
    /// # Errors
    /// An id that is one of the tokenizer's own, or one far beyond them.
    pub fn with_landmarks(mut self, landmarks: LandmarkConfig, known: usize) -> Result<Self> {
        // A model that has this landmark already: its block or its window may become another.
        if self.config.landmarks.is_some_and(|own| own.mem_id == landmarks.mem_id) {
            self.config.landmarks = Some(landmarks);
            self.config.validate()?;
            return Ok(self);
        }
        let Self { mut config, weights: Weights { mut parameters, mut frozen }, activations, recomputes, lora, .. } =
            self;
        if lora.is_some() {
            let (got, expected) = ("a model with adapters".to_string(), "landmarks before adapters".to_string());
            return Err(Error::Value { op: "with_landmarks", name: "self", got, expected });
        }
        let (id, rows) = (landmarks.mem_id as usize, config.vocab_size);
        if known == 0 || known > rows {
            let expected = format!("1 to {rows}, as the embedding has rows");
            return Err(Error::Value { op: "with_landmarks", name: "known", got: known.to_string(), expected });
        }
        if !(known..rows + 256).contains(&id) {
            let expected = format!("an id after the {known} of the tokenizer");
            return Err(Error::Config { field: "mem_id", got: id.to_string(), expected });
        }
        let tables = if config.tie_word_embeddings { &[EMBEDDING][..] } else { &[EMBEDDING, HEAD] };
        for &table in tables {
            let with_mean = |mut w: Matrix| {
                let known_rows = w.dense()?.narrow(0, 0, known)?;
                let dtype = if known_rows.dtype() == DType::BF16 { DType::F32 } else { known_rows.dtype() };
                // As a product: candle's mean of columns goes through them one number at a time.
                let ones = Tensor::ones((1, known), dtype, known_rows.device())?;
                let mean = (ones.matmul(&known_rows.to_dtype(dtype)?)? / known as f64)?;
                for row in rows.min(id)..=id {
                    w = w.with_row(row, &mean)?;
                }
                Ok::<_, Error>(w)
            };
            if let Some(var) = parameters.get_mut(table) {
                *var = Var::from_tensor(&with_mean(Matrix::Dense(var.as_detached_tensor()))?.dense()?)?;
            } else if let Some(w) = frozen.get_mut(table) {
                *w = with_mean(w.clone())?;
            }
        }
        config.vocab_size = rows.max(id + 1);
        config.landmarks = Some(landmarks);
        let tracked = !parameters.is_empty();
        Ok(Self { activations, recomputes, ..Self::assemble(config, Weights { parameters, frozen }, None, tracked)? })
    }

    /// Attention for windows `ids` `[B, T]` (u32): dense, or through the landmarks among them if the model has landmarks.
    pub fn window_attention(&self, ids: &Tensor) -> Result<WindowAttention> {
        self.attention_over(ids, None)
    }

    /// The same for a training step, by its seed, in which rows see the landmarks of others as [`NegativeRows`] says, in a batch whose first so
    /// many rows are exercises.
    pub fn window_attention_with_negatives(
        &self,
        ids: &Tensor,
        (options, exercises, seed): (NegativeRows, usize, u64),
    ) -> Result<WindowAttention> {
        let (window, mem_freq) = (self.config.window(), self.config.landmarks.map(|landmarks| landmarks.mem_freq));
        let of = Distances { rope: self.config.rope(window), window, mem_freq };
        self.attention_over(ids, Some((options, of, exercises, seed)))
    }

    fn attention_over(
        &self,
        ids: &Tensor,
        negatives: Option<(NegativeRows, Distances, usize, u64)>,
    ) -> Result<WindowAttention> {
        let longest = self.config.sliding_window.unwrap_or(usize::MAX);
        let landmark = self.config.landmarks.map(|landmarks| landmarks.mem_id);
        WindowAttention::with_rope(|time| self.config.rope(time), landmark, longest, ids, negatives)
    }

    /// The hidden states `[B, T, C]`, after the last normalisation, of `ids` `[B, T]` (u32, best on the CPU, where they are checked).
    pub fn hidden(&self, ids: &Tensor, attention: &mut dyn Attend) -> Result<Tensor> {
        self.hidden_in_training(ids, attention, None)
    }

    /// The same for a training step: `seed` decides what the adapters' dropout drops.
    pub fn hidden_in_training(&self, ids: &Tensor, attention: &mut dyn Attend, seed: Option<u64>) -> Result<Tensor> {
        if ids.rank() != 2 {
            let expected = "[batch, time]".to_string();
            return Err(Error::Shape { op: "Llama::hidden", tensor: "ids", got: ids.dims().to_vec(), expected });
        }
        let LlamaConfig { num_attention_heads: heads, num_key_value_heads: kv_heads, .. } = self.config;
        let step = Step { heads, kv_heads, activations: self.activations, seed };
        let mut x = self.embed(ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            x = match self.recomputes.then(|| attention.again()).flatten() {
                None => layer.forward(&x, index, attention, step)?,
                Some(again) => {
                    let (of, again) = (layer.clone(), Mutex::new(again));
                    ops::recomputed(&x, &layer.variables(), move |x| {
                        let mut again = again.lock().unwrap_or_else(PoisonError::into_inner);
                        of.forward(x, index, &mut **again, step)
                    })?
                }
            };
        }
        self.norm.apply(&x, self.activations)
    }

    /// The rows of the embedding `[B, T, C]`, the landmark's own one where that learns apart from the others.
    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let x = self.embedding.embedding(ids)?;
        let (Some(row), Some(landmarks)) = (&self.landmark_row, self.config.landmarks) else { return Ok(x) };
        let is_landmark = ids.eq(landmarks.mem_id)?;
        let others = is_landmark.to_dtype(x.dtype())?.to_device(x.device())?.unsqueeze(2)?.affine(-1., 1.)?;
        let others = x.broadcast_mul(&others)?;
        // Row 0 for the others, row 1 for landmarks: the gradient adds up what an embedding's does.
        let rows = ops::bridge([row], |[row]| Tensor::cat(&[&row.zeros_like()?, row], 0))?;
        let landmarks = ops::embedding(&rows, &is_landmark.to_dtype(DType::U32)?)?;
        ops::bridge([&landmarks], |[landmarks]| others + landmarks)
    }

    /// The landmark's own row of the head, where it has one: with a tied embedding that learns apart from the others.
    fn head_row(&self) -> Option<(&Tensor, usize)> {
        let row = self.landmark_row.as_ref().filter(|_| self.config.tie_word_embeddings)?;
        Some((row, self.config.landmarks?.mem_id as usize))
    }

    /// The head with that row.
    fn head(&self) -> Result<Matrix> {
        match self.head_row() {
            Some((row, id)) => Matrix::Dense(self.head.dense()?).with_row(id, &row.detach()),
            None => Ok(self.head.clone()),
        }
    }

    /// The logits `[.., V]` of hidden states `[.., C]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head()?.linear(hidden, None, None)
    }

    /// The mean cross entropy of `targets` `[..]` (u32, [`IGNORE`](crate::IGNORE) where there is none) under hidden states `[.., C]`, by
    /// `weights` `[..]` (f32) if there are any: a scalar, differentiable. The logits are never all in memory.
    pub fn loss(&self, hidden: &Tensor, targets: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
        self.head()?.cross_entropy(hidden, self.head_row(), targets, weights)
    }

    /// Loss and accuracy target by target, in row-major order, `None` where there is no target; arguments as for [`Llama::loss`].
    pub fn token_scores(&self, hidden: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
        self.head()?.token_scores(hidden, targets)
    }
}

/// Exactly the parameters of the configuration, by name.
fn checked<W>(
    config: &LlamaConfig,
    mut weights: HashMap<String, W>,
    dims: impl Fn(&W) -> &[usize],
) -> Result<Vec<(String, W)>> {
    config.validate()?;
    let mut found = Vec::new();
    for (name, shape) in parameters::specification(config) {
        let Some(weight) = weights.remove(&name) else {
            return Err(Error::MissingTensor { name });
        };
        if dims(&weight) != shape {
            let got = format!("{:?}", dims(&weight));
            return Err(Error::WrongTensor { name, got, expected: format!("{shape:?}") });
        }
        found.push((name, weight));
    }
    match weights.into_keys().filter(|name| !parameters::is_surplus(config, name)).min() {
        Some(name) => Err(Error::UnknownTensor { name }),
        None => Ok(found),
    }
}
