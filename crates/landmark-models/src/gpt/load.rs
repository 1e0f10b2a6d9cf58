//! A model's files: `config.json` and `model.safetensors` in a directory.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};

use super::config::GptConfig;
use super::model::Gpt;
use crate::files::{at, replace};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

impl Gpt {
    /// Writes the model's files into `dir`, which is made if it does not exist; files of an earlier model are replaced.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.save_as(dir, self.dtype())
    }

    /// As [`Gpt::save`], with the weights rounded to `dtype`.
    pub fn save_as(&self, dir: impl AsRef<Path>, dtype: DType) -> Result<()> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).map_err(at(dir))?;
        replace(&dir.join(WEIGHTS), |path| {
            let rounded =
                |(name, var): (&'_ String, &Var)| Ok((name.clone(), var.as_detached_tensor().to_dtype(dtype)?));
            let tensors = self.parameters().iter().map(rounded).collect::<Result<HashMap<String, Tensor>>>()?;
            candle_core::safetensors::save(&tensors, path)
                .map_err(|source| Error::WeightsFile { path: path.to_path_buf(), source })
        })?;
        replace(&dir.join(CONFIG), |path| {
            let json = serde_json::to_string_pretty(self.config())
                .map_err(|source| Error::ConfigFile { path: path.to_path_buf(), source })?;
            fs::write(path, json + "\n").map_err(at(path))
        })?;
        // The renames themselves are in the directory.
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
    }

    /// Reads a model that [`Gpt::save`] wrote, in the element type of its weights, but those of half precision become f32.
    pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = dir.as_ref().join(CONFIG);
        let json = fs::read_to_string(&path).map_err(at(&path))?;
        let config: GptConfig =
            serde_json::from_str(&json).map_err(|source| Error::ConfigFile { path: path.clone(), source })?;
        let path = dir.as_ref().join(WEIGHTS);
        let bytes = fs::read(&path).map_err(at(&path))?;
        let mut tensors = candle_core::safetensors::load_buffer(&bytes, device)
            .map_err(|source| Error::WeightsFile { path: path.clone(), source })?;
        let is_half = |tensor: &Tensor| matches!(tensor.dtype(), DType::BF16 | DType::F16);
        for tensor in tensors.values_mut().filter(|tensor| is_half(tensor)) {
            *tensor = tensor.to_dtype(DType::F32)?;
        }
        Self::from_tensors(&config, tensors)
    }
}
