//! LoRA (Hu et al., 2021): beside a matrix W that does not learn, two of low rank that do, `y = W x + lora_alpha / r * B A x`. Names, defaults
//! and files are those of `peft`.
//!
//! The landmark is a new token, so its row of the embedding learns too, whole: `peft`'s `trainable_token_indices`. Where the head is the
//! embedding, it is the head's row as well.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::config::LlamaConfig;
use super::matrix::Matrix;
use super::model::{Llama, Weights};
use super::parameters::{self, EMBEDDING};
use crate::files::{at, replace};
use crate::ops::{self, Dropout, LowRank};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The files of an adapter that decide what it is.
pub const ADAPTER_FILES: [&str; 3] = [CONFIG, WEIGHTS, "config.json"];

/// What `peft` puts before every name in its files.
const PREFIX: &str = "base_model.model.";

/// The landmark's row `[1, C]`.
pub(super) const LANDMARK_ROW: &str = "model.embed_tokens.token_adapter.trainable_tokens_delta";

/// The matrices that can have adapters.
pub const LORA_MODULES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Which adapters, under `peft`'s names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Their rank.
    pub r: usize,
    /// They are scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// The share of an adapter's input that is dropped in training. Not on a GPU.
    pub lora_dropout: f64,
    /// The matrices that have one, of [`LORA_MODULES`].
    pub target_modules: Vec<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { r: 8, lora_alpha: 8., lora_dropout: 0., target_modules: ["q_proj", "v_proj"].map(String::from).into() }
    }
}

impl LoraConfig {
    /// Checks every field against its range.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field, got: String, expected: String| Err(Error::Config { field, got, expected });
        if !(1..=1 << 16).contains(&self.r) {
            return wrong("lora_r", self.r.to_string(), "1 to 65536".into());
        }
        if !(self.lora_alpha > 0. && self.lora_alpha.is_finite()) {
            return wrong("lora_alpha", self.lora_alpha.to_string(), "a number above 0".into());
        }
        if !(0. ..1.).contains(&self.lora_dropout) {
            return wrong("lora_dropout", self.lora_dropout.to_string(), "at least 0 and below 1".into());
        }
        let unknown = self.target_modules.iter().find(|module| !LORA_MODULES.contains(&module.as_str()));
        if let Some(got) = unknown.cloned().or(self.target_modules.is_empty().then(|| "none".into())) {
            return wrong("lora_target_modules", got, format!("some of {}", LORA_MODULES.join(", ")));
        }
        Ok(())
    }

    /// Name and shape of everything that learns in a model with these adapters.
    fn specification(&self, config: &LlamaConfig) -> BTreeMap<String, Vec<usize>> {
        let mut all = BTreeMap::new();
        for (name, shape) in parameters::specification(config) {
            let Some(module) = name.strip_suffix(".weight") else { continue };
            let (_, last) = module.rsplit_once('.').unwrap_or_default();
            if let ([n_out, n_in], true) = (&shape[..], self.target_modules.iter().any(|target| target == last)) {
                all.insert(format!("{module}.lora_A.weight"), vec![self.r, *n_in]);
                all.insert(format!("{module}.lora_B.weight"), vec![*n_out, self.r]);
            }
        }
        if config.landmarks.is_some() {
            all.insert(LANDMARK_ROW.into(), vec![1, config.hidden_size]);
        }
        all
    }
}

/// The adapter of one matrix: A `[r, in]`, B `[out, r]`.
#[derive(Debug)]
pub(super) struct Adapter {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
    pub dropout: f64,
}

impl Adapter {
    /// `y + scale * B A x` for `x` `[.., in]` and `y` `[.., out]`; in a training step, whose seed is given, of x without what is dropped.
    pub fn onto(&self, x: &Tensor, y: &Tensor, seed: Option<u64>) -> Result<Tensor> {
        let kept = match seed.filter(|_| self.dropout > 0.) {
            Some(seed) => ops::dropout(x, Dropout { p: self.dropout, seed })?,
            None => x.clone(),
        };
        self.low_rank().onto(&kept, y)
    }

    /// Whether a step of this seed drops some of its input.
    pub fn drops(&self, seed: Option<u64>) -> bool {
        seed.is_some() && self.dropout > 0.
    }

    pub fn low_rank(&self) -> LowRank<'_> {
        LowRank { a: &self.a, b: &self.b, scale: self.scale }
    }

    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.a, &self.b].into_iter()
    }
}

impl Llama {
    /// The model with new adapters, which change nothing yet, and nothing else that learns but the landmark's row; a function of the
    /// configuration and the seed. A model with adapters gets these in the place of its own, which are merged.
    pub fn with_lora(self, lora: &LoraConfig, seed: u64) -> Result<Self> {
        lora.validate()?;
        let model = self.freeze()?;
        let (config, dtype, device) = (model.config().clone(), model.dtype(), model.device().clone());
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut tensors = HashMap::new();
        for (name, shape) in lora.specification(&config) {
            let tensor = if name == LANDMARK_ROW {
                let id = config.landmarks.expect("the row is a landmark's").mem_id;
                let id = Tensor::from_vec(vec![id], 1, &Device::Cpu)?;
                model.weight(EMBEDDING).embedding(&id)?.to_dtype(dtype)?
            } else if name.ends_with(".lora_A.weight") {
                // `kaiming_uniform_(a=sqrt(5))`: uniform within one over the root of the inputs.
                let bound = 1. / (shape[1] as f64).sqrt();
                let mut draw = || ((rng.next_u64() >> 11) as f64 / (1u64 << 52) as f64 - 1.) * bound;
                let values: Vec<f64> = (0..shape.iter().product()).map(|_| draw()).collect();
                Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(&device)?
            } else {
                Tensor::zeros(shape, dtype, &device)?
            };
            tensors.insert(name, tensor);
        }
        model.adapted(lora, tensors)
    }

    /// The model, none of whose weights learns, with the adapters and the landmark's row that [`Llama::save_adapter`] or `peft` wrote into a
    /// folder.
    ///
    /// # Errors
    /// A field of `adapter_config.json` that asks for what is not built here, a tensor that is missing, or of another shape.
    pub fn with_adapter(self, dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (lora, token) = read_config(&dir.join(CONFIG))?;
        let model = self.freeze()?;
        let landmark = model.config().landmarks.map(|landmarks| landmarks.mem_id);
        if token != landmark {
            let (got, expected) = (format!("{token:?}"), format!("{landmark:?}, the model's landmark"));
            return Err(Error::Config { field: "trainable_token_indices", got, expected });
        }
        let path = dir.join(WEIGHTS);
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
            .map_err(|source| Error::WeightsFile { path: path.clone(), source })?;
        let (dtype, device) = (model.dtype(), model.device().clone());
        let mut found = HashMap::new();
        for (name, tensor) in tensors {
            let Some(ours) = name.strip_prefix(PREFIX) else { return Err(Error::UnknownTensor { name }) };
            found.insert(ours.to_string(), tensor.to_dtype(dtype)?.to_device(&device)?);
        }
        model.adapted(&lora, found)
    }

    /// With exactly these tensors for adapters.
    fn adapted(self, lora: &LoraConfig, mut tensors: HashMap<String, Tensor>) -> Result<Self> {
        let mut parameters = BTreeMap::new();
        for (name, shape) in lora.specification(self.config()) {
            let Some(tensor) = tensors.remove(&name) else { return Err(Error::MissingTensor { name }) };
            if tensor.dims() != shape {
                let (got, expected) = (format!("{:?}", tensor.dims()), format!("{shape:?}"));
                return Err(Error::WrongTensor { name, got, expected });
            }
            parameters.insert(name, Var::from_tensor(&tensor.force_contiguous()?.detach())?);
        }
        match tensors.into_keys().min() {
            Some(name) => Err(Error::UnknownTensor { name }),
            None => self.with_parameters(parameters, lora.clone()),
        }
    }

    /// The weights with the adapters added to them: those of a model without any.
    pub(super) fn merge(&self, lora: &LoraConfig) -> Result<BTreeMap<String, Matrix>> {
        let Weights { parameters, frozen } = self.all_weights();
        let mut merged = frozen.clone();
        for (name, a) in parameters {
            if let (LANDMARK_ROW, Some(landmarks)) = (name.as_str(), self.config().landmarks) {
                let row = a.as_detached_tensor().get(0)?;
                merged.insert(EMBEDDING.into(), frozen[EMBEDDING].with_row(landmarks.mem_id as usize, &row)?);
            }
            let Some(module) = name.strip_suffix(".lora_A.weight") else { continue };
            let b = parameters[&format!("{module}.lora_B.weight")].as_detached_tensor();
            let change = (b.matmul(&a.as_detached_tensor())? * (lora.lora_alpha / lora.r as f64))?;
            let name = format!("{module}.weight");
            let w = frozen[&name].dense()?.to_dtype(change.dtype())?;
            merged.insert(name, Matrix::Dense((w + change)?));
        }
        Ok(merged)
    }

    /// Writes the adapters and the landmark's row as `peft` reads them, and the `config.json` that says what the landmark is. `base` is the model
    /// that they belong to. Files of an earlier adapter are replaced.
    ///
    /// # Errors
    /// The model has no adapters.
    pub fn save_adapter(&self, dir: impl AsRef<Path>, base: &str) -> Result<()> {
        let dir = dir.as_ref();
        let Some(lora) = self.lora() else {
            let (got, expected) = ("a model without".to_string(), "a model with adapters".to_string());
            return Err(Error::Value { op: "save_adapter", name: "self", got, expected });
        };
        fs::create_dir_all(dir).map_err(at(dir))?;
        let tensor = |(name, var): (&String, &Var)| {
            Ok((format!("{PREFIX}{name}"), var.as_detached_tensor().to_device(&Device::Cpu)?.to_dtype(DType::F32)?))
        };
        let tensors = self.parameters().iter().map(tensor).collect::<Result<HashMap<_, _>>>()?;
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        replace(&dir.join(WEIGHTS), |path| {
            safetensors::serialize_to_file(&tensors, Some(metadata), path)
                .map_err(|source| Error::WeightsFile { path: path.to_path_buf(), source: source.into() })
        })?;
        let alpha = lora.lora_alpha;
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.r,
            // A whole number, as peft declares it, where it is one.
            "lora_alpha": if alpha.fract() == 0. { json!(alpha as u64) } else { json!(alpha) },
            "lora_dropout": lora.lora_dropout,
            "target_modules": lora.target_modules,
            "trainable_token_indices": self.config().landmarks.map(|landmarks| [landmarks.mem_id]),
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
        });
        let json = serde_json::to_string_pretty(&config).expect("JSON of strings and numbers") + "\n";
        replace(&dir.join(CONFIG), |path| fs::write(path, json).map_err(at(path)))?;
        self.config().save(dir)
    }
}

/// Writes the adapter in a folder into another, with its numbers rounded to a type.
///
/// # Errors
/// Those of a folder that holds no adapter.
pub fn copy_adapter(from: impl AsRef<Path>, to: impl AsRef<Path>, dtype: DType) -> Result<()> {
    let (from, to) = (from.as_ref(), to.as_ref());
    read_config(&from.join(CONFIG))?;
    let path = from.join(WEIGHTS);
    let wrong = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::WeightsFile { path, source }
    };
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu).map_err(wrong(&path))?;
    let rounded = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(dtype)?));
    let tensors = tensors.into_iter().map(rounded).collect::<Result<HashMap<_, _>>>()?;
    fs::create_dir_all(to).map_err(at(to))?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    replace(&to.join(WEIGHTS), |path| {
        safetensors::serialize_to_file(&tensors, Some(metadata), path).map_err(|source| wrong(path)(source.into()))
    })?;
    for name in [CONFIG, "config.json"] {
        let text = fs::read(from.join(name)).map_err(at(&from.join(name)))?;
        replace(&to.join(name), |path| fs::write(path, text).map_err(at(path)))?;
    }
    Ok(())
}

/// What an `adapter_config.json` comes to: the adapters, and the token whose row learned.
fn read_config(path: &Path) -> Result<(LoraConfig, Option<u32>)> {
    let text = fs::read_to_string(path).map_err(at(path))?;
    let fields: Map<String, Value> =
        serde_json::from_str(&text).map_err(|source| Error::ConfigFile { path: path.to_path_buf(), source })?;
    let of = |name: &str| fields.get(name).unwrap_or(&Value::Null);
    let wrong = |field: &'static str, expected: &str| Error::Config {
        field,
        got: of(field).to_string(),
        expected: expected.into(),
    };
    if of("peft_type") != "LORA" {
        return Err(wrong("peft_type", "LORA"));
    }
    if !matches!(of("bias"), Value::Null) && of("bias") != "none" {
        return Err(wrong("bias", "none"));
    }
    // What would make other numbers of the same tensors.
    for field in [
        "use_dora",
        "use_rslora",
        "use_qalora",
        "use_bdlora",
        "fan_in_fan_out",
        "lora_bias",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "layer_replication",
        "target_parameters",
        "exclude_modules",
    ] {
        let is_off = match of(field) {
            Value::Null | Value::Bool(false) => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        if !is_off {
            return Err(wrong(field, "none: it is not built here"));
        }
    }
    let token = match of("trainable_token_indices") {
        Value::Null => None,
        Value::Array(ids) => match ids.as_slice() {
            [id] => Some(id.as_u64().and_then(|id| u32::try_from(id).ok())),
            _ => Some(None),
        },
        _ => Some(None),
    };
    let token = match token {
        None => None,
        Some(Some(id)) => Some(id),
        Some(None) => return Err(wrong("trainable_token_indices", "a list of one token, the landmark")),
    };
    let lora = LoraConfig {
        r: of("r").as_u64().ok_or_else(|| wrong("r", "a number"))? as usize,
        lora_alpha: of("lora_alpha").as_f64().ok_or_else(|| wrong("lora_alpha", "a number"))?,
        lora_dropout: of("lora_dropout").as_f64().unwrap_or(0.),
        target_modules: serde_json::from_value(of("target_modules").clone())
            .map_err(|_| wrong("target_modules", "a list of modules"))?,
    };
    lora.validate()?;
    Ok((lora, token))
}
