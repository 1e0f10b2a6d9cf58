//! The curves of training runs: `metrics.jsonl`, read back and drawn.

use crate::plot::{self, Axes, Curve};
use anyhow::{Context, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// The file of an experiment that they are read from.
const METRICS: &str = "metrics.jsonl";
/// Points that a curve is drawn with at most: what one can see.
const POINTS: usize = 400;

/// What can be drawn of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// The loss of training, and that on the validation data
    Loss,
    /// The exponential of the loss
    Perplexity,
    /// The learning rate
    Lr,
    /// Tokens a second
    #[value(name = "tokens_per_second")]
    TokensPerSecond,
}

impl What {
    /// The title of a plot, and what its axis says.
    fn title(self) -> (&'static str, &'static str) {
        match self {
            Self::Loss => ("Loss", "nats a token"),
            Self::Perplexity => ("Perplexity", "perplexity"),
            Self::Lr => ("Learning rate", "learning rate"),
            Self::TokensPerSecond => ("Speed", "tokens a second"),
        }
    }
}

/// What a run has told of itself, iteration by iteration.
#[derive(Default)]
pub struct Metrics {
    loss: Vec<(f64, f64)>,
    validation: Vec<(f64, f64)>,
    lr: Vec<(f64, f64)>,
    speed: Vec<(f64, f64)>,
}

impl Metrics {
    /// Reads the metrics of the run in a folder. The last line may be half written: the run may still go on.
    pub fn read(run: &Path) -> anyhow::Result<Self> {
        if !run.is_dir() {
            bail!("{}: no such folder; expected a run's, as landmark train names it", run.display());
        }
        let path = run.join(METRICS);
        if !path.is_file() {
            bail!(
                "{}: no run, as there is no {METRICS} in it; expected a folder that landmark train wrote",
                run.display()
            );
        }
        let file = std::fs::File::open(&path).with_context(|| format!("{}: cannot open it", path.display()))?;
        let mut file = BufReader::new(file);
        let (mut metrics, mut line, mut number) = (Self::default(), Vec::new(), 0);
        loop {
            line.clear();
            number += 1;
            let read = file.read_until(b'\n', &mut line);
            if read.with_context(|| format!("{}: cannot read it", path.display()))? == 0 || !line.ends_with(b"\n") {
                break;
            }
            let value: Option<Value> = serde_json::from_slice(&line).ok();
            let Some((iteration, value)) = value.and_then(|value| Some((value.get("iteration")?.as_f64()?, value)))
            else {
                bail!("{}: line {number} is no line of metrics", path.display());
            };
            let point = |key: &str| value.get(key).and_then(Value::as_f64).map(|y| (iteration, y));
            metrics.loss.extend(point("loss"));
            metrics.validation.extend(point("val_loss"));
            metrics.lr.extend(point("lr"));
            metrics.speed.extend(point("tokens_per_second"));
        }
        if metrics.loss.is_empty() {
            bail!("{}: the run has made no step yet", run.display());
        }
        Ok(metrics)
    }

    /// The curves of one kind; `name` is the run's, if it is one of several.
    pub fn curves(&self, what: What, name: Option<&str>) -> Vec<Curve> {
        let curve = |kind: &str, points: &[(f64, f64)]| Curve {
            name: match name {
                None => kind.to_string(),
                Some(name) if kind == TRAINING => name.to_string(),
                Some(name) => format!("{name}, {kind}"),
            },
            points: thinned(points),
        };
        let exp = |mut curve: Curve| {
            curve.points.iter_mut().for_each(|(_, y)| *y = y.exp());
            curve
        };
        let losses = || {
            let curves = [(TRAINING, &self.loss), ("validation", &self.validation)];
            curves.into_iter().filter(|(_, points)| !points.is_empty()).map(|(kind, points)| curve(kind, points))
        };
        match what {
            What::Loss => losses().collect(),
            What::Perplexity => losses().map(exp).collect(),
            What::Lr => vec![curve(TRAINING, &self.lr)],
            What::TokensPerSecond => vec![curve(TRAINING, &self.speed)],
        }
    }
}

const TRAINING: &str = "training";

/// Draws curves of one kind into an SVG file.
pub fn draw(path: &Path, what: What, curves: &[Curve]) -> anyhow::Result<()> {
    let (title, y) = what.title();
    plot::write(path, &Axes { title, x: ("iteration", false), y, y_range: None }, curves)
}

/// The means of as many runs of neighbours as there may be points.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let run = points.len().div_ceil(POINTS).max(1);
    let mean = |points: &[(f64, f64)]| {
        let sum = points.iter().fold((0., 0.), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / points.len() as f64, sum.1 / points.len() as f64)
    };
    points.chunks(run).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(lines: &str) -> (tempfile::TempDir, anyhow::Result<Metrics>) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(METRICS), lines).unwrap();
        let metrics = Metrics::read(folder.path());
        (folder, metrics)
    }

    #[test]
    fn a_long_run_is_thinned_and_keeps_its_mean() {
        let lines: String = (1..=10_000).map(|i| format!("{{\"iteration\":{i},\"loss\":{}}}\n", i % 2)).collect();
        let metrics = run(&(lines + "{\"iteration\":10001,\"lo")).1.unwrap();
        let curves = metrics.curves(What::Loss, None);
        assert_eq!((curves.len(), curves[0].points.len()), (1, POINTS));
        assert!(curves[0].points.iter().all(|point| (point.1 - 0.5).abs() < 0.03));
        assert!((metrics.curves(What::Perplexity, None)[0].points[0].1 - 0.5f64.exp()).abs() < 0.1);
    }

    #[test]
    fn what_is_no_run_is_named() {
        let error = |lines: &str| run(lines).1.err().unwrap().to_string();
        assert!(error("").ends_with("the run has made no step yet"));
        assert!(error("{\"iteration\":1,\"loss\":2}\nnonsense\n").contains("line 2 is no line of metrics"));
        let folder = tempfile::tempdir().unwrap();
        let missing = |path: &Path| Metrics::read(path).err().unwrap().to_string();
        assert!(missing(folder.path()).contains("no run, as there is no metrics.jsonl"));
        assert!(missing(&folder.path().join("x")).contains("no such folder"));
    }
}
