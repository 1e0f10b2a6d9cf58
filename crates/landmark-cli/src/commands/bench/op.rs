//! `landmark bench op`: the fused operation as a user of candle calls it.

use super::report::{self, Machine, Row};
use super::{memory, peer};
use crate::device::DeviceChoice;
use candle_core::{Device, Tensor, Var};
use landmark_attention::{LandmarkParams, Landmarks, landmark_attention};
use serde_json::json;
use std::num::NonZeroUsize;
use std::time::Instant;

const PEER: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/sdpa.py"));

/// Calls of one side before it is the other's turn make up about so many seconds.
const TURN: f64 = 0.25;

/// Flags of `landmark bench op`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// Where ours computes: cpu, cuda:N or auto
    #[arg(long, default_value_t = DeviceChoice::Cpu)]
    device: DeviceChoice,
    /// Lengths of the sequence
    #[arg(long, value_name = "T,T,..", value_delimiter = ',', default_value = "512,2048,8192")]
    lengths: Vec<NonZeroUsize>,
    #[command(flatten)]
    shape: Shape,
    /// Turns of each side, of several calls where a call is short
    #[arg(long, value_name = "N", default_value = "7")]
    repeats: NonZeroUsize,
    /// Also measure the most memory of a forward and backward pass at length 65536 (a few minutes)
    #[arg(long)]
    memory: bool,
    #[command(flatten)]
    peer: peer::Flags,
    #[command(flatten)]
    report: report::Flags,
}

/// All of a call but its length.
#[derive(clap::Args, Clone, Copy)]
#[command(rename_all = "snake_case")]
pub struct Shape {
    /// Attention heads
    #[arg(long, value_name = "N", default_value = "8")]
    pub heads: NonZeroUsize,
    /// Channels of a head
    #[arg(long, value_name = "N", default_value = "64")]
    pub head_dim: NonZeroUsize,
    /// Every so many tokens there is a landmark
    #[arg(long, value_name = "N", default_value_t = 51)]
    pub block: usize,
}

/// A call.
#[derive(clap::Args, Clone, Copy)]
#[command(rename_all = "snake_case")]
pub struct Sizes {
    /// Length of the sequence
    #[arg(long)]
    pub length: NonZeroUsize,
    /// The rest
    #[command(flatten)]
    pub shape: Shape,
}

impl Sizes {
    /// What to call it.
    pub fn name(&self) -> String {
        let Self { length, shape: Shape { heads, head_dim, block } } = self;
        format!("T {length} H {heads} D {head_dim} block {block}")
    }

    fn dims(&self) -> (usize, usize, usize, usize) {
        (1, self.shape.heads.get(), self.length.get(), self.shape.head_dim.get())
    }

    /// Multiplications and additions of the forward pass: two products of T x T by D, of which the causal mask leaves
    /// half.
    fn forward_flops(&self) -> f64 {
        let (_, heads, length, head_dim) = self.dims();
        4. * (heads * head_dim) as f64 * (length * (length + 1) / 2) as f64
    }
}

/// The tensors and parameters of a call.
pub struct Call {
    tensors: [Var; 3],
    params: LandmarkParams,
}

impl Call {
    /// Random tensors.
    pub fn new(sizes: &Sizes) -> anyhow::Result<Self> {
        let tensor = || Var::randn(0f32, 1., sizes.dims(), &Device::Cpu);
        let params = LandmarkParams::new(Landmarks::Every(sizes.shape.block));
        Ok(Self { tensors: [tensor()?, tensor()?, tensor()?], params })
    }

    /// Calls, and differentiates if asked to. Returns the seconds.
    pub fn time(&self, backward: bool) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let [q, k, v] =
            self.tensors.each_ref().map(|var| if backward { var.as_tensor().clone() } else { var.detach() });
        let out = landmark_attention(&q, &k, &v, &self.params)?;
        if backward {
            out.backward()?;
        }
        drop::<Tensor>(out);
        Ok(begun.elapsed().as_secs_f64())
    }
}

/// Measures the operation.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let device = args.device.open()?;
    anyhow::ensure!(device.is_cpu(), "--device {}: only the CPU is measured yet", args.device);
    let mut peer = args.peer.start("torch", PEER, &[])?;
    let machine = Machine::measure()?;
    let mut rows = Vec::new();
    for &length in &args.lengths {
        let sizes = Sizes { length, shape: args.shape };
        let call = Call::new(&sizes)?;
        // The backward pass makes the products of the forward pass again and then four more.
        for (metric, backward, work) in [("forward ms", false, 1.), ("forward+backward ms", true, 3.5)] {
            eprintln!("measuring {} {metric}", sizes.name());
            let Shape { heads, head_dim, .. } = args.shape;
            let request = |calls: usize| json!({"length": length, "heads": heads, "head_dim": head_dim, "backward": backward, "calls": calls});
            call.time(backward)?;
            let calls = ((TURN / call.time(backward)?).ceil() as usize).clamp(1, 50);
            peer.seconds(&request(2))?;
            let (mut ours, mut peers) = (Vec::new(), Vec::new());
            for _ in 0..args.repeats.get() {
                for _ in 0..calls {
                    ours.push(call.time(backward)?);
                }
                peers.extend(peer.seconds(&request(calls))?);
            }
            let flops = work * sizes.forward_flops();
            rows.push(Row::timed(sizes.name(), metric, [ours, peers], peer.name(), flops, |seconds| seconds * 1e3));
        }
    }
    if args.memory {
        rows.push(memory::row(args.shape)?);
    }
    let note = "ratio: ours / peer, below 1 is better; the peer is scaled_dot_product_attention, dense and causal.";
    // Its time counts as ours once it has ended.
    drop(peer);
    args.report.report(&rows, &machine, note)
}
