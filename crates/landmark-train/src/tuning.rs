//! Fine-tuning of a LLaMA into a landmark model, as the authors' `llama/train.py` does it: the landmark gets a token of its own, stands after every
//! `mem_freq` tokens of a row, and is no target (their `use_flash`).

use crate::checkpoint::{Checkpoints, TRAINER};
use crate::error::{Error, Result};
use crate::model::{Model, Read, Recipe, Rows, Training};
use crate::process::{Process, Window};
use crate::settings::{Precision, Settings};
use candle_core::{DType, Device, Tensor, Var};
use landmark_data::{Batch, Pretrained, Tokenizer};
use landmark_models::llama::{Gguf, LandmarkConfig, Llama, LoraConfig};
use landmark_models::ops::{Recording, TokenScore};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What is fine-tuned, and into what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// The model: a Hugging Face folder, or for adapters also a GGUF file.
    pub model_name_or_path: PathBuf,
    /// Ordinary tokens of a row; the landmarks come on top, as in the authors' code.
    pub model_max_length: usize,
    /// Ordinary tokens of a block.
    pub mem_freq: usize,
    /// The landmark's token: what [`Pretrained::with_landmark`] says of the model's tokenizer.
    pub mem_id: u32,
    /// The adapters that learn; without any the whole model does.
    pub lora: Option<LoraConfig>,
}

impl Tuning {
    /// Positions of a row, landmarks included: the training window.
    pub fn window(&self) -> usize {
        self.model_max_length + self.model_max_length / self.mem_freq.max(1)
    }

    fn landmarks(&self) -> LandmarkConfig {
        LandmarkConfig {
            mem_id: self.mem_id,
            mem_freq: self.mem_freq,
            train_context_length: self.window(),
            include_landmark_in_loss: false,
        }
    }

    /// The tokenizer of the model in a folder or a GGUF file.
    pub fn tokenizer(model: &Path) -> Result<Pretrained> {
        if !model.is_file() {
            return Ok(Pretrained::from_folder(model)?);
        }
        let (json, settings) = Gguf::open(model)?.tokenizer()?;
        Ok(Pretrained::from_settings(Tokenizer::from_json(json.as_bytes())?, settings))
    }

    /// The model with landmarks, before anything was learned, and its tokenizer.
    fn base(&self, precision: Precision, device: &Device) -> Result<(Llama, Pretrained)> {
        let path = &self.model_name_or_path;
        let tokenizer = Self::tokenizer(path)?;
        let known = tokenizer.tokenizer.vocab_size();
        let (tokenizer, mem_id) = tokenizer.with_landmark()?;
        // Where the tokenizer has one, the model may never have met it.
        let known = known.min(mem_id as usize);
        if mem_id != self.mem_id {
            let message = format!("the landmark of {} is {mem_id}, this run's {}", path.display(), self.mem_id);
            return Err(Error::setting("model_name_or_path", message));
        }
        let model = match (path.is_file(), &self.lora) {
            // On a GPU products with quantized weights round what they meet to 8 bits, which no gradient knows of.
            (true, Some(_)) if device.is_cuda() => Gguf::open(path)?.load(device)?.dequantized(precision.dtype())?,
            (true, Some(_)) => Gguf::open(path)?.load(device)?,
            (true, None) => {
                let message = "the weights of a GGUF file cannot learn; train adapters beside them with --lora_r 8";
                return Err(Error::setting("model_name_or_path", message));
            }
            (false, None) => Llama::load(path, DType::F32, device)?,
            (false, Some(_)) => {
                let dtype = if device.is_cuda() { precision.dtype() } else { DType::F32 };
                Llama::load_frozen(path, dtype, device)?
            }
        };
        let longest = model.config().max_position_embeddings.min(model.config().sliding_window.unwrap_or(usize::MAX));
        if self.window() > longest {
            let message = format!(
                "{} tokens and their landmarks are {} positions, and the model was made for {longest}",
                self.model_max_length,
                self.window()
            );
            return Err(Error::setting("model_max_length", message));
        }
        Ok((model.with_landmarks(self.landmarks(), known)?, tokenizer))
    }

    fn tuned(&self, model: Llama, tokenizer: Pretrained, settings: &Settings<Self>) -> Result<Tuned> {
        let model = model.with_activations(settings.precision.dtype())?;
        Ok(Tuned { model, tokenizer, base: self.model_name_or_path.display().to_string() })
    }
}

/// A LLaMA in training, and the tokenizer that is kept with it.
pub struct Tuned {
    model: Llama,
    tokenizer: Pretrained,
    base: String,
}

impl Tuned {
    /// The model.
    pub fn model(&self) -> &Llama {
        &self.model
    }
}

impl Recipe for Tuning {
    type Model = Tuned;

    const CHECKPOINTS: Checkpoints = TRAINER;

    fn check(settings: &Settings<Self>) -> Result<()> {
        let Tuning { model_max_length, mem_freq, lora, .. } = &settings.model;
        if *mem_freq == 0 || *model_max_length <= *mem_freq {
            let message = format!("{mem_freq}, expected 1 to {}", model_max_length.saturating_sub(1));
            return Err(Error::setting("mem_freq", message));
        }
        if let Some(lora) = lora {
            lora.validate()?;
        }
        if settings.optimization_process != Process::Landmark {
            return Err(Error::setting("optimization_process", "a LLaMA is trained window by window"));
        }
        let Some(negatives) = &settings.negatives else { return Ok(()) };
        let exercises = settings.exercises.as_ref().map_or(0, |options| options.rows(settings.batch_size));
        Ok(negatives.check(settings.model.window(), Some(*mem_freq), settings.batch_size, exercises)?)
    }

    fn rows(settings: &Settings<Self>) -> Rows {
        let Tuning { mem_freq, mem_id, .. } = settings.model;
        Rows {
            length: settings.model.window(),
            flag: "model_max_length",
            mem_freq: Some(mem_freq),
            landmark_id: mem_id,
            vocab_size: None,
            border: None,
            texts_apart: false,
        }
    }

    fn init(settings: &Settings<Self>, from: Option<&Path>, device: &Device) -> Result<Tuned> {
        if from.is_some() {
            return Err(Error::setting("init_from", "fine-tuning begins with --model_name_or_path"));
        }
        let (model, tokenizer) = settings.model.base(settings.precision, device)?;
        let model = match &settings.model.lora {
            Some(lora) => model.with_lora(lora, settings.seed)?,
            None => model,
        };
        settings.model.tuned(model, tokenizer, settings)
    }

    fn load(settings: &Settings<Self>, folder: &Path, device: &Device) -> Result<Tuned> {
        let (model, tokenizer) = match settings.model.lora {
            Some(_) => {
                let (model, tokenizer) = settings.model.base(settings.precision, device)?;
                (model.with_adapter(folder)?, tokenizer)
            }
            None => (Llama::load(folder, DType::F32, device)?, Pretrained::from_folder(folder)?),
        };
        settings.model.tuned(model, tokenizer, settings)
    }
}

impl Model for Tuned {
    type Recipe = Tuning;

    fn parameters(&self) -> &BTreeMap<String, Var> {
        self.model.parameters()
    }

    /// All but biases and norms, embeddings too: as the Trainer of `transformers` has it.
    fn decays(name: &str, _: &Var) -> bool {
        !name.ends_with("bias") && !name.contains("norm")
    }

    fn activations(&self) -> DType {
        self.model.activations()
    }

    fn with_activation_checkpointing(self, on: bool) -> Self {
        Self { model: self.model.with_activation_checkpointing(on), ..self }
    }

    fn detached(&self) -> Self {
        Self { model: self.model.detached(), tokenizer: self.tokenizer.clone(), base: self.base.clone() }
    }

    fn read(
        &self,
        _: &Settings<Tuning>,
        batch: &Batch,
        training: Option<Training>,
        mut each: impl FnMut(Read) -> Result<()>,
    ) -> Result<()> {
        let window = Window::new(batch, 0, batch.sequence_length)?;
        let seed = training.as_ref().map(|training| training.seed);
        let negatives =
            training.as_ref().and_then(|training| Some((training.negatives?, batch.exercises, training.seed)));
        let mut attention = match negatives {
            Some(negatives) => self.model.window_attention_with_negatives(&window.ids, negatives)?,
            None => self.model.window_attention(&window.ids)?,
        };
        let recording = training.map(|training| Recording::start(&training.rounded));
        let hidden = self.model.hidden_in_training(&window.ids, &mut attention, seed)?;
        each(Read { hidden, targets: window.targets, weights: window.weights, recording })
    }

    fn loss(&self, hidden: &Tensor, targets: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.model.loss(hidden, targets, weights)?)
    }

    fn token_scores(&self, hidden: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
        Ok(self.model.token_scores(hidden, targets)?)
    }

    /// A Hugging Face folder: the whole model in float32, or its adapters, and the tokenizer.
    fn save(&self, folder: &Path) -> Result<()> {
        match self.model.lora() {
            Some(_) => self.model.save_adapter(folder, &self.base)?,
            None => self.model.save(folder, DType::F32)?,
        }
        Ok(self.tokenizer.save(folder)?)
    }

    /// The model itself, as the Trainer leaves it in its output folder.
    fn finish(&self, folder: &Path) -> Result<()> {
        self.save(folder)
    }
}
