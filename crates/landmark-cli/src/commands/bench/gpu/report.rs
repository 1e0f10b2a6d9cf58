//! The result: a table of times, a table of ratios, and rows for programs.

use super::ours::Pass;
use super::{Blocks, Peer, Shape, Who, peak};
use crate::commands::bench::report::aligned;
use serde::Serialize;

/// A backward pass makes the products of the forward pass again, and three more, for two.
const BACKWARD: f64 = 2.5;
const MIB: f64 = (1 << 20) as f64;

/// What one contestant did at a shape.
pub struct Entry {
    /// Who.
    pub who: Who,
    /// Bytes beside inputs, outputs and gradients, forward and backward.
    pub memory: [Option<u64>; 2],
    /// Why it did not go on.
    pub broken: Option<String>,
    forward: Vec<f64>,
    backward: Vec<f64>,
    graph: Vec<f64>,
}

impl Entry {
    /// Nothing yet.
    pub fn new(who: Who) -> Self {
        Self { who, memory: [None; 2], broken: None, forward: Vec::new(), backward: Vec::new(), graph: Vec::new() }
    }

    /// The turns of a pass: mean seconds of a call in each.
    pub fn times(&mut self, pass: Pass) -> &mut Vec<f64> {
        match pass {
            Pass::Forward => &mut self.forward,
            Pass::Backward => &mut self.backward,
            Pass::Graph => &mut self.graph,
        }
    }

    /// Medians of forward, backward and both, in milliseconds.
    fn milliseconds(&self) -> [Option<f64>; 3] {
        let (forward, backward) = (median(&self.forward), median(&self.backward));
        [forward, backward, forward.zip(backward).map(|(forward, backward)| forward + backward)]
    }
}

fn median(seconds: &[f64]) -> Option<f64> {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).map(|seconds| seconds * 1e3)
}

/// A row for programs.
#[derive(Serialize)]
pub struct Row {
    device: String,
    case: String,
    metric: &'static str,
    ours: f64,
    /// Ours, in TFLOP/s of dense causal attention.
    tflops: Option<f64>,
    /// Its share of the chip's peak.
    of_peak: Option<f64>,
    /// Ours among the peers: irregular blocks beside regular ones.
    peer: Option<String>,
    peer_value: Option<f64>,
    peer_tflops: Option<f64>,
    /// Ours over the peer's.
    ratio: Option<f64>,
}

/// All of a run.
pub struct Report {
    device: String,
    matmul_tflops: f64,
    /// PyTorch and its version, or why it is not there.
    torch: String,
    shapes: Vec<(Shape, Vec<Entry>)>,
}

const METRICS: [&str; 3] = ["forward ms", "backward ms", "forward+backward ms"];
/// Their work, in forward passes.
const WORK: [f64; 3] = [1., BACKWARD, 1. + BACKWARD];

impl Report {
    /// Nothing yet.
    pub fn new(device: String, matmul_tflops: f64, peer: &Peer) -> Self {
        Self { device, matmul_tflops, torch: peer.name(), shapes: Vec::new() }
    }

    /// A shape more.
    pub fn add(&mut self, shape: Shape, entries: Vec<Entry>) {
        self.shapes.push((shape, entries));
    }

    fn name(&self, who: Who) -> String {
        match who {
            Who::Ours(blocks) => format!("ours, {blocks}"),
            Who::Peer("cudnn" | "flash", name) => format!("{} {name}", self.torch),
            Who::Peer(_, name) => name.into(),
        }
    }

    /// Prints the tables, and how to read them.
    pub fn print(&self) {
        let peak = peak::dense_bf16(&self.device);
        println!("{}", aligned(&self.times(peak), 2));
        println!("{}", aligned(&self.ratios(), 2));
        for (shape, entries) in &self.shapes {
            for entry in entries {
                if let Some(why) = &entry.broken {
                    println!("{shape}: {} does not run: {why}", self.name(entry.who));
                }
            }
        }
        println!("ratio: ours / theirs, forward backward both; below 1 is better. Peers: {}.", self.torch);
        let said = match peak {
            Some(peak) => format!("its datasheet's dense bf16 peak, {peak} TFLOP/s"),
            None => "a peak that is not known for this chip, so no share is given".into(),
        };
        println!(
            "{}, bf16, causal, medians of turns in which calls follow each other, by the GPU's clock. TFLOP/s of dense causal attention (2 \
             products forward, 5 backward); of peak: of {said}; a product of 8192 x 8192 matrices reaches {:.0} here.\n\
             graph ms: ours backward by candle's graph, which also makes the gradient of the output and adds each gradient to zeros. MiB more: \
             memory beside inputs, outputs and gradients.",
            self.device, self.matmul_tflops
        );
    }

    fn times(&self, peak: Option<f64>) -> Vec<Vec<String>> {
        let header =
            "B,H,T,D,who,forward ms,TFLOP/s,of peak,backward ms,TFLOP/s,of peak,both ms,graph ms,MiB more fwd,bwd";
        let mut header: Vec<String> = header.split(',').map(String::from).collect();
        header.splice(0..4, ["B,H,T,D".into()]);
        let mut lines = vec![header];
        for (shape, entries) in &self.shapes {
            for entry in entries {
                let or_dash = |cell: Option<String>| cell.unwrap_or("-".into());
                let times = entry.milliseconds();
                let rate = |pass: usize| times[pass].map(|ms| tflops(*shape, pass, ms));
                let milliseconds = |ms: Option<f64>| or_dash(ms.map(|ms| format!("{ms:.3}")));
                let mut line = vec![shape.to_string(), self.name(entry.who)];
                for pass in [0, 1] {
                    line.push(milliseconds(times[pass]));
                    line.push(or_dash(rate(pass).map(|rate| format!("{rate:.0}"))));
                    line.push(or_dash(rate(pass).zip(peak).map(|(rate, peak)| format!("{:.0} %", 100. * rate / peak))));
                }
                line.extend([milliseconds(times[2]), milliseconds(median(&entry.graph))]);
                line.extend(entry.memory.map(|bytes| or_dash(bytes.map(|bytes| format!("{:.1}", bytes as f64 / MIB)))));
                lines.push(line);
            }
        }
        lines
    }

    /// Whom an entry is compared with: the peers, and irregular blocks with the regular ones.
    fn rivals<'a>(ours: &Entry, entries: &'a [Entry]) -> impl Iterator<Item = &'a Entry> {
        let irregular = ours.who == Who::Ours(Blocks::Irregular);
        entries.iter().filter(move |entry| match entry.who {
            Who::Peer(..) => true,
            Who::Ours(Blocks::Every(_)) => irregular,
            Who::Ours(Blocks::Irregular) => false,
        })
    }

    fn ratios(&self) -> Vec<Vec<String>> {
        let mut rivals: Vec<Who> = Vec::new();
        for (_, entries) in &self.shapes {
            for entry in entries {
                if entry.who != Who::Ours(Blocks::Irregular) && !rivals.contains(&entry.who) {
                    rivals.push(entry.who);
                }
            }
        }
        let mut lines = vec![vec!["B,H,T,D".into(), "ours".into()]];
        lines[0].extend(rivals.iter().map(|&who| self.name(who)));
        for (shape, entries) in &self.shapes {
            for ours in entries {
                let Who::Ours(blocks) = ours.who else { continue };
                let mut line = vec![shape.to_string(), blocks.to_string()];
                for &who in &rivals {
                    let rival = Self::rivals(ours, entries).find(|entry| entry.who == who);
                    let ratios = rival.map(|rival| {
                        let pairs = ours.milliseconds().into_iter().zip(rival.milliseconds());
                        let ratio = |(ours, theirs): (Option<f64>, Option<f64>)| match ours.zip(theirs) {
                            Some((ours, theirs)) => format!("{:.2}", ours / theirs),
                            None => "-".into(),
                        };
                        pairs.map(ratio).collect::<Vec<_>>().join(" ")
                    });
                    line.push(ratios.unwrap_or("-".into()));
                }
                lines.push(line);
            }
        }
        lines
    }

    /// A row for each of ours, metric and rival; without rivals one for each of ours and metric.
    pub fn rows(&self) -> Vec<Row> {
        let peak = peak::dense_bf16(&self.device);
        let mut rows = Vec::new();
        for (shape, entries) in &self.shapes {
            let Shape { batch, heads, length, head_dim } = shape;
            for ours in entries {
                let Who::Ours(blocks) = ours.who else { continue };
                let row = |metric, value, tflops: Option<f64>| Row {
                    device: self.device.clone(),
                    case: format!("B {batch} H {heads} T {length} D {head_dim} {blocks}"),
                    metric,
                    ours: value,
                    tflops,
                    of_peak: tflops.zip(peak).map(|(rate, peak)| rate / peak),
                    peer: None,
                    peer_value: None,
                    peer_tflops: None,
                    ratio: None,
                };
                for (pass, value) in ours.milliseconds().into_iter().enumerate() {
                    let Some(value) = value else { continue };
                    let row = || row(METRICS[pass], value, Some(tflops(*shape, pass, value)));
                    let before = rows.len();
                    for rival in Self::rivals(ours, entries) {
                        let theirs = rival.milliseconds()[pass];
                        rows.push(Row {
                            peer: Some(self.name(rival.who)),
                            peer_value: theirs,
                            peer_tflops: theirs.map(|theirs| tflops(*shape, pass, theirs)),
                            ratio: theirs.map(|theirs| value / theirs),
                            ..row()
                        });
                    }
                    if rows.len() == before {
                        rows.push(Row { peer: Some(self.torch.clone()), ..row() });
                    }
                }
                rows.extend(median(&ours.graph).map(|value| row("backward by candle's graph ms", value, None)));
                let names = ["forward memory over tensors MiB", "backward memory over tensors MiB"];
                for (name, bytes) in names.into_iter().zip(ours.memory) {
                    rows.extend(bytes.map(|bytes| row(name, bytes as f64 / MIB, None)));
                }
            }
        }
        rows
    }
}

fn tflops(shape: Shape, pass: usize, milliseconds: f64) -> f64 {
    WORK[pass] * shape.forward_flops() / milliseconds / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_rows_say_who_is_faster() {
        let shape = Shape { batch: 1, heads: 2, length: 1000, head_dim: 64 };
        let entry = |who, forward: &[f64], backward: &[f64]| Entry {
            forward: forward.to_vec(),
            backward: backward.to_vec(),
            ..Entry::new(who)
        };
        let regular = Who::Ours(Blocks::Every(51));
        let entries = vec![
            entry(regular, &[9e-3, 1e-3, 1e-3], &[3e-3]),
            entry(Who::Ours(Blocks::Irregular), &[2e-3], &[3e-3]),
            entry(Who::Peer("cudnn", "dense, cuDNN"), &[2e-3], &[2e-3]),
            Entry { broken: Some("no".into()), ..entry(Who::Peer("olmo", "OLMo-core"), &[4e-3], &[]) },
        ];
        let mut report = Report {
            device: "NVIDIA A100-PCIE-40GB".into(),
            matmul_tflops: 250.,
            torch: "torch 9".into(),
            shapes: vec![],
        };
        report.add(shape, entries);
        let text = aligned(&report.ratios(), 2);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("0.50 1.50 1.00") && lines[1].ends_with("0.25 - -"), "{text}");
        assert!(lines[2].contains("2.00 1.00 1.25"), "{text}");
        // 4 * 2 * 64 * 500500 operations in a millisecond.
        let times = report.times(Some(312.));
        assert_eq!(times[1][2..8], ["1.000", "0", "0 %", "3.000", "0", "0 %"]);
        let rows = report.rows();
        let row = |case: &str, metric: &str, peer: &str| {
            let fits =
                |row: &&Row| row.case.ends_with(case) && row.metric == metric && row.peer.as_deref() == Some(peer);
            rows.iter().find(fits).unwrap()
        };
        let forward = row("block 51", "forward ms", "torch 9 dense, cuDNN");
        assert_eq!((forward.ours, forward.peer_value, forward.ratio), (1., Some(2.), Some(0.5)));
        assert!((forward.tflops.unwrap() - 0.256256).abs() < 1e-9 && forward.of_peak.unwrap() < 1e-3);
        assert_eq!(row("irregular 38-64", "forward+backward ms", "ours, block 51").ratio, Some(1.25));
        assert_eq!(row("block 51", "backward ms", "OLMo-core").ratio, None);
    }
}
