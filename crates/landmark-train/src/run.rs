//! A run from its first or its next iteration to its last, or to where it is stopped.

use crate::checkpoint::{self, Found};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::experiment::{self, Experiment, History, State};
use crate::logs::{Logs, Wandb};
use crate::settings::Settings;
use crate::trainer::{Evaluation, Step, Trainer, evaluate};
use candle_core::{DType, Device};
use landmark_data::Batch;
use landmark_models::gpt::{Gpt, GptConfig};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
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
    /// The folder of a model with whose weights a new run begins, not with random ones.
    pub init_from: Option<&'a Path>,
    /// Somebody else's wish to stop after the current step.
    pub stop: Option<&'a AtomicBool>,
    /// Stop after so much time.
    pub time: Option<Duration>,
    /// Beside the logs that every experiment's folder has, a run of Weights & Biases.
    pub wandb: Option<&'a Wandb>,
    /// Let the model write now and then.
    pub sample: Option<Sample<'a>>,
}

/// What a model writes as it trains.
pub struct Sample<'a> {
    /// After every so many iterations, and after the last one.
    pub every: usize,
    /// What the model writes after an iteration.
    pub text: &'a Writing<'a>,
}

/// Gives what a model writes after an iteration, or why it cannot.
pub type Writing<'a> =
    dyn Fn(&Gpt, usize) -> std::result::Result<String, Box<dyn std::error::Error + Send + Sync>> + 'a;

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
    /// The model wrote something after an iteration.
    Sampled(usize, &'a str),
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
        Some(folder) => {
            let note = &mut |note| observe(Event::Note(note));
            match experiment::start(folder, settings, data, limits.resume, limits.wandb, note)? {
                None => return Ok(Outcome::AlreadyFinished),
                Some((experiment, found)) => (Some(experiment), found),
            }
        }
    };
    let (trainer, history) = match found {
        Some(found) => resume(settings, device, found, observe)?,
        None => {
            let model = match limits.init_from {
                None => Gpt::init(&settings.model, settings.seed, DType::F32, device)?,
                Some(folder) => load(&settings.model, folder, device)?,
            };
            (Trainer::new(settings, model.with_activations(settings.precision.dtype())?)?, History::default())
        }
    };
    let deadline = limits.time.and_then(|time| begun.checked_add(time));
    let outcome =
        Loop { settings, data, limits, deadline, trainer, history, experiment: experiment.as_mut(), observe }.run();
    let Some(mut experiment) = experiment else { return outcome };
    let closed = experiment.logs().close(match &outcome {
        Ok(Outcome::Stopped { .. }) => INTERRUPTED,
        Ok(_) => 0,
        Err(_) => 1,
    });
    let outcome = outcome?;
    closed?;
    if let Outcome::Finished { history, .. } = &outcome {
        experiment.finish(settings, history)?;
    }
    Ok(outcome)
}

/// The exit code that W&B's library logs for Ctrl-C.
const INTERRUPTED: i32 = 255;

/// The trainer as a checkpoint left it.
fn resume(
    settings: &Settings,
    device: &Device,
    found: Found<State>,
    observe: &mut dyn FnMut(Event),
) -> Result<(Trainer, History)> {
    let Found { path, iteration, state, .. } = found;
    let trainer = Trainer::load(
        settings,
        Gpt::load(&path, device)?.with_activations(settings.precision.dtype())?,
        &path,
        iteration,
    )?;
    observe(Event::Note(format!("resuming from {}", path.display())));
    Ok((trainer, state.history))
}

/// A run that goes on.
struct Loop<'a, 'l> {
    settings: &'a Settings,
    data: &'a Data,
    limits: &'a Limits<'l>,
    deadline: Option<Instant>,
    trainer: Trainer,
    history: History,
    experiment: Option<&'a mut Experiment>,
    observe: &'a mut dyn FnMut(Event),
}

impl Loop<'_, '_> {
    /// To the last iteration, or to where it is stopped. A thread makes the batches of the next step during this one.
    fn run(self) -> Result<Outcome> {
        let Settings { seed, acc_steps, iterations, .. } = *self.settings;
        let [first, end] = [self.trainer.iteration(), iterations].map(|step| step as u64 * acc_steps as u64);
        let data = self.data;
        std::thread::scope(|scope| {
            let (made, ahead) = mpsc::sync_channel(acc_steps);
            // Nobody receives any more: the run was stopped.
            scope.spawn(move || (first..end).try_for_each(|index| made.send(data.batch(seed, index))).is_ok());
            self.steps(&ahead)
        })
    }

    fn steps(mut self, ahead: &Receiver<Result<Batch>>) -> Result<Outcome> {
        (self.observe)(Event::Begin(self.trainer.iteration(), self.settings.iterations));
        while self.trainer.iteration() < self.settings.iterations {
            self.step(ahead)?;
            let iteration = self.trainer.iteration();
            if self.is_due(self.settings.eval_freq) {
                self.evaluate()?;
            }
            if let Some(sample) = self.limits.sample.as_ref().filter(|sample| self.is_due(sample.every)) {
                let text = (sample.text)(self.trainer.model(), iteration).map_err(Error::Sample)?;
                (self.observe)(Event::Sampled(iteration, &text));
                self.log(|logs| logs.sample(iteration, &text))?;
            }
            let stopped = self.limits.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
                || self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let is_last = iteration == self.settings.iterations;
            if stopped || is_last || self.settings.save_checkpoint_freq.is_some_and(|every| self.is_due(every)) {
                self.save()?;
            }
            if stopped && !is_last {
                let checkpoint = self.limits.experiment.map(|folder| checkpoint::path(folder, iteration));
                return Ok(Outcome::Stopped { model: self.trainer.into_model(), iteration, checkpoint });
            }
        }
        Ok(Outcome::Finished { model: self.trainer.into_model(), history: self.history })
    }

    /// Whether this is an iteration for what happens every so many, and after the last one.
    fn is_due(&self, every: usize) -> bool {
        let iteration = self.trainer.iteration();
        iteration.is_multiple_of(every) || iteration == self.settings.iterations
    }

    fn log(&mut self, log: impl FnOnce(&mut Logs) -> Result<()>) -> Result<()> {
        self.experiment.as_mut().map_or(Ok(()), |experiment| log(experiment.logs()))
    }

    fn step(&mut self, ahead: &Receiver<Result<Batch>>) -> Result<()> {
        let begun = Instant::now();
        let batches = ahead.iter().take(self.settings.acc_steps).collect::<Result<Vec<_>>>()?;
        let step = self.trainer.step(batches)?;
        let (iteration, took) = (self.trainer.iteration(), begun.elapsed());
        (self.observe)(Event::Step(iteration, &step, took));
        if self.is_due(self.settings.eval_freq) {
            self.history.iterations.push(iteration);
            self.history.train_loss.push(step.loss);
        }
        self.log(|logs| logs.step(iteration, &step, took))
    }

    fn evaluate(&mut self) -> Result<()> {
        let Some(batches) = &self.data.validation else { return Ok(()) };
        let (begun, iteration) = (Instant::now(), self.trainer.iteration());
        let batches = (0..EVALUATION_BATCHES).map(|index| batches.batch(self.settings.seed, index));
        let evaluation = evaluate(self.trainer.model(), self.settings.optimization_process, batches)?;
        if !evaluation.loss.is_finite() {
            return Err(Error::Diverged { iteration, loss: evaluation.loss });
        }
        let took = begun.elapsed();
        (self.observe)(Event::Evaluated(iteration, &evaluation, took));
        self.history.val_loss.push(evaluation.loss);
        self.history.val_acc.push(evaluation.accuracy);
        self.log(|logs| logs.evaluation(iteration, &evaluation, took))
    }

    fn save(&mut self) -> Result<()> {
        let begun = Instant::now();
        let Some(experiment) = self.experiment.as_mut() else { return Ok(()) };
        if let Some(path) = experiment.save(self.settings, self.data, &self.trainer, &self.history)? {
            (self.observe)(Event::Saved(&path, begun.elapsed()));
        }
        Ok(())
    }
}
