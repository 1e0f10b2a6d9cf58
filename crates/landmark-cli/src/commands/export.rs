//! `landmark export`: a model without what training needs, to be handed on.

use anyhow::{Context, bail};
use candle_core::{DType, Device};
use landmark_inference::Dtype;
use landmark_models::gpt::Gpt;
use landmark_models::llama::{ADAPTER_FILES, copy_adapter};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  landmark export --checkpoint exps/books/landmark/run --out models/mine
  landmark export --checkpoint exps/books/landmark/run/ckpt_2000 --out models/mine --dtype float32

  landmark export --checkpoint ./adapter --out models/mine

Writes model.safetensors, config.json and tokenizer.json; every command that takes --checkpoint takes that folder. Of an adapter that
`landmark finetune --lora_r` left, writes the adapter, which every command takes as --adapter.";

/// Flags of `landmark export`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Args {
    /// The model: a checkpoint's folder, or an experiment's, of which the newest checkpoint is taken; or an adapter's
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
    let folder = landmark_inference::checkpoint(&args.checkpoint)?;
    let dtype = match args.dtype {
        Dtype::Float32 => DType::F32,
        Dtype::BFloat16 => DType::BF16,
    };
    let same = |a: &PathBuf, b: &PathBuf| a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    if same(&folder, &args.out) {
        bail!("--out {}: it is the checkpoint itself, which a rounded one would replace", args.out.display());
    }
    if folder.join(ADAPTER_FILES[0]).exists() {
        if args.tokenizer.is_some() {
            bail!("--tokenizer is refused: an adapter has the tokenizer of its base");
        }
        copy_adapter(&folder, &args.out, dtype).with_context(|| format!("--out {}", args.out.display()))?;
        report(&args.out, &ADAPTER_FILES, dtype);
        return Ok(ExitCode::SUCCESS);
    }
    let model = Gpt::load(&folder, &Device::Cpu).with_context(|| format!("--checkpoint {}", folder.display()))?;
    let tokenizer = landmark_inference::tokenizer(&folder, None, args.tokenizer.as_deref())?;
    landmark_inference::check_vocabulary(model.config().vocab_size, &tokenizer)?;
    let cannot = || format!("--out {}", args.out.display());
    model.save_as(&args.out, dtype).with_context(cannot)?;
    tokenizer.save(&args.out).with_context(cannot)?;
    report(&args.out, &["model.safetensors", "config.json", "tokenizer.json"], dtype);
    Ok(ExitCode::SUCCESS)
}

fn report(out: &Path, files: &[&str], dtype: DType) {
    let bytes: u64 = files.iter().filter_map(|name| Some(out.join(name).metadata().ok()?.len())).sum();
    println!("{}: {:.1} MiB, {}", out.display(), bytes as f64 / (1 << 20) as f64, dtype.as_str());
}
