//! One training step, and an evaluation.

use crate::error::{Error, Result};
use crate::optimizer::Optimizer;
use crate::schedule::Schedule;
use crate::settings::Settings;
use candle_core::{DType, Device, Tensor};
use landmark_data::Batch;
use landmark_models::gpt::{Gpt, WindowAttention};
use std::path::Path;

/// A model in training, its optimizer, and how far they are.
pub struct Trainer {
    model: Gpt,
    optimizer: Optimizer,
    schedule: Schedule,
    seed: u64,
    iteration: usize,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The mean loss of its batches, before the step.
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
    /// The mean of the batches' losses.
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

impl Trainer {
    /// A trainer that has made no step.
    pub fn new(settings: &Settings, model: Gpt) -> Result<Self> {
        settings.check()?;
        let optimizer = Optimizer::new(model.parameters(), settings.opt, settings.weight_decay, settings.grad_clip)?;
        Ok(Self { model, optimizer, schedule: settings.schedule(), seed: settings.seed, iteration: 0 })
    }

    /// One step on the sum of the gradients of these batches.
    pub fn step(&mut self, batches: impl IntoIterator<Item = Batch>) -> Result<Step> {
        let mut gradients = self.optimizer.gradients();
        let (mut loss, mut count, mut tokens) = (0., 0, 0);
        for batch in batches {
            let seed = mix(mix(self.seed, self.iteration as u64), count);
            let batch_loss = batch_loss(&self.model, &batch, Some(seed))?;
            loss += scalar(&batch_loss)?;
            self.optimizer.accumulate(&mut gradients, &mut batch_loss.backward()?)?;
            count += 1;
            tokens += batch.inputs.len();
        }
        let loss = loss / count as f64;
        if !loss.is_finite() {
            return Err(Error::Diverged { iteration: self.iteration + 1, loss });
        }
        let lr = self.schedule.rate(self.iteration);
        let grad_norm = self.optimizer.step(&gradients, lr)?;
        self.iteration += 1;
        Ok(Step { loss, lr, grad_norm, tokens })
    }

    /// The model.
    pub fn model(&self) -> &Gpt {
        &self.model
    }

    /// The model, trained as far as it is.
    pub fn into_model(self) -> Gpt {
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
    pub(crate) fn load(settings: &Settings, model: Gpt, folder: &Path, iteration: usize) -> Result<Self> {
        let mut trainer = Self::new(settings, model)?;
        trainer.optimizer.load(&folder.join(OPTIMIZER))?;
        trainer.iteration = iteration;
        Ok(trainer)
    }
}

const OPTIMIZER: &str = "optimizer.safetensors";

/// The loss of a batch, of which the gradient can be taken. `dropout` seeds all that is random in training.
fn batch_loss(model: &Gpt, batch: &Batch, dropout: Option<u64>) -> Result<Tensor> {
    let (ids, targets) = tensors(model, batch)?;
    let mut attention = WindowAttention::new(model.config(), &ids, dropout)?;
    let hidden = model.hidden(&ids, &mut attention, dropout)?;
    Ok(model.loss(&hidden, &targets)?)
}

/// Measures a model on batches, without dropout. The loss is the mean of the batches' as the reference has it; accuracy is
/// of positions that have a target (the reference counts the others as wrong).
pub fn evaluate(model: &Gpt, batches: impl IntoIterator<Item = Batch>) -> Result<Evaluation> {
    let model = model.detached();
    let (mut loss, mut count, mut correct, mut targets) = (0., 0, 0, 0);
    for batch in batches {
        let (ids, target_ids) = tensors(&model, &batch)?;
        let mut attention = WindowAttention::new(model.config(), &ids, None)?;
        let scores = model.token_scores(&model.hidden(&ids, &mut attention, None)?, &target_ids)?;
        let scores = || scores.iter().flatten();
        let batch_targets = scores().count();
        loss += scores().map(|score| score.loss).sum::<f64>() / batch_targets as f64;
        correct += scores().filter(|score| score.correct).count();
        targets += batch_targets;
        count += 1;
    }
    Ok(Evaluation { loss: loss / count as f64, accuracy: correct as f64 / targets as f64 })
}

fn tensors(model: &Gpt, batch: &Batch) -> Result<(Tensor, Tensor)> {
    let shape = (batch.rows, batch.sequence_length);
    let device = model.parameters().values().next().map_or(&Device::Cpu, |var| var.device());
    let tensor = |ids: &[u32]| Tensor::from_slice(ids, shape, device);
    Ok((tensor(&batch.inputs)?, tensor(&batch.targets)?))
}

fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

/// A seed out of a seed and a number, by SplitMix64: neighbours come out unrelated.
fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
