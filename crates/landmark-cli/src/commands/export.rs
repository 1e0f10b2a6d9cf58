//! `landmark export`: a model without what training needs, to be handed on.

use crate::reader::{self, Dtype};
use anyhow::{Context, bail};
use candle_core::{DType, Device};
use landmark_models::gpt::Gpt;
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  landmark export --checkpoint exps/books/landmark/run --out models/mine
  landmark export --checkpoint exps/books/landmark/run/ckpt_2000 --out models/mine --dtype float32

Writes model.safetensors, config.json and tokenizer.json; every command that takes --checkpoint takes that folder.";

/// Flags of `landmark export`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Args {
    /// The model: a checkpoint's folder, or an experiment's, of which the newest checkpoint is taken
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// gpt2, bytes, or the path of a tokenizer.json, for a model without a tokenizer.json
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<String>,
    /// The folder to write; a model in it is replaced
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What the weights are rounded to: bfloat16 takes half of the bytes, and is what GPUs compute with
    #[arg(long, value_enum, default_value = "bfloat16")]
    dtype: Dtype,
}

/// Exports.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let folder = reader::checkpoint(&args.checkpoint)?;
    let same = |a: &PathBuf, b: &PathBuf| a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    if same(&folder, &args.out) {
        bail!("--out {}: it is the checkpoint itself, which a rounded one would replace", args.out.display());
    }
    let model = Gpt::load(&folder, &Device::Cpu).with_context(|| format!("--checkpoint {}", folder.display()))?;
    let tokenizer = reader::tokenizer(&folder, args.tokenizer.as_deref())?;
    reader::check_vocabulary(model.config().vocab_size, &tokenizer)?;
    let dtype = match args.dtype {
        Dtype::Float32 => DType::F32,
        Dtype::BFloat16 => DType::BF16,
    };
    let cannot = || format!("--out {}", args.out.display());
    model.save_as(&args.out, dtype).with_context(cannot)?;
    tokenizer.save(&args.out).with_context(cannot)?;
    let bytes: u64 = ["model.safetensors", "config.json", "tokenizer.json"]
        .iter()
        .filter_map(|name| Some(args.out.join(name).metadata().ok()?.len()))
        .sum();
    println!("{}: {:.1} MiB, {}", args.out.display(), bytes as f64 / (1 << 20) as f64, dtype.as_str());
    Ok(ExitCode::SUCCESS)
}
