//! `landmark bench op --device cuda`: the operation in bf16 on a GPU, next to PyTorch's dense attention and to other landmark kernels.

mod ours;
mod peak;
mod report;

use super::op::GpuShape as Shape;
use super::peer::{self, Peer};
use candle_core::Device;
use ours::{Call, Gpu, Pass};
use report::{Entry, Report};
use serde_json::json;
use std::fmt::Display;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

const PEERS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/op_cuda.py"));

/// Calls of one side before it is the other's turn make up about so many seconds.
const TURN: f64 = 0.04;
/// Short calls are repeated no more often than this in a turn: they queue up on the GPU.
const MOST_CALLS: usize = 200;

/// What is measured.
pub struct Plan<'a> {
    /// `[batch, heads, length, head_dim]` of q, k and v.
    pub shapes: Vec<Shape>,
    /// Lengths of the regular blocks.
    pub blocks: Vec<usize>,
    /// Turns of each side.
    pub repeats: NonZeroUsize,
    /// The folder of the authors' kernel.
    pub authors: Option<PathBuf>,
    /// The folder of OLMo-core's kernels.
    pub olmo: Option<PathBuf>,
    /// The Python of the peers.
    pub peer: &'a peer::Flags,
    /// Where the rows go.
    pub report: &'a super::report::Flags,
}

/// Where the landmarks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// Regular blocks of this length.
    Every(usize),
    /// Blocks of random lengths, others in each sequence.
    Irregular,
}

/// The lengths of irregular blocks, 51 on average.
const IRREGULAR: std::ops::RangeInclusive<usize> = 38..=64;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Ours.
    Ours(Blocks),
    /// A peer, by the script's name for it and ours.
    Peer(&'static str, &'static str),
}

impl Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { batch, heads, length, head_dim } = self;
        write!(f, "{batch},{heads},{length},{head_dim}")
    }
}

impl Shape {
    /// Multiplications and additions of a forward pass: two products of T x T by D, of which the causal mask leaves half.
    fn forward_flops(&self) -> f64 {
        let pairs = self.length * (self.length + 1) / 2;
        4. * (self.batch * self.heads * self.head_dim) as f64 * pairs as f64
    }
}

impl Display for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Every(block) => write!(f, "block {block}"),
            Self::Irregular => write!(f, "irregular {}-{}", IRREGULAR.start(), IRREGULAR.end()),
        }
    }
}

/// The shapes of the tables in docs/cuda-kernels.md.
pub fn usual_shapes() -> Vec<Shape> {
    let shapes = [(16, 8, 512, 128), (4, 32, 2048, 128), (1, 32, 8192, 128), (1, 32, 16384, 128), (4, 32, 2048, 64)];
    shapes.map(|(batch, heads, length, head_dim)| Shape { batch, heads, length, head_dim }).to_vec()
}

/// The folder in a checkout that holds a file; the folder itself may be named as well.
pub fn find(flag: &str, checkout: &Path, folder: &str, file: &str) -> anyhow::Result<PathBuf> {
    let found = [checkout.join(folder), checkout.to_path_buf()].into_iter().find(|folder| folder.join(file).is_file());
    found.ok_or_else(|| anyhow::anyhow!("{flag} {}: no {folder}/{file} in it", checkout.display()))
}

/// Measures.
pub fn run(device: &Device, plan: &Plan<'_>) -> anyhow::Result<()> {
    let gpu = Gpu::new(device)?;
    let settings = json!({"gpu": gpu.number(), "authors": plan.authors, "olmo": plan.olmo});
    let mut peer = plan.peer.start("torch", PEERS, &[settings.to_string()])?;
    let mut report = Report::new(gpu.name()?, gpu.matmul_tflops()?, &peer);
    for &shape in &plan.shapes {
        report.add(shape, measure(&gpu, shape, plan, &mut peer)?);
    }
    report.print();
    plan.report.write(&report.rows())
}

/// All of a shape.
fn measure(gpu: &Gpu, shape: Shape, plan: &Plan<'_>, peer: &mut Peer) -> anyhow::Result<Vec<Entry>> {
    let ours = plan.blocks.iter().map(|&block| Blocks::Every(block)).chain([Blocks::Irregular]);
    let mut calls = Vec::new();
    let mut entries = Vec::new();
    for blocks in ours {
        eprintln!("measuring {shape} {blocks}");
        let call = Call::new(gpu, shape, blocks)?;
        let mut entry = Entry::new(Who::Ours(blocks));
        entry.memory = call.memory(gpu)?;
        entries.push(entry);
        calls.push(call);
    }
    if matches!(peer, Peer::Running(_)) {
        entries.extend([Who::Peer("cudnn", "dense, cuDNN"), Who::Peer("flash", "dense, flash")].map(Entry::new));
        let other = |given: &Option<PathBuf>, who| given.is_some().then(|| Entry::new(who));
        entries.extend(other(&plan.olmo, Who::Peer("olmo", "OLMo-core, block 64")));
        entries.extend(other(&plan.authors, Who::Peer("authors", "authors' Triton, block 64")));
    }
    for pass in [Pass::Forward, Pass::Backward, Pass::Graph] {
        eprintln!("measuring {shape} {}", pass.name());
        // Mean seconds of a call in a turn of so many.
        let mut turn = |at: usize, who: Who, count: usize| match who {
            Who::Ours(_) => calls[at].seconds(gpu, pass, count).map(Ok),
            Who::Peer(name, _) => {
                let Shape { batch, heads, length, head_dim } = shape;
                let backward = pass == Pass::Backward;
                let request = json!({"who": name, "shape": [batch, heads, length, head_dim], "backward": backward, "calls": count});
                peer.ask(&request).map(|answer| answer.map(|seconds| seconds.into_iter().sum()))
            }
        };
        let mut calls_in_turn = vec![0; entries.len()];
        for (at, entry) in entries.iter_mut().enumerate() {
            if pass == Pass::Graph && matches!(entry.who, Who::Peer(..)) {
                continue;
            }
            match turn(at, entry.who, 1)? {
                Ok(seconds) => calls_in_turn[at] = ((TURN / seconds).ceil() as usize).clamp(1, MOST_CALLS),
                Err(why) => entry.broken = Some(why),
            }
        }
        for _ in 0..plan.repeats.get() {
            for (at, entry) in entries.iter_mut().enumerate() {
                if calls_in_turn[at] == 0 {
                    continue;
                }
                match turn(at, entry.who, calls_in_turn[at])? {
                    Ok(seconds) => entry.times(pass).push(seconds),
                    Err(why) => entry.broken = Some(why),
                }
            }
        }
    }
    Ok(entries)
}
