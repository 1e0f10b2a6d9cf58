//! `landmark weight_diff`: a fine-tuned model as its difference from the model it was made of, and back; the authors' `llama/weight_diff.py`.

use anyhow::{Context, bail, ensure};
use candle_core::{DType, Device, Tensor};
use clap::Subcommand;
use landmark_data::Pretrained;
use landmark_models::llama::{Llama, LlamaConfig, Matrix};
use landmark_train::Tuning;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  landmark weight_diff make --path_raw ./llama-7b --path_tuned ./landmark-7b --path_diff ./landmark-7b-diff
  landmark weight_diff recover --path_raw ./llama-7b --path_diff ./landmark-7b-diff --path_tuned ./landmark-7b

The difference can be handed on where the model itself may not be. Its checksum_psum.txt is the sum of all weights of the tuned model, which
recover compares with what it made.";

/// The sum of all weights of the tuned model, as the authors' code writes it.
const CHECKSUM: &str = "checksum_psum.txt";

/// How far a sum may be from it, as in the authors' code.
const TOLERANCE: f64 = 1e-2;

/// Flags of `landmark weight_diff`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Write the difference
    #[command(name = "make", alias = "make_diff", rename_all = "snake_case")]
    Make {
        /// The model that was fine-tuned
        #[arg(long, value_name = "DIR")]
        path_raw: PathBuf,
        /// What it became
        #[arg(long, value_name = "DIR")]
        path_tuned: PathBuf,
        /// The folder to write
        #[arg(long, value_name = "DIR")]
        path_diff: PathBuf,
    },
    /// Write the tuned model
    #[command(rename_all = "snake_case")]
    Recover {
        /// The model that was fine-tuned
        #[arg(long, value_name = "DIR")]
        path_raw: PathBuf,
        /// The difference
        #[arg(long, value_name = "DIR")]
        path_diff: PathBuf,
        /// The folder to write
        #[arg(long, value_name = "DIR")]
        path_tuned: PathBuf,
    },
}

/// Makes, or recovers.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.task {
        Task::Make { path_raw, path_tuned, path_diff } => {
            apart(&path_diff, "path_diff", [&path_raw, &path_tuned])?;
            let tuned = load(&path_tuned, "path_tuned")?;
            let raw = raw_beside(&path_raw, tuned.config())?;
            let diff = combine(&tuned, &raw, |tuned, raw| tuned - raw)?;
            save(&diff, &path_tuned, &path_diff)?;
            let file = path_diff.join(CHECKSUM);
            std::fs::write(&file, format!("{}", sum(&tuned)?)).with_context(|| file.display().to_string())?;
            println!("{}: the difference, and its {CHECKSUM}", path_diff.display());
        }
        Task::Recover { path_raw, path_diff, path_tuned } => {
            apart(&path_tuned, "path_tuned", [&path_raw, &path_diff])?;
            let file = path_diff.join(CHECKSUM);
            let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let expected: f64 = text.trim().parse().with_context(|| file.display().to_string())?;
            let diff = load(&path_diff, "path_diff")?;
            let raw = raw_beside(&path_raw, diff.config())?;
            let tuned = combine(&diff, &raw, |diff, raw| diff + raw)?;
            let found = sum(&tuned)?;
            // A sum that is no number is no match either.
            ensure!(
                (found - expected).abs() <= TOLERANCE,
                "the weights sum up to {found}, expected {expected}: --path_raw or --path_diff is damaged, or of another model"
            );
            save(&tuned, &path_diff, &path_tuned)?;
            println!("{}: the tuned model; its weights sum up to {found}, as they should", path_tuned.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn apart(out: &Path, flag: &str, sources: [&Path; 2]) -> anyhow::Result<()> {
    let same = |a: &Path| a.canonicalize().is_ok_and(|a| out.canonicalize().is_ok_and(|b| a == b));
    match sources.into_iter().any(same) {
        true => bail!("--{flag} {}: it would replace what it is made of", out.display()),
        false => Ok(()),
    }
}

fn load(path: &Path, flag: &str) -> anyhow::Result<Llama> {
    Llama::load_frozen(path, DType::F32, &Device::Cpu).with_context(|| format!("--{flag} {}", path.display()))
}

/// The model that was fine-tuned, with the mean of its tokens' rows for every token that fine-tuning added.
fn raw_beside(path: &Path, tuned: &LlamaConfig) -> anyhow::Result<Llama> {
    let context = || format!("--path_raw {}", path.display());
    let raw = load(path, "path_raw")?;
    let Some(landmarks) = tuned.landmarks else { bail!("the tuned model's config.json says nothing of landmarks") };
    let known = Tuning::tokenizer(path).with_context(context)?.tokenizer.vocab_size();
    raw.with_landmarks(landmarks, known.min(landmarks.mem_id as usize)).with_context(context)
}

/// A model like `a` whose weights are `f` of those of both.
fn combine(a: &Llama, b: &Llama, f: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>) -> anyhow::Result<Llama> {
    let mut others: HashMap<_, _> = b.weights().collect();
    let mut weights = HashMap::new();
    for (name, w) in a.weights() {
        let other = others.remove(name).with_context(|| format!("--path_raw: {name} is missing"))?;
        ensure!(other.dims() == w.dims(), "--path_raw: {name} is {:?}, expected {:?}", other.dims(), w.dims());
        weights.insert(name.to_string(), Matrix::Dense(f(&w.dense()?, &other.dense()?)?));
    }
    Ok(Llama::frozen(a.config(), weights)?)
}

fn sum(model: &Llama) -> anyhow::Result<f64> {
    let mut sum = 0.;
    for (_, w) in model.weights() {
        sum += w.dense()?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>();
    }
    Ok(sum)
}

fn save(model: &Llama, tokenizer: &Path, out: &Path) -> anyhow::Result<()> {
    let cannot = || out.display().to_string();
    model.save(out, DType::F32).with_context(cannot)?;
    Pretrained::from_folder(tokenizer)?.save(out).with_context(cannot)
}
