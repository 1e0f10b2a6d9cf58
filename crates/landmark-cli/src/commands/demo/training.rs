//! The demonstration's training: sizes that two cores need less than two minutes for.

use crate::interrupt;
use crate::reading::{grouped, rate};
use candle_core::{DType, Device};
use indicatif::{ProgressBar, ProgressStyle};
use landmark_data::Tokenizer;
use landmark_models::gpt::{Gpt, GptConfig};
use landmark_train::{Corpus, Data, Event, Limits, Outcome, Settings, Trainer};
use std::io::Write;
use std::time::{Duration, Instant};

/// Steps of the training: about 100 seconds on two cores of 2023.
pub const ITERATIONS: usize = 1200;
/// Lines that show the falling loss.
const LINES: usize = 10;
/// Steps that tell how fast the machine is, after a first one that does not count.
const TRIAL: usize = 4;

/// All that decides the training.
pub fn settings(iterations: usize, seed: u64) -> Settings {
    let tokenizer = Tokenizer::bytes();
    let model = GptConfig {
        vocab_size: tokenizer.vocab_size(),
        landmark_id: tokenizer.landmark_id().expect("the byte tokenizer has a landmark"),
        n_embd: 128,
        n_head: 4,
        n_layer: 3,
        sequence_length: 256,
        mem_freq: Some(31),
        ..GptConfig::default()
    };
    Settings {
        batch_size: 8,
        acc_steps: 1,
        iterations,
        seed,
        lr: 8e-3,
        warmup_percent: 0.1,
        grad_clip: Some(1.),
        // At the end.
        eval_freq: iterations.max(1),
        ..Settings::of(model)
    }
}

/// Trains, or gives nothing if that was interrupted. On a machine that needs longer than `limit` it makes fewer steps.
pub fn train(
    settings: &Settings,
    learned: &str,
    unseen: &str,
    limit: Duration,
    out: &mut impl Write,
) -> anyhow::Result<Option<Gpt>> {
    let tokenizer = Tokenizer::bytes();
    let corpus = Corpus {
        train: tokenizer.encode(learned)?.into(),
        validation: tokenizer.encode(unseen)?.into(),
        tokenizer: Some(tokenizer),
    };
    settings.check()?;
    let data = corpus.batches(settings)?;
    let mut settings = settings.clone();
    let needed = step_time(&settings, &data)?.as_secs_f64() * settings.iterations as f64;
    if needed > limit.as_secs_f64() {
        let wanted = settings.iterations;
        settings.iterations = ((wanted as f64 * limit.as_secs_f64() / needed) as usize).max(1);
        settings.eval_freq = settings.iterations;
        writeln!(
            out,
            "   {wanted} steps would take this machine {needed:.0} s now: --time_limit makes them {}",
            settings.iterations
        )?;
    }
    let mut shown = Shown::new(settings.iterations, out);
    let begun = Instant::now();
    let mut failed = None;
    // The trial may have met the machine at a better time.
    let limits = Limits { stop: Some(&interrupt::STOP), time: Some(limit.mul_f64(1.3)), ..Limits::default() };
    let outcome = landmark_train::train(&settings, &data, &Device::Cpu, &limits, &mut |event| {
        if let Err(error) = shown.show(event, begun) {
            failed.get_or_insert(error);
            interrupt::STOP.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    });
    shown.bar.finish_and_clear();
    if let Some(error) = failed {
        return Err(error.into());
    }
    match outcome? {
        _ if interrupt::requested() => Ok(None),
        Outcome::Finished { model, .. } => Ok(Some(model)),
        Outcome::Stopped { model, iteration, .. } => {
            writeln!(out, "   --time_limit ended the training after {iteration} steps of {}.", settings.iterations)?;
            Ok(Some(model))
        }
        Outcome::AlreadyFinished => anyhow::bail!("the training had no steps"),
    }
}

/// How long a step takes on this machine.
fn step_time(settings: &Settings, data: &Data) -> anyhow::Result<Duration> {
    let model = Gpt::init(&settings.model, settings.seed, DType::F32, &Device::Cpu)?;
    let mut trainer = Trainer::new(settings, model)?;
    let mut begun = Instant::now();
    for step in 0..=TRIAL as u64 {
        trainer.step([data.train.batch(settings.seed, step)])?;
        if step == 0 {
            begun = Instant::now();
        }
    }
    Ok(begun.elapsed() / TRIAL as u32)
}

/// A bar on a terminal, and a line every tenth of the way.
struct Shown<'w, W> {
    out: &'w mut W,
    bar: ProgressBar,
    iterations: usize,
    /// Losses and tokens since the last line.
    losses: Vec<f64>,
    tokens: usize,
}

impl<'w, W: Write> Shown<'w, W> {
    fn new(iterations: usize, out: &'w mut W) -> Self {
        let style = ProgressStyle::with_template("   {bar:30} step {pos}/{len}  {msg}  ETA {eta}");
        let bar = ProgressBar::new(iterations as u64).with_style(style.expect("a template without mistakes"));
        Self { out, bar, iterations, losses: Vec::new(), tokens: 0 }
    }

    fn show(&mut self, event: Event, begun: Instant) -> std::io::Result<()> {
        match event {
            Event::Begin(..) => {
                self.bar.suspend(|| writeln!(self.out, "       step        loss  perplexity      tok/s"))
            }
            Event::Step(iteration, step, _) => {
                self.losses.push(step.loss);
                self.tokens += step.tokens;
                self.bar.set_position(iteration as u64);
                self.bar.set_message(format!("loss {:.3}", step.loss));
                let every = self.iterations.div_ceil(LINES);
                if !iteration.is_multiple_of(every) && iteration != self.iterations {
                    return Ok(());
                }
                // The mean since the last line: a batch is small, and its loss jumps.
                let loss = self.losses.iter().sum::<f64>() / self.losses.len() as f64;
                self.losses.clear();
                let rate = grouped(rate(self.tokens, begun.elapsed()));
                let steps = format!("{iteration}/{}", self.iterations);
                self.bar.suspend(|| {
                    writeln!(self.out, "{steps:>11}  {loss:>10.3}  {:>10.2}  {rate:>9}", loss.exp())?;
                    self.out.flush()
                })
            }
            Event::Evaluated(_, evaluation, _) => {
                let (loss, perplexity) = (evaluation.loss, evaluation.perplexity());
                let line =
                    format!("     unseen  {loss:>10.3}  {perplexity:>10.2}   in windows like those of the training");
                self.bar.suspend(|| writeln!(self.out, "{line}"))
            }
            Event::Note(_) | Event::Sampled(..) | Event::Saved(..) => Ok(()),
        }
    }
}
