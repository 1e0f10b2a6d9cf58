//! A run from its first or its next iteration to its last, or to where it is stopped.

use crate::checkpoint::Found;
use crate::data::Data;
use crate::error::{Error, Result};
use crate::experiment::{self, Experiment, History, State};
use crate::logs::{Logs, Wandb};
use crate::model::{Model, Recipe};
use crate::settings::Settings;
use crate::trainer::{Evaluation, Step, Trainer, evaluate};
use candle_core::Device;
use landmark_data::Batch;
use landmark_models::gpt::Gpt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Batches of an evaluation, as in the reference. They are the same ones each time, so that evaluations compare.
const EVALUATION_BATCHES: u64 = 24;

/// Where and how long a run goes.
pub struct Limits<'a, M = Gpt> {
    /// The folder of checkpoints, metrics and summary. Without one the run leaves nothing behind.
    pub experiment: Option<&'a Path>,
    /// Whether it goes on from a checkpoint.
    pub resume: Resume<'a>,
    /// The folder of a model with whose weights a new run begins, not with random ones.
    pub init_from: Option<&'a Path>,
    /// Somebody else's wish to stop after the current step.
    pub stop: Option<&'a AtomicBool>,
    /// Stop after so much time.
    pub time: Option<Duration>,
    /// Beside the logs that every experiment's folder has, a run of Weights & Biases.
    pub wandb: Option<&'a Wandb>,
    /// Let the model write now and then.
    pub sample: Option<Sample<'a, M>>,
}

impl<M> Default for Limits<'_, M> {
    fn default() -> Self {
        Self {
            experiment: None,
            resume: Resume::No,
            init_from: None,
            stop: None,
            time: None,
            wandb: None,
            sample: None,
        }
    }
}

/// Whether a run goes on from a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume<'a> {
    /// It begins anew, and not where there is one.
    #[default]
    No,
    /// From the newest one that is whole, if there is one.
    Newest,
    /// From this one.
    From(&'a Path),
}

/// What a model writes as it trains.
pub struct Sample<'a, M = Gpt> {
    /// After every so many iterations, and after the last one.
    pub every: usize,
    /// What the model writes after an iteration.
    pub text: &'a Writing<'a, M>,
}

/// Gives what a model writes after an iteration, or why it cannot.
pub type Writing<'a, M = Gpt> =
    dyn Fn(&M, usize) -> std::result::Result<String, Box<dyn std::error::Error + Send + Sync>> + 'a;

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
pub enum Outcome<M = Gpt> {
    /// With its last iteration.
    Finished {
        /// The trained model.
        model: M,
        /// Its evaluations on the way.
        history: History,
    },
    /// It was finished before, nothing was done.
    AlreadyFinished,
    /// Earlier than its last iteration.
    Stopped {
        /// The model as far as it is.
        model: M,
        /// The iterations that were done.
        iteration: usize,
        /// From where it can go on, if the run has a folder.
        checkpoint: Option<PathBuf>,
    },
}

/// Trains a model. `observe` is told of every step.
pub fn train<C: Recipe>(
    settings: &Settings<C>,
    data: &Data,
    device: &Device,
    limits: &Limits<C::Model>,
    observe: &mut dyn FnMut(Event),
) -> Result<Outcome<C::Model>> {
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
        None => (Trainer::new(settings, C::init(settings, limits.init_from, device)?)?, History::default()),
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
    if let (Outcome::Finished { model, history }, Some(folder)) = (&outcome, limits.experiment) {
        model.finish(folder)?;
        experiment.finish(settings, history)?;
    }
    Ok(outcome)
}

/// The exit code that W&B's library logs for Ctrl-C.
const INTERRUPTED: i32 = 255;

/// The trainer as a checkpoint left it.
fn resume<C: Recipe>(
    settings: &Settings<C>,
    device: &Device,
    found: Found<State<C>>,
    observe: &mut dyn FnMut(Event),
) -> Result<(Trainer<C::Model>, History)> {
    let Found { path, iteration, state, .. } = found;
    let trainer = Trainer::load(settings, C::load(settings, &path, device)?, &path, iteration)?;
    observe(Event::Note(format!("resuming from {}", path.display())));
    Ok((trainer, state.history))
}

/// A run that goes on.
struct Loop<'a, 'l, C: Recipe> {
    settings: &'a Settings<C>,
    data: &'a Data,
    limits: &'a Limits<'l, C::Model>,
    deadline: Option<Instant>,
    trainer: Trainer<C::Model>,
    history: History,
    experiment: Option<&'a mut Experiment>,
    observe: &'a mut dyn FnMut(Event),
}

impl<C: Recipe> Loop<'_, '_, C> {
    /// To the last iteration, or to where it is stopped. A thread makes the batches of the next step during this one.
    fn run(self) -> Result<Outcome<C::Model>> {
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

    fn steps(mut self, ahead: &Receiver<Result<Batch>>) -> Result<Outcome<C::Model>> {
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
                let checkpoint = self.limits.experiment.map(|folder| C::CHECKPOINTS.path(folder, iteration));
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
        match self.settings.logging_steps {
            Some(every) if !self.is_due(every) => Ok(()),
            _ => self.log(|logs| logs.step(iteration, &step, took)),
        }
    }

    fn evaluate(&mut self) -> Result<()> {
        let Some(batches) = &self.data.validation else { return Ok(()) };
        let (begun, iteration) = (Instant::now(), self.trainer.iteration());
        let batches = (0..EVALUATION_BATCHES).map(|index| batches.batch(self.settings.seed, index));
        let evaluation = evaluate(self.trainer.model(), self.settings, batches)?;
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
