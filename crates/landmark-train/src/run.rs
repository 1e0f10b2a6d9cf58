//! A run from its first or its next iteration to its last, or to where it is stopped.

use crate::checkpoint::{self, Found};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::experiment::{self, Experiment, History, State};
use crate::settings::Settings;
use crate::trainer::{Evaluation, Step, Trainer, evaluate};
use candle_core::{DType, Device};
use landmark_models::gpt::Gpt;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Batches of an evaluation, as in the reference. They are the same ones each time, so that evaluations compare.
const EVALUATION_BATCHES: u64 = 24;

/// Where and how long a run goes.
#[derive(Default)]
pub struct Limits<'a> {
    /// The folder of checkpoints, metrics and summary. Without one the run leaves nothing behind.
    pub experiment: Option<&'a Path>,
    /// Go on from the newest checkpoint, if there is one.
    pub resume: bool,
    /// Somebody else's wish to stop after the current step.
    pub stop: Option<&'a AtomicBool>,
    /// Stop after so much time.
    pub time: Option<Duration>,
}

/// What happens in a run, for whoever shows it.
#[derive(Debug)]
pub enum Event<'a> {
    /// Something that a user may want to know.
    Note(String),
    /// The run goes from the first to the second number of iterations.
    Begin(usize, usize),
    /// An iteration is done; how long it took.
    Step(usize, &'a Step, Duration),
    /// The model was evaluated after an iteration; how long it took.
    Evaluated(usize, &'a Evaluation, Duration),
    /// A checkpoint was saved; how long it took.
    Saved(&'a Path, Duration),
}

/// How a run ended.
pub enum Outcome {
    /// With its last iteration.
    Finished {
        /// The trained model.
        model: Gpt,
        /// Its evaluations on the way.
        history: History,
    },
    /// It was finished before, nothing was done.
    AlreadyFinished,
    /// Earlier than its last iteration.
    Stopped {
        /// The model as far as it is.
        model: Gpt,
        /// The iterations that were done.
        iteration: usize,
        /// From where it can go on, if the run has a folder.
        checkpoint: Option<PathBuf>,
    },
}

/// A line of the metrics.
#[derive(Serialize)]
struct StepLine {
    iteration: usize,
    loss: f64,
    lr: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    grad_norm: Option<f64>,
    tokens_per_second: f64,
}

/// A line of the metrics.
#[derive(Serialize)]
struct EvaluationLine {
    iteration: usize,
    val_loss: f64,
    val_perplexity: f64,
    val_accuracy: f64,
    seconds: f64,
}

/// Trains a model. `observe` is told of every step.
pub fn train(
    settings: &Settings,
    data: &Data,
    device: &Device,
    limits: &Limits,
    observe: &mut dyn FnMut(Event),
) -> Result<Outcome> {
    let begun = Instant::now();
    settings.check()?;
    let (mut experiment, found) = match limits.experiment {
        None => (None, None),
        Some(folder) => match experiment::start(folder, limits.resume, &mut |note| observe(Event::Note(note)))? {
            None => return Ok(Outcome::AlreadyFinished),
            Some((experiment, found)) => (Some(experiment), found),
        },
    };
    let (mut trainer, mut history) = match found {
        Some(found) => resume(settings, data, device, found, observe)?,
        None => {
            let model = Gpt::init(&settings.model, settings.seed, DType::F32, device)?;
            (Trainer::new(settings, model)?, History::default())
        }
    };
    observe(Event::Begin(trainer.iteration(), settings.iterations));
    while trainer.iteration() < settings.iterations {
        advance(settings, data, &mut trainer, &mut history, experiment.as_mut(), observe)?;
        let iteration = trainer.iteration();
        let stopped = limits.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
            || limits.time.is_some_and(|time| begun.elapsed() >= time);
        let is_last = iteration == settings.iterations;
        let is_due = settings.save_checkpoint_freq.is_some_and(|every| iteration.is_multiple_of(every));
        if let Some(experiment) = experiment.as_mut().filter(|_| is_due || is_last || stopped) {
            let begun = Instant::now();
            if let Some(path) = experiment.save(settings, data, &trainer, &history)? {
                observe(Event::Saved(&path, begun.elapsed()));
            }
        }
        if stopped && !is_last {
            let checkpoint = limits.experiment.map(|folder| checkpoint::path(folder, iteration));
            return Ok(Outcome::Stopped { model: trainer.into_model(), iteration, checkpoint });
        }
    }
    if let Some(experiment) = &experiment {
        experiment.finish(settings, &history)?;
    }
    Ok(Outcome::Finished { model: trainer.into_model(), history })
}

/// The trainer as a checkpoint left it, if the same settings and data made the checkpoint.
fn resume(
    settings: &Settings,
    data: &Data,
    device: &Device,
    found: Found<State>,
    observe: &mut dyn FnMut(Event),
) -> Result<(Trainer, History)> {
    let Found { path, iteration, state, .. } = found;
    settings.check_same_run(&state.settings, &path)?;
    let other = |setting: &str, saved: String, given: String| {
        Err(Error::OtherRun { path: path.clone(), setting: setting.into(), saved, given })
    };
    if state.data != data.identity() {
        return other("data", format!("{:?}", state.data), format!("{:?}", data.identity()));
    }
    let next_batch = iteration as u64 * settings.acc_steps as u64;
    if state.next_batch != next_batch {
        return other("next_batch", state.next_batch.to_string(), next_batch.to_string());
    }
    let trainer = Trainer::load(settings, Gpt::load(&path, device)?, &path, iteration)?;
    observe(Event::Note(format!("resuming from {}", path.display())));
    Ok((trainer, state.history))
}

/// One iteration, and the evaluation if one is due.
fn advance(
    settings: &Settings,
    data: &Data,
    trainer: &mut Trainer,
    history: &mut History,
    mut experiment: Option<&mut Experiment>,
    observe: &mut dyn FnMut(Event),
) -> Result<()> {
    let begun = Instant::now();
    let first = trainer.iteration() as u64 * settings.acc_steps as u64;
    let batches = (0..settings.acc_steps as u64).map(|micro| data.train.batch(settings.seed, first + micro));
    let step = trainer.step(batches)?;
    let (iteration, took) = (trainer.iteration(), begun.elapsed());
    observe(Event::Step(iteration, &step, took));
    if let Some(experiment) = experiment.as_deref_mut() {
        let tokens_per_second = step.tokens as f64 / took.as_secs_f64().max(1e-9);
        let Step { loss, lr, grad_norm, .. } = step;
        experiment.record(&StepLine { iteration, loss, lr, grad_norm, tokens_per_second })?;
    }
    if !iteration.is_multiple_of(settings.eval_freq) && iteration != settings.iterations {
        return Ok(());
    }
    history.iterations.push(iteration);
    history.train_loss.push(step.loss);
    let Some(batches) = &data.validation else { return Ok(()) };
    let begun = Instant::now();
    let batches = (0..EVALUATION_BATCHES).map(|index| batches.batch(settings.seed, index));
    let evaluation = evaluate(trainer.model(), settings.optimization_process, batches)?;
    if !evaluation.loss.is_finite() {
        return Err(Error::Diverged { iteration, loss: evaluation.loss });
    }
    let took = begun.elapsed();
    observe(Event::Evaluated(iteration, &evaluation, took));
    history.val_loss.push(evaluation.loss);
    history.val_acc.push(evaluation.accuracy);
    experiment.map_or(Ok(()), |experiment| {
        experiment.record(&EvaluationLine {
            iteration,
            val_loss: evaluation.loss,
            val_perplexity: evaluation.perplexity(),
            val_accuracy: evaluation.accuracy,
            seconds: took.as_secs_f64(),
        })
    })
}
