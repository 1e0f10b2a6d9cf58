//! How a preparation is shown: a bar on a terminal, a line now and then elsewhere, and a summary.

use crate::reading::grouped;
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use landmark_data::prepare::{Event, Progress};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Without a terminal, a line this often.
const LINE_EVERY: Duration = Duration::from_secs(15);
/// Bad inputs that are named; the rest are only counted.
const NAMED: usize = 20;

/// Shows the events of a preparation.
pub struct Bar {
    bar: ProgressBar,
    begun: Instant,
    /// What is going on, and the bytes that were done when it began here.
    phase: Option<(&'static str, u64, Instant)>,
    line: Instant,
    skipped: usize,
}

impl Bar {
    pub fn new() -> anyhow::Result<Self> {
        let style = ProgressStyle::with_template("{prefix} {bar:30} {bytes}/{total_bytes} {msg}")?;
        // Hidden by itself where there is no terminal.
        let bar = ProgressBar::new(0).with_style(style);
        let now = Instant::now();
        Ok(Self { bar, begun: now, phase: None, line: now, skipped: 0 })
    }

    pub fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Reading { bytes_done, bytes_total } => self.set("reading", bytes_done, bytes_total, None),
            Event::Training => self.say("training the tokenizer"),
            Event::Encoding(progress) => {
                let tokens =
                    progress.train_tokens + progress.validation_tokens + progress.test_tokens.unwrap_or_default();
                self.set("encoding", progress.bytes_done, progress.bytes_total, Some(tokens));
            }
            Event::Skipped(error) => {
                self.skipped += 1;
                if self.skipped <= NAMED {
                    self.say(&format!("skipped: {error}"));
                } else if self.skipped == NAMED + 1 {
                    self.say("skipped: more, which are counted and not named");
                }
            }
        }
    }

    /// Clears the bar; how long it was there.
    pub fn finish(self) -> Duration {
        self.bar.finish_and_clear();
        self.begun.elapsed()
    }

    fn set(&mut self, phase: &'static str, done: u64, total: u64, tokens: Option<u64>) {
        let (start, since) = match self.phase {
            Some((current, start, since)) if current == phase => (start, since),
            // The first batch of a phase is not measured, which is all that is known of when it began.
            _ => (done, Instant::now()),
        };
        self.phase = Some((phase, start, since));
        let rate = done.saturating_sub(start) as f64 / since.elapsed().as_secs_f64().max(1e-9);
        let mut message = format!("{}/s", HumanBytes(rate as u64));
        if let Some(tokens) = tokens {
            let _ = write!(message, ", {} tokens", grouped(tokens as usize));
        }
        if rate > 0. {
            let left = Duration::from_secs_f64((total.saturating_sub(done) as f64 / rate).min(1e9));
            let _ = write!(message, ", ETA {}", HumanDuration(left));
        }
        if self.bar.is_hidden() && self.line.elapsed() >= LINE_EVERY {
            self.line = Instant::now();
            eprintln!("{phase} {} of {}, {message}", HumanBytes(done), HumanBytes(total));
        }
        self.bar.set_prefix(phase);
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.bar.set_message(message);
    }

    fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }
}

/// What was done, in a few lines.
pub fn summary(done: &Progress, time: Duration) -> String {
    let mut text = format!(
        "{} training tokens and {} validation tokens",
        grouped(done.train_tokens as usize),
        grouped(done.validation_tokens as usize)
    );
    if let Some(tokens) = done.test_tokens {
        let _ = write!(text, " and {} test tokens", grouped(tokens as usize));
    }
    let seconds = time.as_secs_f64();
    let _ = write!(
        text,
        " of {} documents ({} bytes of text, in {seconds:.1} s)",
        grouped(done.documents as usize),
        grouped(done.text_bytes as usize),
    );
    if done.other_records > 0 {
        let _ = write!(
            text,
            "\n{} records of other parts of the data set were left out",
            grouped(done.other_records as usize)
        );
    }
    let skipped = &done.skipped;
    if skipped.total() > 0 {
        let kinds = [
            (skipped.invalid_utf8, "not UTF-8"),
            (skipped.bad_records, "broken lines"),
            (skipped.missing_fields, "without text"),
            (skipped.archives, "damaged archives"),
            (skipped.empty_files, "empty files"),
        ];
        let kinds: Vec<_> =
            kinds.iter().filter(|(count, _)| *count > 0).map(|(count, kind)| format!("{count} {kind}")).collect();
        let _ = write!(text, "\nskipped {}: {}", grouped(skipped.total() as usize), kinds.join(", "));
    }
    text
}
