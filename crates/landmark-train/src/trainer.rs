//! One training step, and an evaluation.

use crate::error::{Error, Result};
use crate::model::{Model, Training};
use crate::optimizer::Optimizer;
use crate::process::mix;
use crate::schedule::Schedule;
use crate::settings::Settings;
use candle_core::{DType, Tensor};
use landmark_data::Batch;
use landmark_models::gpt::Gpt;
use landmark_models::ops;
use std::path::Path;

/// A model in training, its optimizer, and how far they are.
pub struct Trainer<M: Model = Gpt> {
    model: M,
    optimizer: Optimizer,
    schedule: Schedule,
    settings: Settings<M::Recipe>,
    iteration: usize,
    #[cfg(feature = "cuda")]
    numbers: crate::cuda::Numbers,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The mean loss of its windows, before the step.
    pub loss: f64,
    /// The learning rate it was made with.
    pub lr: f64,
    /// The norm of the gradient before clipping, if it is clipped.
    pub grad_norm: Option<f64>,
    /// The tokens of its batches.
    pub tokens: usize,
}

/// How well a model predicts text that it is not trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// The mean of the windows' losses.
    pub loss: f64,
    /// The share of the targets that the model thinks the likeliest token.
    pub accuracy: f64,
}

impl Evaluation {
    /// The exponential of the loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

impl<M: Model> Trainer<M> {
    /// A trainer that has made no step.
    pub fn new(settings: &Settings<M::Recipe>, model: M) -> Result<Self> {
        settings.check()?;
        let model = model.with_activation_checkpointing(settings.activation_checkpointing);
        #[cfg_attr(not(feature = "cuda"), allow(unused_mut))]
        let mut optimizer =
            Optimizer::new(model.parameters(), settings.opt, settings.weight_decay, M::decays, settings.grad_clip)?;
        #[cfg(feature = "cuda")]
        if model.activations() == DType::BF16 {
            optimizer.keep_rounded()?;
        }
        Ok(Self {
            model,
            optimizer,
            schedule: settings.schedule(),
            settings: settings.clone(),
            iteration: 0,
            #[cfg(feature = "cuda")]
            numbers: Default::default(),
        })
    }

    /// One step on the sum of the gradients of these batches.
    pub fn step(&mut self, batches: impl IntoIterator<Item = Batch>) -> Result<Step> {
        let mut gradients = self.optimizer.gradients();
        let mut losses = Vec::new();
        #[cfg(feature = "cuda")]
        self.numbers.restart();
        let mut tokens = 0;
        let rounded = self.optimizer.rounded();
        let Settings { seed, negatives, acc_steps, mean_gradients, .. } = self.settings;
        for (micro, batch) in batches.into_iter().enumerate() {
            // Seeds all that is random in training.
            let seed = mix(mix(seed, self.iteration as u64), micro as u64);
            let training = Training { seed, negatives, rounded: rounded.clone() };
            self.model.read(&self.settings, &batch, Some(training), |read| {
                let loss = self.model.loss(&read.hidden, &read.targets, read.weights.as_ref())?;
                // On a GPU a loss is on its way before the way back is launched, and read after that.
                match loss.device().is_cpu() {
                    true => losses.push(scalar(&loss)?),
                    #[cfg(feature = "cuda")]
                    false => self.numbers.send(&loss)?,
                    #[cfg(not(feature = "cuda"))]
                    false => unreachable!("a model is on a GPU with the feature alone"),
                }
                let recording = read.recording.expect("a training step is recorded");
                let loss = if mean_gradients { ops::scaled(&loss, 1. / acc_steps as f64)? } else { loss };
                self.optimizer.accumulate(&mut gradients, &mut recording.backward(&loss)?)?;
                Ok(())
            })?;
            tokens += batch.inputs.len();
        }
        let lr = self.schedule.rate(self.iteration);
        let grad_norm = self.optimizer.step(&gradients, lr)?;
        self.iteration += 1;
        #[cfg(feature = "cuda")]
        losses.extend(self.numbers.take()?);
        let loss = losses.iter().sum::<f64>() / losses.len() as f64;
        if !loss.is_finite() {
            return Err(Error::Diverged { iteration: self.iteration, loss });
        }
        Ok(Step { loss, lr, grad_norm, tokens })
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model, trained as far as it is.
    pub fn into_model(self) -> M {
        self.model
    }

    /// The steps that were made.
    pub fn iteration(&self) -> usize {
        self.iteration
    }

    /// Writes the model and the optimizer into a folder.
    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        self.model.save(folder)?;
        self.optimizer.save(&folder.join(OPTIMIZER))
    }

    /// Goes on from what [`Trainer::save`] wrote, of which the caller has loaded the model.
    pub(crate) fn load(settings: &Settings<M::Recipe>, model: M, folder: &Path, iteration: usize) -> Result<Self> {
        let mut trainer = Self::new(settings, model)?;
        trainer.optimizer.load(&folder.join(OPTIMIZER))?;
        trainer.iteration = iteration;
        Ok(trainer)
    }
}

const OPTIMIZER: &str = "optimizer.safetensors";

/// Measures a model on batches, without dropout. The loss is the mean of the windows' as the reference has it, but for
/// Transformer-XL, where the reference adds those of a row up; accuracy is of positions that have a target (the reference
/// counts the others as wrong).
pub fn evaluate<M: Model>(
    model: &M,
    settings: &Settings<M::Recipe>,
    batches: impl IntoIterator<Item = Batch>,
) -> Result<Evaluation> {
    let model = model.detached();
    let (mut loss, mut windows, mut correct, mut targets) = (0., 0, 0, 0);
    for batch in batches {
        model.read(settings, &batch, None, |read| {
            let scores = model.token_scores(&read.hidden, &read.targets)?;
            let scores = || scores.iter().flatten();
            let window_targets = scores().count();
            loss += scores().map(|score| score.loss).sum::<f64>() / window_targets as f64;
            correct += scores().filter(|score| score.correct).count();
            targets += window_targets;
            windows += 1;
            Ok(())
        })?;
    }
    Ok(Evaluation { loss: loss / windows as f64, accuracy: correct as f64 / targets as f64 })
}

fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}
