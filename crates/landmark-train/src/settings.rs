//! What decides a run.

use crate::error::{Error, Result};
use crate::model::Recipe;
use crate::optimizer::Method;
use crate::process::Process;
use crate::schedule::{Anneal, Schedule};
use candle_core::DType;
use landmark_data::ExerciseOptions;
use landmark_models::gpt::{GptConfig, NegativeRows};
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
pub struct Settings<C = GptConfig> {
    /// The model, its training window and the distance of landmarks.
    pub model: C,
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
    /// Windows in a batch of an evaluation, where they are another number.
    #[serde(default)]
    pub eval_batch_size: Option<usize>,
    /// Batches in a step; their gradients are added up.
    pub acc_steps: usize,
    /// Whether their sum is divided by their number: `transformers` does, the reference does not.
    #[serde(default)]
    pub mean_gradients: bool,
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
    /// Log every so many iterations, and the last one; `None`: every one.
    #[serde(default)]
    pub logging_steps: Option<usize>,
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
const FREE: [&str; 6] = [
    "eval_batch_size",
    "logging_steps",
    "eval_freq",
    "save_checkpoint_freq",
    "keep_checkpoints",
    "activation_checkpointing",
];

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
            eval_batch_size: None,
            acc_steps: 4,
            mean_gradients: false,
            seed: 2,
            iterations: 15_000,
            lr: 2e-3,
            warmup_percent: 0.02,
            scheduler: Anneal::Cos,
            opt: Method::AdamW { beta1: 0.9, beta2: 0.95 },
            weight_decay: 1e-3,
            grad_clip: None,
            logging_steps: None,
            eval_freq: 200,
            save_checkpoint_freq: None,
            keep_checkpoints: None,
            activation_checkpointing: false,
        }
    }
}

impl<C: Recipe> Settings<C> {
    /// The learning rates of the run.
    pub fn schedule(&self) -> Schedule {
        Schedule { anneal: self.scheduler, peak: self.lr, warmup: self.warmup_percent, steps: self.iterations }
    }

    /// Refuses values that no run can have, by the name of the flag.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("batch_size", Some(self.batch_size)),
            ("acc_steps", Some(self.acc_steps)),
            ("iterations", Some(self.iterations)),
            ("eval_batch_size", self.eval_batch_size),
            ("logging_steps", self.logging_steps),
            ("eval_freq", Some(self.eval_freq)),
            ("save_checkpoint_freq", self.save_checkpoint_freq),
            ("keep_checkpoints", self.keep_checkpoints),
        ];
        for (flag, count) in counts {
            if count == Some(0) {
                return Err(Error::setting(flag, "0 is too small, expected at least 1"));
            }
        }
        C::check(self)?;
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
        let is_xl = self.optimization_process != Process::Landmark;
        if self.whole_blocks && is_xl {
            return Err(Error::setting("whole_blocks", "the rows of transformer_xl have no blocks"));
        }
        if self.exercises.is_some() && !self.whole_blocks {
            return Err(Error::setting("exercise_rows", "exercises need --whole_blocks"));
        }
        Ok(())
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
