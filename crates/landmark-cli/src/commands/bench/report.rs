//! The result of a benchmark: rows, as a table for people and as lines of JSON for programs.

use anyhow::Context;
use candle_core::{Device, Tensor};
use serde::Serialize;
use std::fmt::Display;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

/// The flag for programs.
#[derive(clap::Args)]
pub struct Flags {
    /// Also write the rows here, one JSON object a line: case, metric, ours, peer, peer_value, ratio
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A row. The fields that are skipped are for the table alone.
#[derive(Serialize)]
pub struct Row {
    /// What was run.
    pub case: String,
    /// What was measured of it, and in which unit.
    pub metric: &'static str,
    /// Our value.
    pub ours: f64,
    /// Who ours is compared with, or why nobody.
    pub peer: String,
    /// The peer's value.
    pub peer_value: Option<f64>,
    /// Ours over the peer's.
    pub ratio: Option<f64>,
    /// The best of our values, of which `ours` is the median.
    #[serde(skip)]
    pub ours_best: Option<f64>,
    /// The best of the peer's.
    #[serde(skip)]
    pub peer_best: Option<f64>,
    /// Our floating-point operations in a second, in billions.
    #[serde(skip)]
    pub gflops: Option<f64>,
}

impl Row {
    /// A row of two single values.
    pub fn new(case: String, metric: &'static str, ours: f64, peer: String, peer_value: Option<f64>) -> Self {
        let ratio = peer_value.map(|value| ours / value);
        Self { case, metric, ours, peer, peer_value, ratio, ours_best: None, peer_best: None, gflops: None }
    }

    /// A row of times: medians, and the best beside them. `value` makes the metric of seconds; `flops` is the work of a call.
    pub fn timed(
        case: String,
        metric: &'static str,
        [ours, peers]: [Vec<f64>; 2],
        peer: String,
        flops: f64,
        value: impl Fn(f64) -> f64,
    ) -> Self {
        let (ours, peers) = (sorted(ours), sorted(peers));
        let median = |seconds: &[f64]| seconds.get(seconds.len() / 2).copied();
        let ours_median = median(&ours).expect("ours was timed");
        Self {
            ours_best: ours.first().map(|&seconds| value(seconds)),
            peer_best: peers.first().map(|&seconds| value(seconds)),
            gflops: Some(flops / ours_median / 1e9),
            ..Self::new(case, metric, value(ours_median), peer, median(&peers).map(&value))
        }
    }
}

fn sorted(mut seconds: Vec<f64>) -> Vec<f64> {
    seconds.sort_by(f64::total_cmp);
    seconds
}

impl Flags {
    /// Prints the rows, and writes them if that is wanted. `note` says how to read them.
    pub fn report(&self, rows: &[Row], machine: &Machine, note: &str) -> anyhow::Result<()> {
        println!("{}", table(rows, machine.peak));
        println!("{note}\nMedians, the best in brackets; {machine}");
        self.write(rows)
    }

    /// Writes the rows if that is wanted, an object a line.
    pub fn write(&self, rows: &[impl Serialize]) -> anyhow::Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let lines: Vec<String> = rows.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        crate::files::write(path, (lines.join("\n") + "\n").as_bytes())
            .with_context(|| format!("--json {}: cannot write it", path.display()))
    }
}

/// The rows under their header, in columns.
fn table(rows: &[Row], peak: f64) -> String {
    let number = |value: f64| if value < 1000. { format!("{value:.1}") } else { format!("{value:.0}") };
    let with_best = |value: f64, best: Option<f64>| match best {
        Some(best) => format!("{} ({})", number(value), number(best)),
        None => number(value),
    };
    let mut lines = vec![["case", "metric", "ours", "peer", "ratio", "GFLOP/s", "of peak"].map(String::from).to_vec()];
    for row in rows {
        let or_dash = |cell: Option<String>| cell.unwrap_or("-".into());
        let peer = match row.peer_value {
            Some(value) => format!("{} {}", row.peer, with_best(value, row.peer_best)),
            None => row.peer.clone(),
        };
        lines.push(vec![
            row.case.clone(),
            row.metric.into(),
            with_best(row.ours, row.ours_best),
            peer,
            or_dash(row.ratio.map(|ratio| format!("{ratio:.2}"))),
            or_dash(row.gflops.map(|gflops| format!("{gflops:.0}"))),
            or_dash(row.gflops.map(|gflops| format!("{:.0} %", 100. * gflops / peak))),
        ]);
    }
    aligned(&lines, 2)
}

/// Lines in columns: words to the left in the first ones, numbers to the right in the others.
pub fn aligned(lines: &[Vec<String>], words: usize) -> String {
    let widths: Vec<usize> = (0..lines[0].len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in lines {
        for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            text += &if column < words { format!("{gap}{cell:<width$}") } else { format!("{gap}{cell:>width$}") };
        }
        text.push('\n');
    }
    text
}

/// What the numbers are measured on.
pub struct Machine {
    /// The most that a product of matrices reaches, in GFLOP/s.
    peak: f64,
    /// When it was looked at first.
    begun: Option<Ticks>,
}

impl Machine {
    /// Measures the peak, as the best of some, and watches from here on what other processes do.
    pub fn measure() -> anyhow::Result<Self> {
        const SIZE: usize = 1024;
        let matrix = || Tensor::randn(0f32, 1., (SIZE, SIZE), &Device::Cpu);
        let (a, b) = (matrix()?, matrix()?);
        let mut best = f64::INFINITY;
        for _ in 0..12 {
            let begun = Instant::now();
            a.matmul(&b)?;
            best = best.min(begun.elapsed().as_secs_f64());
        }
        Ok(Self { peak: 2. * (SIZE as f64).powi(3) / best / 1e9, begun: Ticks::now() })
    }

    /// The share of the processors that others have had, where the system tells.
    fn taken(&self) -> Option<f64> {
        let (begun, now) = (self.begun.as_ref()?, Ticks::now()?);
        Some(((now.others - begun.others) / (now.all - begun.all).max(1.)).max(0.))
    }
}

impl Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (threads, peak) = (rayon::current_num_threads(), self.peak);
        write!(
            f,
            "{threads} threads on each side; peak: {peak:.0} GFLOP/s, a product of 1024 x 1024 matrices in f32."
        )?;
        let Some(taken) = self.taken() else { return Ok(()) };
        write!(f, "\nOther processes had {:.0} % of the processors meanwhile", 100. * taken)?;
        // PyTorch's threads wait for each other by spinning: it loses more to other processes than ours does.
        f.write_str(if taken > 0.05 { ": do not trust the ratios." } else { "." })
    }
}

/// Times of the processors since the system began, in its ticks.
struct Ticks {
    /// Spent on other processes than this one and its ended children.
    others: f64,
    /// Spent and idle.
    all: f64,
}

impl Ticks {
    fn now() -> Option<Self> {
        let numbers =
            |text: &str| -> Vec<f64> { text.split_whitespace().map_while(|word| word.parse().ok()).collect() };
        // User, nice, system, idle, waiting, interrupts, soft interrupts, stolen.
        let stat = fs::read_to_string("/proc/stat").ok()?;
        let times = numbers(stat.lines().next()?.strip_prefix("cpu ")?);
        let all: f64 = times.get(..8)?.iter().sum();
        let idle = times[3] + times[4];
        // After the name in brackets and the state, of which the name may have blanks, numbers 11 to 14 are user and
        // system time of the process and of its ended children.
        let own = fs::read_to_string("/proc/self/stat").ok()?;
        let own: f64 = numbers(own.rsplit_once(')')?.1.get(3..)?).get(10..14)?.iter().sum();
        Some(Self { others: all - idle - own, all })
    }
}
