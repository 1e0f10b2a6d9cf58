//! `landmark bench train`: the steps of `landmark train`.

use super::peer;
use super::report::{self, Machine, Row};
use candle_core::{DType, Device};
use landmark_data::{Batch, Batches, IGNORE, Landmarks, Stream};
use landmark_models::gpt::{Gpt, GptConfig};
use landmark_train::{Settings, Trainer};
use serde_json::json;
use std::num::NonZeroUsize;
use std::time::Instant;

const PEER: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/gpt_torch.py"));

const LENGTH: usize = 512;
const MEM_FREQ: u32 = 50;
const LANDMARK: u32 = 8191;
/// Steps of one side before it is the other's turn. The first does not count: the other side had the caches until then, and
/// memory that was given back, so it is slower than one of a run in motion.
const TURN: usize = 4;

/// Flags of `landmark bench train`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// Windows in a batch
    #[arg(long, value_name = "N", default_value = "8")]
    batch_size: NonZeroUsize,
    /// Turns of each side, of four steps each, of which the last three count
    #[arg(long, value_name = "N", default_value = "7")]
    repeats: NonZeroUsize,
    #[command(flatten)]
    peer: peer::Flags,
    #[command(flatten)]
    report: report::Flags,
}

/// Measures training.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let settings = settings(args);
    let batches = batches(&settings)?;
    let model = Gpt::init(&settings.model, settings.seed, DType::F32, &Device::Cpu)?;
    let mut trainer = Trainer::new(&settings, model)?;
    let mut peer = args.peer.start("torch", PEER, &[peer_sizes(&settings.model)])?;
    let machine = Machine::measure()?;
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for turn in 0..=args.repeats.get() {
        eprintln!("measuring turn {turn} of {}{}", args.repeats, if turn == 0 { " (warm-up)" } else { "" });
        let batch = batches.batch(settings.seed, turn as u64);
        let mut seconds = Vec::new();
        for _ in 0..TURN {
            let begun = Instant::now();
            trainer.step([batch.clone()])?;
            seconds.push(begun.elapsed().as_secs_f64());
        }
        let peer_seconds = peer.seconds(&request(&batch))?;
        if turn > 0 {
            ours.extend(seconds.into_iter().skip(1));
            peers.extend(peer_seconds.into_iter().skip(1));
        }
    }
    let GptConfig { n_layer, n_embd, n_head, vocab_size, .. } = settings.model;
    let case = format!("{n_layer}x{n_embd} H {n_head} T {LENGTH} V {vocab_size} batch {}", args.batch_size);
    let tokens = (args.batch_size.get() * LENGTH) as f64;
    let flops = tokens * flops_per_token(&settings.model);
    let row = Row::timed(case, "train tok/s", [ours, peers], peer.name(), flops, |seconds| tokens / seconds);
    let note = "ratio: ours / peer, above 1 is better; the peer is a GPT of the same size with dense attention. A step is forward, \
                backward and AdamW, landmarks count as tokens.";
    // Its time counts as ours once it has ended.
    drop(peer);
    args.report.report(&[row], &machine, note)
}

fn settings(args: &Args) -> Settings {
    let model = GptConfig {
        vocab_size: LANDMARK as usize + 1,
        landmark_id: LANDMARK,
        n_embd: 256,
        n_head: 4,
        n_layer: 4,
        sequence_length: LENGTH,
        mem_freq: Some(MEM_FREQ as usize),
        ..GptConfig::default()
    };
    Settings { batch_size: args.batch_size.get(), acc_steps: 1, ..Settings::of(model) }
}

/// Batches of random tokens with landmarks.
fn batches(settings: &Settings) -> anyhow::Result<Batches> {
    let hash = |i: u32| i.wrapping_mul(0x9e37_79b9).rotate_left(13).wrapping_mul(0x85eb_ca6b) >> 16;
    let tokens: Vec<u32> = (0..1 << 16).map(|i| hash(i) % LANDMARK).collect();
    let stream = Stream::new(tokens, Landmarks::Insert { id: LANDMARK, mem_freq: MEM_FREQ })?;
    Ok(Batches::new(stream, settings.batch_size, LENGTH, None)?)
}

fn peer_sizes(model: &GptConfig) -> String {
    let GptConfig { vocab_size, n_embd, n_head, n_layer, sequence_length, .. } = model;
    json!({"vocabulary": vocab_size, "width": n_embd, "heads": n_head, "layers": n_layer, "length": sequence_length})
        .to_string()
}

/// A turn on this batch.
fn request(batch: &Batch) -> serde_json::Value {
    let inputs: Vec<_> = batch.inputs.chunks(batch.sequence_length).collect();
    let targets: Vec<i64> = batch.targets.iter().map(|&id| if id == IGNORE { -1 } else { id.into() }).collect();
    let targets: Vec<_> = targets.chunks(batch.sequence_length).collect();
    json!({"inputs": inputs, "targets": targets, "calls": TURN})
}

/// Six for each weight that is multiplied with (once forward, twice backward), and the attention's: two products over half of
/// the window forward, five backward.
fn flops_per_token(model: &GptConfig) -> f64 {
    let (width, layers) = (model.n_embd as f64, model.n_layer as f64);
    let weights = layers * 12. * width * width + model.vocab_size as f64 * width;
    let attention = layers * 7. * width * LENGTH as f64;
    6. * weights + attention
}
