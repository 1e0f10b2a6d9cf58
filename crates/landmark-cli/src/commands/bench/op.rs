//! `landmark bench op`: the fused operation as a user of candle calls it. On the CPU here, on a GPU in `gpu`.

#[cfg(feature = "cuda")]
use super::gpu;
use super::memory;
use super::peer::{self, Peer};
use super::report::{self, Machine, Row};
use anyhow::bail;
use candle_core::{Device, Tensor, Var};
use landmark_attention::{LandmarkParams, Landmarks, landmark_attention};
use landmark_inference::DeviceChoice;
use serde_json::json;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

const PEER: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/sdpa.py"));

/// Calls of one side before it is the other's turn make up about so many seconds.
const TURN: f64 = 0.25;

/// Flags of `landmark bench op`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// Where ours computes: cpu (in f32), cuda:N (in bf16), or auto: the first GPU, or else the CPU
    #[arg(long, default_value_t = DeviceChoice::Cpu)]
    device: DeviceChoice,
    /// Every so many tokens there is a landmark. Left out: 51, and 64 as well on a GPU
    #[arg(long, value_name = "N,N,..", value_delimiter = ',')]
    block: Vec<usize>,
    /// Turns of each side, of several calls where a call is short
    #[arg(long, value_name = "N", default_value = "7")]
    repeats: NonZeroUsize,
    #[command(flatten)]
    cpu: CpuFlags,
    #[command(flatten)]
    gpu: GpuFlags,
    #[command(flatten)]
    peer: peer::Flags,
    #[command(flatten)]
    report: report::Flags,
}

/// What only the CPU's measurement takes.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", next_help_heading = "On the CPU")]
struct CpuFlags {
    /// Lengths of the sequence. Left out: 512, 2048 and 8192
    #[arg(long, value_name = "T,T,..", value_delimiter = ',')]
    lengths: Vec<NonZeroUsize>,
    /// Attention heads. Left out: 8
    #[arg(long, value_name = "N")]
    heads: Option<NonZeroUsize>,
    /// Channels of a head. Left out: 64
    #[arg(long, value_name = "N")]
    head_dim: Option<NonZeroUsize>,
    /// Also measure the most memory of a forward and backward pass at length 65536 (a few minutes)
    #[arg(long)]
    memory: bool,
}

/// What only a GPU's measurement takes.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", next_help_heading = "On a GPU")]
struct GpuFlags {
    /// Sequences, heads, tokens and channels of a head; may be given several times. Left out: the five shapes of docs/cuda-kernels.md
    #[arg(long, value_name = "B,H,T,D")]
    shape: Vec<GpuShape>,
    /// A checkout of epfml/landmark-attention: its Triton kernel is measured too
    #[arg(long, value_name = "DIR")]
    authors: Option<PathBuf>,
    /// A checkout of allenai/OLMo-core with nn/attention/landmark_fast.py, such as commit a2a5b2d29: its kernels are measured too
    #[arg(long, value_name = "DIR")]
    olmo: Option<PathBuf>,
}

/// The sizes of q, k and v: `B,H,T,D`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuShape {
    /// Sequences.
    pub batch: usize,
    /// Attention heads of each.
    pub heads: usize,
    /// Tokens.
    pub length: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl FromStr for GpuShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Result<Vec<NonZeroUsize>, _> = text.split(',').map(str::parse).collect();
        match numbers.as_deref() {
            Ok([batch, heads, length, head_dim]) => {
                let [batch, heads, length, head_dim] = [batch, heads, length, head_dim].map(|n| n.get());
                Ok(Self { batch, heads, length, head_dim })
            }
            _ => Err("expected B,H,T,D: sequences, heads, tokens, channels of a head".into()),
        }
    }
}

impl CpuFlags {
    /// The first that was given.
    fn given(&self) -> Option<&'static str> {
        let given = [
            ("lengths", !self.lengths.is_empty()),
            ("heads", self.heads.is_some()),
            ("head_dim", self.head_dim.is_some()),
            ("memory", self.memory),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }
}

impl GpuFlags {
    /// The first that was given.
    fn given(&self) -> Option<&'static str> {
        let given =
            [("shape", !self.shape.is_empty()), ("authors", self.authors.is_some()), ("olmo", self.olmo.is_some())];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }
}

/// All of a call but its length.
#[derive(clap::Args, Clone, Copy)]
#[command(rename_all = "snake_case")]
pub struct Shape {
    /// Attention heads
    #[arg(long, value_name = "N")]
    pub heads: NonZeroUsize,
    /// Channels of a head
    #[arg(long, value_name = "N")]
    pub head_dim: NonZeroUsize,
    /// Every so many tokens there is a landmark
    #[arg(long, value_name = "N")]
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
    if let Some(block) = args.block.iter().find(|block| **block < 2) {
        bail!("--block {block}: expected at least 2, a token and its landmark");
    }
    match args.device.open()? {
        Device::Cpu => match args.gpu.given() {
            Some(flag) => {
                bail!("--{flag} is refused: it is for --device cuda, and --device {} is the CPU", args.device)
            }
            None => on_cpu(args),
        },
        device => match args.cpu.given() {
            Some(flag) => bail!("--{flag} is refused: it is for --device cpu; a GPU's sizes are --shape B,H,T,D"),
            None => on_gpu(args, &device),
        },
    }
}

#[cfg(feature = "cuda")]
fn on_gpu(args: &Args, device: &Device) -> anyhow::Result<()> {
    let or = |given: &[usize], usual: &[usize]| if given.is_empty() { usual.to_vec() } else { given.to_vec() };
    let GpuFlags { shape, authors, olmo } = &args.gpu;
    let find = |flag, checkout: &Option<PathBuf>, folder, file| {
        checkout.as_deref().map(|checkout| gpu::find(flag, checkout, folder, file)).transpose()
    };
    let plan = gpu::Plan {
        shapes: if shape.is_empty() { gpu::usual_shapes() } else { shape.clone() },
        blocks: or(&args.block, &[51, 64]),
        repeats: args.repeats,
        authors: find("--authors", authors, "llama/ltriton", "flash_landmark_attention.py")?,
        olmo: find("--olmo", olmo, "src/olmo_core/nn/attention", "landmark_fast.py")?,
        peer: &args.peer,
        report: &args.report,
    };
    gpu::run(device, &plan)
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(args: &Args, _: &Device) -> anyhow::Result<()> {
    bail!("--device {}: this build has no CUDA", args.device)
}

fn on_cpu(args: &Args) -> anyhow::Result<()> {
    let usual = |n: usize| NonZeroUsize::new(n).expect("it is not 0");
    let CpuFlags { lengths, heads, head_dim, memory } = &args.cpu;
    let lengths = if lengths.is_empty() { vec![usual(512), usual(2048), usual(8192)] } else { lengths.clone() };
    let (heads, head_dim) = (heads.unwrap_or(usual(8)), head_dim.unwrap_or(usual(64)));
    let blocks = if args.block.is_empty() { vec![51] } else { args.block.clone() };
    let mut peer = args.peer.start("torch", PEER, &[])?;
    let machine = Machine::measure()?;
    let mut rows = Vec::new();
    for block in blocks {
        let shape = Shape { heads, head_dim, block };
        for &length in &lengths {
            rows.extend(measure(&Sizes { length, shape }, args.repeats, &mut peer)?);
        }
        if *memory {
            rows.push(memory::row(shape)?);
        }
    }
    let note = "ratio: ours / peer, below 1 is better; the peer is scaled_dot_product_attention, dense and causal.";
    // Its time counts as ours once it has ended.
    drop(peer);
    args.report.report(&rows, &machine, note)
}

/// The times of a call on the CPU, and the peer's.
fn measure(sizes: &Sizes, repeats: NonZeroUsize, peer: &mut Peer) -> anyhow::Result<Vec<Row>> {
    let call = Call::new(sizes)?;
    let mut rows = Vec::new();
    // The backward pass makes the products of the forward pass again and then four more.
    for (metric, backward, work) in [("forward ms", false, 1.), ("forward+backward ms", true, 3.5)] {
        eprintln!("measuring {} {metric}", sizes.name());
        let Sizes { length, shape: Shape { heads, head_dim, .. } } = sizes;
        let request = |calls: usize| json!({"length": length, "heads": heads, "head_dim": head_dim, "backward": backward, "calls": calls});
        call.time(backward)?;
        let calls = ((TURN / call.time(backward)?).ceil() as usize).clamp(1, 50);
        peer.seconds(&request(2))?;
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..repeats.get() {
            for _ in 0..calls {
                ours.push(call.time(backward)?);
            }
            peers.extend(peer.seconds(&request(calls))?);
        }
        let flops = work * sizes.forward_flops();
        rows.push(Row::timed(sizes.name(), metric, [ours, peers], peer.name(), flops, |seconds| seconds * 1e3));
    }
    Ok(rows)
}
