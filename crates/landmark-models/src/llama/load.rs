//! A model's files in a Hugging Face folder: `config.json`, and `model.safetensors` or several such files and their index.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::safetensors::{Load, MmapedSafetensors};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::config::LlamaConfig;
use super::matrix::Matrix;
use super::model::Llama;
use super::parameters;
use crate::files::{at, replace};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Bytes of weights in a file, at most: as `transformers` has it.
const SHARD: usize = 5_000_000_000;

impl LlamaConfig {
    /// Reads the `config.json` in a folder.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join(CONFIG);
        let json = fs::read_to_string(&path).map_err(at(&path))?;
        Self::from_json(&json).map_err(|error| match error {
            Error::Json { source, .. } => Error::ConfigFile { path, source },
            other => other,
        })
    }

    /// Writes it into the folder `dir`, which exists.
    pub(super) fn save(&self, dir: &Path) -> Result<()> {
        replace(&dir.join(CONFIG), |path| fs::write(path, self.to_json()).map_err(at(path)))?;
        // The renames themselves are in the directory.
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
    }
}

impl Llama {
    /// Reads a model that learns: its weights, which a file may have in f64, f32, bf16 or f16, become `dtype`, f32 or f64.
    ///
    /// # Errors
    /// A field of the configuration, a file, or a tensor by its name: what is missing, cut short, or of another shape or element type.
    pub fn load(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let config = LlamaConfig::load(&dir)?;
        let tensors = read(dir.as_ref(), &config, device, |_, _| dtype)?;
        Self::from_tensors(&config, tensors)
    }

    /// Reads a model that does not learn: its matrices become `dtype`, f32, or bf16 on a GPU, in which they take half of the memory.
    ///
    /// # Errors
    /// Those of [`Llama::load`].
    pub fn load_frozen(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let config = LlamaConfig::load(&dir)?;
        let tensors = read(dir.as_ref(), &config, device, |_, rank| if rank == 2 { dtype } else { DType::F32 })?;
        Self::frozen(&config, tensors.into_iter().map(|(name, tensor)| (name, Matrix::Dense(tensor))).collect())
    }

    /// Writes `config.json` and the weights, as `dtype`, into `dir`, which is made if it does not exist; files of an earlier model are
    /// replaced. Nothing is written of what learns nothing and is quantized but its values; of a model with adapters, the model without them
    /// ([`Llama::freeze`] merges them, [`Llama::save_adapter`] writes them).
    pub fn save(&self, dir: impl AsRef<Path>, dtype: DType) -> Result<()> {
        self.save_in_shards(dir.as_ref(), dtype, SHARD)
    }

    fn save_in_shards(&self, dir: &Path, dtype: DType, bytes: usize) -> Result<()> {
        if !matches!(dtype, DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
            let expected = "f32, f64, bf16 or f16".to_string();
            return Err(Error::DType { op: "Llama::save", tensor: "dtype", got: dtype, expected });
        }
        fs::create_dir_all(dir).map_err(at(dir))?;
        let mut shards: Vec<(usize, Vec<(&str, Matrix)>)> = Vec::new();
        for (name, w) in self.weights() {
            let size = w.dims().iter().product::<usize>() * dtype.size_in_bytes();
            match shards.last_mut() {
                Some((sum, shard)) if *sum + size <= bytes => {
                    *sum += size;
                    shard.push((name, w));
                }
                _ => shards.push((size, vec![(name, w)])),
            }
        }
        let count = shards.len();
        let (total, mut weight_map) = (shards.iter().map(|(size, _)| size).sum::<usize>(), BTreeMap::new());
        for (index, (_, shard)) in shards.into_iter().enumerate() {
            let file = match count {
                1 => WEIGHTS.to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            weight_map.extend(shard.iter().map(|(name, _)| (name.to_string(), file.clone())));
            replace(&dir.join(file), |path| write_weights(path, shard, dtype))?;
        }
        let (index, single) = (dir.join(INDEX), dir.join(WEIGHTS));
        if count > 1 {
            let json = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            replace(&index, |path| fs::write(path, json.to_string()).map_err(at(path)))?;
        }
        // Of an earlier model: a reader would take it for this one's.
        let earlier = if count > 1 { single } else { index };
        match fs::remove_file(&earlier) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(at(&earlier)(error)),
            _ => {}
        }
        let name = dtype_name(dtype);
        let mut config = self.config().clone();
        // The older name and the newer one.
        for field in ["torch_dtype", "dtype"] {
            config.other.insert(field.into(), name.into());
        }
        config.save(dir)
    }
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "float64",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

fn write_weights(path: &Path, shard: Vec<(&str, Matrix)>, dtype: DType) -> Result<()> {
    let rounded = |(name, w): (&str, Matrix)| {
        let tensor = w.dense()?.to_device(&Device::Cpu)?.to_dtype(dtype)?.contiguous()?;
        Ok((name.to_string(), tensor))
    };
    let tensors = shard.into_iter().map(rounded).collect::<Result<Vec<_>>>()?;
    // `transformers` refuses a file that does not say so.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let failed = |source: safetensors::SafeTensorError| match source {
        safetensors::SafeTensorError::IoError(source) => Error::Io { path: path.to_path_buf(), source },
        other => Error::WeightsFile { path: path.to_path_buf(), source: other.into() },
    };
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(failed)
}

/// The weights in a folder, those of the configuration alone, in the element type that `dtype` says of a name and a rank.
fn read(
    dir: &Path,
    config: &LlamaConfig,
    device: &Device,
    dtype: impl Fn(&str, usize) -> DType,
) -> Result<HashMap<String, Tensor>> {
    let specification = parameters::specification(config);
    let mut tensors = HashMap::new();
    for path in weight_files(dir)? {
        let unreadable = |source| Error::WeightsFile { path: path.clone(), source };
        // SAFETY: the file is read before anyone is given the model; who changes it meanwhile changes the weights.
        let file = unsafe { MmapedSafetensors::new(&path) }.map_err(unreadable)?;
        for (name, view) in file.tensors() {
            if parameters::is_surplus(config, &name) {
                continue;
            }
            let Some(shape) = specification.get(&name) else { return Err(Error::UnknownTensor { name }) };
            if view.shape() != shape {
                let (got, expected) = (format!("{:?}", view.shape()), format!("{shape:?}"));
                return Err(Error::WrongTensor { name, got, expected });
            }
            use safetensors::Dtype;
            if !matches!(view.dtype(), Dtype::F64 | Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                let (got, expected) = (format!("{:?}", view.dtype()), "F64, F32, BF16 or F16".to_string());
                return Err(Error::WrongTensor { name, got, expected });
            }
            let tensor = view.load(&Device::Cpu).map_err(unreadable)?;
            let tensor = tensor.to_dtype(dtype(&name, shape.len()))?.to_device(device)?;
            if tensors.insert(name.clone(), tensor).is_some() {
                let expected = "in one of them".to_string();
                return Err(Error::WrongTensor { name, got: "in two files".into(), expected });
            }
        }
    }
    Ok(tensors)
}

/// The files of the weights in a Hugging Face folder: one, or those that its index names.
///
/// # Errors
/// There are none, or the index is not one.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (dir.join(WEIGHTS), dir.join(INDEX));
    if single.exists() {
        return Ok(vec![single]);
    }
    let no_model = |path: &Path, reason: String| Err(Error::NoModel { path: path.to_path_buf(), reason });
    if !index.exists() {
        let reason = match dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
            true => "only pytorch_model.bin, which can run code when it is read: save the model as safetensors",
            false => "neither a model.safetensors nor a model.safetensors.index.json in it",
        };
        return no_model(dir, reason.into());
    }
    let text = fs::read_to_string(&index).map_err(at(&index))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|source| Error::ConfigFile { path: index.clone(), source })?;
    let Some(map) = value.get("weight_map").and_then(Value::as_object).filter(|map| !map.is_empty()) else {
        return no_model(&index, "weight_map is missing, or names no weights".into());
    };
    let mut files = BTreeSet::new();
    for (name, file) in map {
        // Names of files beside the index, and of nothing else.
        match file.as_str() {
            Some(file) if file.ends_with(".safetensors") && !file.contains(['/', '\\', ':']) => {
                files.insert(dir.join(file));
            }
            _ => return no_model(&index, format!("weight_map: {name} is in {file}, which is no file beside it")),
        }
    }
    Ok(files.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Llama {
        let json = json!({
            "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": true,
        });
        let config = LlamaConfig::from_json(&json.to_string()).unwrap();
        Llama::init(&config, 3, DType::F32, &Device::Cpu).unwrap()
    }

    fn bytes(model: &Llama) -> BTreeMap<String, Vec<u32>> {
        let bits = |w: Matrix| w.dense().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let bits = |w: Matrix| bits(w).into_iter().map(f32::to_bits).collect();
        model.weights().map(|(name, w)| (name.to_string(), bits(w))).collect()
    }

    fn files(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn folders_go_round() {
        let (dir, model) = (tempfile::tempdir().unwrap(), model());
        let dir = dir.path();
        let shards = ["config.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"];
        let shards = [&shards[..], &["model-00003-of-00003.safetensors", "model.safetensors.index.json"]].concat();
        for (bytes_of_file, expected) in [(SHARD, vec!["config.json", "model.safetensors"]), (8000, shards)] {
            fs::remove_dir_all(dir).unwrap();
            model.save_in_shards(dir, DType::F32, bytes_of_file).unwrap();
            assert_eq!(files(dir), expected);
            let again = Llama::load(dir, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(bytes(&again), bytes(&model));
            assert_eq!(again.config().other["use_cache"], true);
            let frozen = Llama::load_frozen(dir, DType::F32, &Device::Cpu).unwrap();
            assert!(frozen.parameters().is_empty() && bytes(&frozen) == bytes(&model));
        }
        // One file in the place of several, and several in the place of one.
        model.save_in_shards(dir, DType::F32, SHARD).unwrap();
        assert!(!dir.join(INDEX).exists());
        model.save_in_shards(dir, DType::F32, 8000).unwrap();
        assert!(!dir.join(WEIGHTS).exists());
        Llama::load(dir, DType::F32, &Device::Cpu).unwrap();
        // Rounded once, nothing is lost any more.
        for dtype in [DType::BF16, DType::F16] {
            model.save(dir, dtype).unwrap();
            let rounded = Llama::load(dir, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(rounded.config().other["dtype"], dtype_name(dtype));
            assert_ne!(bytes(&rounded), bytes(&model));
            rounded.save(dir, dtype).unwrap();
            assert_eq!(bytes(&Llama::load(dir, DType::F32, &Device::Cpu).unwrap()), bytes(&rounded));
        }
        assert!(matches!(model.save(dir, DType::U8), Err(Error::DType { tensor: "dtype", .. })));
    }

    /// Saves, changes something, and gives what the loader says.
    fn broken(change: impl FnOnce(&Path)) -> String {
        let (dir, model) = (tempfile::tempdir().unwrap(), model());
        model.save_in_shards(dir.path(), DType::F32, 8000).unwrap();
        change(dir.path());
        Llama::load(dir.path(), DType::F32, &Device::Cpu).unwrap_err().to_string()
    }

    /// Writes other tensors into a file.
    fn rewrite(path: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, path).unwrap();
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        const FIRST: &str = "model-00001-of-00003.safetensors";
        const NAME: &str = "model.embed_tokens.weight";
        let error = broken(|dir| fs::remove_file(dir.join(CONFIG)).unwrap());
        assert!(error.contains(CONFIG), "{error}");
        let error = broken(|dir| fs::write(dir.join(CONFIG), "{\"model_type\"").unwrap());
        assert!(error.contains(CONFIG), "{error}");
        let error = broken(|dir| {
            let json = fs::read_to_string(dir.join(CONFIG)).unwrap();
            fs::write(dir.join(CONFIG), json.replace("qwen2", "gpt_neox")).unwrap();
        });
        assert!(error.contains("model_type") && error.contains("gpt_neox"), "{error}");
        let error = broken(|dir| fs::remove_file(dir.join(INDEX)).unwrap());
        assert!(error.contains("neither a model.safetensors"), "{error}");
        let error = broken(|dir| fs::remove_file(dir.join(FIRST)).unwrap());
        assert!(error.contains(FIRST), "{error}");
        for map in [json!({}), json!({"weight_map": {}}), json!({"weight_map": 3})] {
            let error = broken(|dir| fs::write(dir.join(INDEX), map.to_string()).unwrap());
            assert!(error.contains("weight_map"), "{error}");
        }
        for file in ["../secret.safetensors", "/etc/passwd", "weights.bin"] {
            let index = json!({"weight_map": {NAME: file}});
            let error = broken(|dir| fs::write(dir.join(INDEX), index.to_string()).unwrap());
            assert!(error.contains(NAME) && error.contains("beside"), "{error}");
        }
        // Cut short: in the header's length, in the header, in the weights.
        for length in [0, 4, 100, 4000] {
            let error =
                broken(|dir| File::options().write(true).open(dir.join(FIRST)).unwrap().set_len(length).unwrap());
            assert!(error.contains(FIRST), "{length}: {error}");
        }
        let error = broken(|dir| fs::write(dir.join(FIRST), vec![0xff; 5000]).unwrap());
        assert!(error.contains(FIRST), "{error}");
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        let error = broken(|dir| rewrite(&dir.join(FIRST), |all| _ = all.remove(NAME)));
        assert!(error.contains(NAME) && error.contains("missing"), "{error}");
        let error =
            broken(|dir| rewrite(&dir.join(FIRST), |all| _ = all.insert(NAME.into(), zeros(&[16, 40], DType::F32))));
        assert!(error.contains(NAME) && error.contains("[16, 40]") && error.contains("[40, 16]"), "{error}");
        let error =
            broken(|dir| rewrite(&dir.join(FIRST), |all| _ = all.insert(NAME.into(), zeros(&[40, 16], DType::I64))));
        assert!(error.contains(NAME) && error.contains("I64"), "{error}");
        let error =
            broken(|dir| rewrite(&dir.join(FIRST), |all| _ = all.insert("more".into(), zeros(&[1], DType::F32))));
        assert!(error.contains("more is no parameter"), "{error}");
        let error = broken(|dir| {
            let norm = "model.norm.weight";
            rewrite(&dir.join(FIRST), |all| _ = all.insert(norm.into(), zeros(&[16], DType::F32)));
        });
        assert!(error.contains("model.norm.weight") && error.contains("two files"), "{error}");
        // Before the weights are read: a configuration of other sizes.
        let error = broken(|dir| {
            let json = fs::read_to_string(dir.join(CONFIG)).unwrap();
            fs::write(dir.join(CONFIG), json.replace("\"vocab_size\": 40", "\"vocab_size\": 1000000000")).unwrap();
        });
        assert!(error.contains("[1000000000, 16]"), "{error}");
    }
}
