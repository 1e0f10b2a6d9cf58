//! A GPT in training.

use crate::checkpoint::{Checkpoints, EXPERIMENT};
use crate::error::{Error, Result};
use crate::model::{Model, Read, Recipe, Rows, Training};
use crate::process::Process;
use crate::settings::Settings;
use candle_core::{DType, Device, Tensor, Var};
use landmark_data::{Batch, Border};
use landmark_models::gpt::{Gpt, GptConfig, Placement, SoftmaxFunc, Variant};
use landmark_models::ops::TokenScore;
use std::collections::BTreeMap;
use std::path::Path;

impl Model for Gpt {
    type Recipe = GptConfig;

    fn parameters(&self) -> &BTreeMap<String, Var> {
        self.parameters()
    }

    /// The weights of linear layers, so neither vectors (biases, LayerNorm) nor embeddings, of which the token embedding is tied to the
    /// output layer.
    fn decays(name: &str, var: &Var) -> bool {
        let is_embedding = name.ends_with("wte.weight") || name.ends_with("wpe.weight") || name.contains("embedding");
        name.ends_with("weight") && var.rank() == 2 && !is_embedding
    }

    fn activations(&self) -> DType {
        self.activations()
    }

    fn with_activation_checkpointing(self, on: bool) -> Self {
        self.with_activation_checkpointing(on)
    }

    fn detached(&self) -> Self {
        self.detached()
    }

    fn read(
        &self,
        settings: &Settings,
        batch: &Batch,
        training: Option<Training>,
        each: impl FnMut(Read) -> Result<()>,
    ) -> Result<()> {
        settings.optimization_process.read(self, batch, training, each)
    }

    fn loss(&self, hidden: &Tensor, targets: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.loss(hidden, targets, weights)?)
    }

    fn token_scores(&self, hidden: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
        Ok(self.token_scores(hidden, targets)?)
    }

    fn save(&self, folder: &Path) -> Result<()> {
        Ok(self.save(folder)?)
    }
}

impl Recipe for GptConfig {
    type Model = Gpt;

    const CHECKPOINTS: Checkpoints = EXPERIMENT;

    fn check(settings: &Settings) -> Result<()> {
        let model = &settings.model;
        model.validate()?;
        check_process(settings)?;
        let Some(negatives) = &settings.negatives else { return Ok(()) };
        let is_xl = settings.optimization_process != Process::Landmark;
        if model.model != Variant::Landmark || model.softmax_func != SoftmaxFunc::MemOpt || is_xl {
            let message = "only --model landmark with --softmax_func mem_opt chooses blocks by their landmarks";
            return Err(Error::setting("negative_rows", message));
        }
        let exercises = settings.exercises.as_ref().map_or(0, |options| options.rows(settings.batch_size));
        Ok(negatives.check(model.sequence_length, model.mem_freq, settings.batch_size, exercises)?)
    }

    fn rows(settings: &Settings) -> Rows {
        let &GptConfig { mem_freq, landmark_id, vocab_size, landmarks, sequence_length, .. } = &settings.model;
        let (length, flag) = match settings.optimization_process {
            Process::Landmark => (sequence_length, "sequence_length"),
            Process::TransformerXl { total_sequence_length, .. } => (total_sequence_length, "total_sequence_length"),
        };
        let (vocab_size, border) = (Some(vocab_size), border(landmarks));
        Rows { length, flag, mem_freq, landmark_id, vocab_size, border, texts_apart: true }
    }

    fn init(settings: &Settings, from: Option<&Path>, device: &Device) -> Result<Gpt> {
        let model = match from {
            None => Gpt::init(&settings.model, settings.seed, DType::F32, device)?,
            Some(folder) => load(&settings.model, folder, device)?,
        };
        Ok(model.with_activations(settings.precision.dtype())?)
    }

    fn load(settings: &Settings, folder: &Path, device: &Device) -> Result<Gpt> {
        Ok(Gpt::load(folder, device)?.with_activations(settings.precision.dtype())?)
    }
}

/// The border of the text that landmarks are at; `None` if they are at regular places.
pub(crate) fn border(placement: Placement) -> Option<Border> {
    match placement {
        Placement::Regular => None,
        Placement::Sentence => Some(Border::Sentence),
        Placement::Paragraph => Some(Border::Paragraph),
        Placement::Line => Some(Border::Line),
        Placement::Code => Some(Border::Code),
    }
}

fn check_process(settings: &Settings) -> Result<()> {
    let &Process::TransformerXl { total_sequence_length, mem_cache_size } = &settings.optimization_process else {
        return Ok(());
    };
    let model = &settings.model;
    let window = model.sequence_length;
    if total_sequence_length < window {
        let message = format!("{total_sequence_length} is less than --sequence_length, of which it is a number");
        return Err(Error::setting("total_sequence_length", message));
    }
    if settings.activation_checkpointing {
        let message = "a window of transformer_xl leaves something behind for the next: it cannot be computed again";
        return Err(Error::setting("activation_checkpointing", message));
    }
    if mem_cache_size == 0 {
        return Err(Error::setting("mem_cache_size", "0 is too small, expected at least 1"));
    }
    if model.pos_jump_on_mem.is_some_and(|jump| jump > 0) {
        return Err(Error::setting("pos_jump_on_mem", "the positions of transformer_xl do not jump"));
    }
    let has_landmarks = model.model != Variant::BaseRotary && model.mem_freq.is_some();
    if has_landmarks || model.model == Variant::LandmarkWithCmt {
        let message =
            "transformer_xl has a plain softmax: use --model base_rotary, or --model landmark with --mem_freq None";
        return Err(Error::setting("optimization_process", message));
    }
    Ok(())
}

/// The weights of another model of this kind. What is random in training, the window and the frequency of landmarks may be others.
fn load(config: &GptConfig, folder: &Path, device: &Device) -> Result<Gpt> {
    let model = Gpt::load(folder, device)?;
    let other = model.config();
    let same_kind = GptConfig {
        sequence_length: config.sequence_length,
        mem_freq: config.mem_freq,
        dropout: config.dropout,
        group_dropout: config.group_dropout,
        under_rem_score_prob: config.under_rem_score_prob,
        pos_jump_on_mem: config.pos_jump_on_mem,
        ..other.clone()
    };
    if same_kind != *config {
        let message = format!("{}: that model is another one: {other:?}, not {config:?}", folder.display());
        return Err(Error::setting("init_from", message));
    }
    let weights = model.parameters().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    Ok(Gpt::from_tensors(config, weights)?)
}
