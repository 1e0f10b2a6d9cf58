//! What decides a run.

use crate::error::{Error, Result};
use crate::optimizer::Method;
use crate::process::Process;
use crate::schedule::{Anneal, Schedule};
use candle_core::DType;
use landmark_data::ExerciseOptions;
use landmark_models::gpt::{GptConfig, NegativeRows, SoftmaxFunc, Variant};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// What the activations of a training step are; parameters, their gradients and sums are float32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Like the parameters.
    #[default]
    Float32,
    /// The reference's autocast, on a GPU.
    BFloat16,
}

impl Precision {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::Float32 => DType::F32,
            Self::BFloat16 => DType::BF16,
        }
    }
}

/// The settings of a run, resolved: what the command line, the data and the defaults came to. They are stored in every
/// checkpoint. The fields are named as the flags of the command line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The model, its training window and the distance of landmarks.
    pub model: GptConfig,
    /// How a model reads the tokens of a batch.
    #[serde(default)]
    pub optimization_process: Process,
    /// What activations are.
    #[serde(default)]
    pub precision: Precision,
    /// Whether windows begin with a whole block, wherever in the corpus they begin. The paper's begin anywhere in a block.
    #[serde(default)]
    pub whole_blocks: bool,
    /// Retrieval exercises among the rows; the paper trains without.
    #[serde(default)]
    pub exercises: Option<ExerciseOptions>,
    /// Landmarks of other rows in the outer softmax; the paper trains without.
    #[serde(default)]
    pub negatives: Option<NegativeRows>,
    /// Windows in a batch.
    pub batch_size: usize,
    /// Batches in a step; their gradients are added up.
    pub acc_steps: usize,
    /// Decides the first weights, the order of the data and dropout.
    pub seed: u64,
    /// Steps of the run.
    pub iterations: usize,
    /// The highest learning rate.
    pub lr: f64,
    /// The share of the steps in which the learning rate climbs.
    pub warmup_percent: f64,
    /// How the learning rate moves.
    pub scheduler: Anneal,
    /// The optimizer.
    pub opt: Method,
    /// Weight decay of linear layers.
    pub weight_decay: f64,
    /// Bounds the norm of a step's gradient, the sum over its batches.
    pub grad_clip: Option<f64>,
    /// Evaluate every so many iterations, and after the last one.
    pub eval_freq: usize,
    /// Save a checkpoint every so many iterations; `None`: only when the run ends or is stopped.
    pub save_checkpoint_freq: Option<usize>,
    /// Keep only the newest so many checkpoints.
    pub keep_checkpoints: Option<usize>,
    /// Keep of a step the inputs of the layers alone, and compute the layers again on the way back: less memory, more time, the same bits.
    #[serde(default)]
    pub activation_checkpointing: bool,
}

/// Settings that change no weight: a run may be resumed with other ones.
const FREE: [&str; 4] = ["eval_freq", "save_checkpoint_freq", "keep_checkpoints", "activation_checkpointing"];

impl Settings {
    /// The reference's defaults for the training of this model.
    pub fn of(model: GptConfig) -> Self {
        Self {
            model,
            optimization_process: Process::Landmark,
            precision: Precision::Float32,
            whole_blocks: false,
            exercises: None,
            negatives: None,
            batch_size: 50,
            acc_steps: 4,
            seed: 2,
            iterations: 15_000,
            lr: 2e-3,
            warmup_percent: 0.02,
            scheduler: Anneal::Cos,
            opt: Method::AdamW { beta1: 0.9, beta2: 0.95 },
            weight_decay: 1e-3,
            grad_clip: None,
            eval_freq: 200,
            save_checkpoint_freq: None,
            keep_checkpoints: None,
            activation_checkpointing: false,
        }
    }

    /// The learning rates of the run.
    pub fn schedule(&self) -> Schedule {
        Schedule { anneal: self.scheduler, peak: self.lr, warmup: self.warmup_percent, steps: self.iterations }
    }

    /// The tokens of a row of a batch.
    pub fn row_length(&self) -> usize {
        match self.optimization_process {
            Process::Landmark => self.model.sequence_length,
            Process::TransformerXl { total_sequence_length, .. } => total_sequence_length,
        }
    }

    /// Refuses values that no run can have, by the name of the flag.
    pub fn check(&self) -> Result<()> {
        self.model.validate()?;
        let counts = [
            ("batch_size", Some(self.batch_size)),
            ("acc_steps", Some(self.acc_steps)),
            ("iterations", Some(self.iterations)),
            ("eval_freq", Some(self.eval_freq)),
            ("save_checkpoint_freq", self.save_checkpoint_freq),
            ("keep_checkpoints", self.keep_checkpoints),
        ];
        for (flag, count) in counts {
            if count == Some(0) {
                return Err(Error::setting(flag, "0 is too small, expected at least 1"));
            }
        }
        if let Process::TransformerXl { total_sequence_length, mem_cache_size } = self.optimization_process {
            let window = self.model.sequence_length;
            if total_sequence_length < window {
                let message =
                    format!("{total_sequence_length} is less than --sequence_length, of which it is a number");
                return Err(Error::setting("total_sequence_length", message));
            }
            if self.activation_checkpointing {
                let message =
                    "a window of transformer_xl leaves something behind for the next: it cannot be computed again";
                return Err(Error::setting("activation_checkpointing", message));
            }
            if mem_cache_size == 0 {
                return Err(Error::setting("mem_cache_size", "0 is too small, expected at least 1"));
            }
            if self.model.pos_jump_on_mem.is_some_and(|jump| jump > 0) {
                return Err(Error::setting("pos_jump_on_mem", "the positions of transformer_xl do not jump"));
            }
            let has_landmarks = self.model.model != Variant::BaseRotary && self.model.mem_freq.is_some();
            if has_landmarks || self.model.model == Variant::LandmarkWithCmt {
                let message = "transformer_xl has a plain softmax: use --model base_rotary, or --model landmark with --mem_freq None";
                return Err(Error::setting("optimization_process", message));
            }
        }
        self.check_retrieval()?;
        let within = |flag, value: f64, allowed: bool, range| {
            let message = || format!("{value} is outside its range, expected {range}");
            if allowed { Ok(()) } else { Err(Error::setting(flag, message())) }
        };
        let positive = |x: f64| x > 0. && x.is_finite();
        within("lr", self.lr, positive(self.lr), "a number above 0")?;
        let (warmup, decay) = (self.warmup_percent, self.weight_decay);
        within("warmup_percent", warmup, (0. ..=1.).contains(&warmup), "a share from 0 to 1")?;
        within("weight_decay", decay, decay >= 0. && decay.is_finite(), "a number from 0")?;
        if let Some(clip) = self.grad_clip {
            within("grad_clip", clip, positive(clip), "a number above 0, or None")?;
        }
        if let Method::AdamW { beta1, beta2 } = self.opt {
            within("beta1", beta1, (0. ..1.).contains(&beta1), "at least 0 and below 1")?;
            within("beta2", beta2, (0. ..1.).contains(&beta2), "at least 0 and below 1")?;
        }
        Ok(())
    }

    /// What teaches retrieval beside the text itself.
    fn check_retrieval(&self) -> Result<()> {
        let (is_xl, model) = (self.optimization_process != Process::Landmark, &self.model);
        let exercises = self.exercises.as_ref().map_or(0, |options| options.rows(self.batch_size));
        if self.whole_blocks && is_xl {
            return Err(Error::setting("whole_blocks", "the rows of transformer_xl have no blocks"));
        }
        if self.exercises.is_some() && !self.whole_blocks {
            return Err(Error::setting("exercise_rows", "exercises need --whole_blocks"));
        }
        let Some(negatives) = &self.negatives else { return Ok(()) };
        if model.model != Variant::Landmark || model.softmax_func != SoftmaxFunc::MemOpt || is_xl {
            let message = "only --model landmark with --softmax_func mem_opt chooses blocks by their landmarks";
            return Err(Error::setting("negative_rows", message));
        }
        Ok(negatives.check(model, self.batch_size, exercises)?)
    }

    /// Refuses to go on from a checkpoint of a run that other settings decided.
    pub(crate) fn check_same_run(&self, saved: &Self, checkpoint: &Path) -> Result<()> {
        let value = |settings| serde_json::to_value(settings).map_err(|error| Error::format(checkpoint, error));
        match difference("", &value(saved)?, &value(self)?) {
            None => Ok(()),
            Some((setting, saved, given)) => {
                Err(Error::OtherRun { path: checkpoint.to_path_buf(), setting, saved, given })
            }
        }
    }
}

/// The first setting that differs: its name, its saved and its given value.
fn difference(name: &str, saved: &Value, given: &Value) -> Option<(String, String, String)> {
    match (saved, given) {
        (Value::Object(saved), Value::Object(given)) => saved.iter().find_map(|(key, value)| {
            if name.is_empty() && FREE.contains(&key.as_str()) {
                return None;
            }
            difference(key, value, given.get(key).unwrap_or(&Value::Null))
        }),
        _ if saved == given => None,
        _ => Some((name.to_string(), saved.to_string(), given.to_string())),
    }
}
