//! Shows a run: a bar on a terminal, otherwise plain lines.

use indicatif::{ProgressBar, ProgressStyle};
use landmark_train::{Evaluation, Event, Step};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Plain lines come no faster than this.
const PAUSE: Duration = Duration::from_secs(5);
/// How much the newest step counts in the averages that are shown.
const NEWEST: f64 = 0.1;

/// What is shown of a run.
pub struct Progress {
    /// On a terminal.
    bar: Option<ProgressBar>,
    iterations: usize,
    /// Seconds of a step, averaged.
    seconds: Option<f64>,
    /// The time of the last plain line.
    shown: Option<Instant>,
}

impl Progress {
    /// Shows nothing yet.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
            ProgressBar::new(0).with_style(style.expect("a template without mistakes"))
        });
        Self { bar, iterations: 0, seconds: None, shown: None }
    }

    /// Shows an event.
    pub fn show(&mut self, event: Event) {
        match event {
            Event::Note(text) => self.line(text),
            Event::Begin(done, iterations) => {
                self.iterations = iterations;
                if let Some(bar) = &self.bar {
                    bar.set_length(iterations as u64);
                    bar.set_position(done as u64);
                }
            }
            Event::Step(iteration, step, took) => self.step(iteration, step, took),
            Event::Evaluated(iteration, evaluation, took) => self.line(evaluated(iteration, evaluation, took)),
            Event::Sampled(iteration, text) => self.line(format!("{iteration} [sample] {text}")),
            Event::Saved(path, took) => self.line(format!("saved {} [{:.1} s]", path.display(), took.as_secs_f64())),
        }
    }

    /// Leaves the terminal as it should be.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    fn step(&mut self, iteration: usize, step: &Step, took: Duration) {
        let took = took.as_secs_f64().max(1e-9);
        let seconds = self.seconds.map_or(took, |seconds| seconds + (took - seconds) * NEWEST);
        self.seconds = Some(seconds);
        let left = seconds * self.iterations.saturating_sub(iteration) as f64;
        let text = format!(
            "loss={:.3} pp={:.2} lr={:.2e} {:.0} tok/s ETA {}",
            step.loss,
            step.loss.exp(),
            step.lr,
            step.tokens as f64 / seconds,
            clock(left)
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(iteration as u64);
                bar.set_message(text);
            }
            None if iteration < self.iterations && self.shown.is_some_and(|shown| shown.elapsed() < PAUSE) => {}
            None => {
                self.shown = Some(Instant::now());
                self.line(format!("{iteration}/{} {text}", self.iterations));
            }
        }
    }

    fn line(&self, text: String) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

fn evaluated(iteration: usize, evaluation: &Evaluation, took: Duration) -> String {
    let Evaluation { loss, accuracy } = evaluation;
    let perplexity = evaluation.perplexity();
    format!("{iteration} [val] loss={loss:.3} pp={perplexity:.2} acc={accuracy:.3} [{:.1} s]", took.as_secs_f64())
}

/// Seconds as 1:02:03, or 2d 3h.
fn clock(seconds: f64) -> String {
    // Saturates: a run of no known end shows a very long one.
    let seconds = seconds as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match days {
        0 => format!("{hours}:{:02}:{:02}", minutes % 60, seconds % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        let shown = [0., 59.9, 3723., 86400. * 2. + 3. * 3600., f64::INFINITY].map(clock);
        assert_eq!(shown[..4], ["0:00:00", "0:00:59", "1:02:03", "2d 3h"]);
    }
}
