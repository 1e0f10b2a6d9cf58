//! `landmark merge`: a model and its adapter become one model.

use anyhow::{Context, bail};
use candle_core::{DType, Device};
use landmark_inference::Dtype;
use landmark_models::hub;
use landmark_models::llama::{Gguf, Llama};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  landmark merge --model_name_or_path ./llama-7b --adapter ./adapter --out ./landmark-7b
  landmark merge --model_name_or_path smollm2.gguf --adapter ./adapter --out ./smollm2-landmark

Writes a Hugging Face folder. Quantized weights are written as what they stand for.";

/// Flags of `landmark merge`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Args {
    /// The model that the adapter was trained beside: a Hugging Face folder, a repository in the hub's cache, or a GGUF file
    #[arg(long, value_name = "NAME")]
    model_name_or_path: String,
    /// The cache of models, instead of the usual one
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// The folder of the adapter, as `landmark finetune --lora_r` wrote it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The folder to write; a model in it is replaced
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What the weights are rounded to
    #[arg(long, value_enum, default_value = "bfloat16")]
    dtype: Dtype,
}

/// Merges.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { model_name_or_path, cache_dir, adapter, out, dtype } = args;
    let base = hub::locate(&model_name_or_path, cache_dir.as_deref()).context("--model_name_or_path")?;
    let same = |a: &Path| a.canonicalize().is_ok_and(|a| out.canonicalize().is_ok_and(|b| a == b));
    if same(&base) || same(&adapter) {
        bail!("--out {}: it would replace what it is made of", out.display());
    }
    let tokenizer = landmark_inference::pretrained(&base, Some(&adapter), None)?;
    let model = match base.is_file() {
        true => Gguf::open(&base)?.load(&Device::Cpu)?,
        false => Llama::load_frozen(&base, DType::F32, &Device::Cpu)?,
    };
    let merged = landmark_inference::adapted(model, &adapter)?.freeze()?;
    let dtype = match dtype {
        Dtype::Float32 => DType::F32,
        Dtype::BFloat16 => DType::BF16,
    };
    let cannot = || format!("--out {}", out.display());
    merged.save(&out, dtype).with_context(cannot)?;
    tokenizer.save(&out).with_context(cannot)?;
    println!("{}: {} and its adapter in one, {}", out.display(), base.display(), dtype.as_str());
    Ok(ExitCode::SUCCESS)
}
