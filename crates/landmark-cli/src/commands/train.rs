//! `landmark train`: the reference's command line, and what it comes to.

mod flags;
mod name;
pub mod progress;
mod refused;
mod sample;

use crate::curves::{self, Metrics, What};
use anyhow::{Context, bail};
use candle_core::Device;
use clap::Parser;
use flags::{Dtype, Flags, Model, Opt, OptimizationProcess, Scheduler, text};
use landmark_data::{TOKENIZER_FILE, Tokenizer};
use landmark_models::gpt::{Gpt, GptConfig, MlpKind, Norm, Placement, PositionalEncoder, SoftmaxFunc, Variant};
use landmark_train::{
    Anneal, Corpus, Data, Limits, Method, Outcome, Precision, Process, Resume, Sample, Settings, Vocabulary, Wandb,
};
use progress::Progress;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const EXAMPLE: &str = "\
Example, once `landmark prepare` has made ./data/pg19:
  landmark train --config_format rotary --model landmark --n_embd 1024 --n_head 8 --n_layer 12 \\
    --batch_size 16 --sequence_length 512 --acc_steps 8 --dataset pg19 --iterations 240000 \\
    --dropout 0.0 --positional_encoder rotary --softmax_func mem_opt --mem_freq 50 --wandb \\
    --wandb_project memory-llm --save_checkpoint_freq 20000

An experiment is a folder: checkpoints ckpt_N, metrics.jsonl with a line for each step, TensorBoard's
event files (tensorboard --logdir exps), and once it is finished summary.json, loss.svg and lr.svg. Ctrl-C or --time_limit stops after the current step with a
checkpoint; the same command with --resume goes on from it, to the same weights, bit for bit.

Exit codes: 0 finished or time limit reached, 1 error, 2 wrong command line, 130 Ctrl-C.";

/// Flags of `landmark train`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// The flags alone, to ask for the defaults.
#[derive(Parser)]
struct FlagsOnly {
    #[command(flatten)]
    flags: Flags,
}

/// Everything that a run needs, resolved from the flags.
struct Plan {
    settings: Settings,
    data: Data,
    device: Device,
    experiment: PathBuf,
}

/// Set by Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

/// Trains.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { flags } = args;
    refused::check(&flags)?;
    let time = time_limit(&flags)?;
    let device = flags.device.open()?;
    let experiment = experiment_folder(&flags)?;
    if landmark_train::is_finished(&experiment) {
        println!("Already found experiment {}: it is finished.", experiment.display());
        return Ok(ExitCode::SUCCESS);
    }
    let plan = plan(&flags, device, experiment)?;
    let init_from = flags.init_from.as_deref().map(|folder| init_from(folder, &plan)).transpose()?;
    stop_on_signal()?;
    for note in notes(&flags, &plan) {
        eprintln!("{note}");
    }
    let Plan { settings, data, device, experiment } = plan;
    let wandb = wandb(&flags, &experiment)?;
    let writer = flags.sample_freq.map(|_| sample::Writer::new(&flags, &data, &settings.model)).transpose()?;
    let text = |model: &Gpt, iteration| match &writer {
        Some(writer) => writer.write(model, iteration).map_err(Into::into),
        None => Ok(String::new()),
    };
    let limits = Limits {
        experiment: Some(&experiment),
        resume: if flags.resume { Resume::Newest } else { Resume::No },
        init_from: init_from.as_deref(),
        stop: Some(&STOP),
        time,
        wandb: wandb.as_ref(),
        sample: flags.sample_freq.map(|every| Sample { every, text: &text }),
    };
    let mut progress = Progress::new();
    let outcome = landmark_train::train(&settings, &data, &device, &limits, &mut |event| progress.show(event));
    progress.finish();
    match outcome? {
        Outcome::AlreadyFinished => println!("Already found experiment {}: it is finished.", experiment.display()),
        Outcome::Finished { .. } => {
            let metrics = Metrics::read(&experiment)?;
            for (what, file) in [(What::Loss, "loss.svg"), (What::Lr, "lr.svg")] {
                curves::draw(&experiment.join(file), what, &metrics.curves(what, None))?;
            }
            println!("Finished after {} iterations: {}", settings.iterations, experiment.display());
        }
        Outcome::Stopped { iteration, .. } => {
            println!("Stopped at iteration {iteration} of {}.", settings.iterations);
            println!("To go on, run the same command with --resume. The checkpoints are in {}", experiment.display());
            if STOP.load(Ordering::Relaxed) {
                return Ok(ExitCode::from(130));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The folder of the model to begin with, if its tokens are the data's.
fn init_from(folder: &Path, plan: &Plan) -> anyhow::Result<PathBuf> {
    let folder = landmark_inference::model_path("init_from", folder)?;
    let own = folder.join(TOKENIZER_FILE);
    if let (Some(data), true) = (&plan.data.tokenizer, own.exists()) {
        let of_model = Tokenizer::from_file(own)?;
        if of_model.fingerprint() != data.fingerprint() {
            bail!("--init_from {}: the data's tokens are another tokenizer's", folder.display());
        }
    }
    Ok(folder)
}

fn plan(flags: &Flags, device: Device, experiment: PathBuf) -> anyhow::Result<Plan> {
    let corpus = corpus(flags)?;
    let vocabulary = corpus.vocabulary(flags.vocab_size)?;
    let settings = settings(flags, &vocabulary, &device)?;
    settings.check()?;
    let data = corpus.batches(&settings)?;
    Ok(Plan { settings, data, device, experiment })
}

/// Opens the prepared data of `--dataset`.
fn corpus(flags: &Flags) -> anyhow::Result<Corpus> {
    let dataset = dataset(flags)?;
    // The folder may hold several corpora by name, or be the corpus.
    let named = flags.data_dir.join(dataset);
    let folder = if named.is_dir() { named.as_path() } else { &flags.data_dir };
    let tokenizer = match flags.tokenizer.as_deref() {
        None => None,
        Some(name) => Some(Tokenizer::named(name).context("--tokenizer")?),
    };
    Corpus::open(folder, tokenizer).with_context(|| {
        format!(
            "--dataset {dataset}: no usable data in {} (landmark prepare --out {} makes it)",
            folder.display(),
            named.display()
        )
    })
}

fn dataset(flags: &Flags) -> anyhow::Result<&str> {
    match flags.dataset.as_deref() {
        None => bail!("--dataset NAME is missing: the prepared tokens to train on"),
        Some(name) => {
            let mut parts = Path::new(name).components();
            match (parts.next(), parts.next()) {
                (Some(Component::Normal(_)), None) => Ok(name),
                _ => bail!("--dataset {name}: expected the name of a folder in --data_dir"),
            }
        }
    }
}

/// `{results_base_folder}/{dataset}/{model}/{exp_name}`.
fn experiment_folder(flags: &Flags) -> anyhow::Result<PathBuf> {
    let name = match &flags.exp_name {
        Some(name) => name.clone(),
        None => name::experiment_name(flags, &FlagsOnly::try_parse_from(["landmark train"])?.flags),
    };
    let inside = |part| matches!(part, Component::Normal(_));
    if name.is_empty() || !Path::new(&name).components().all(inside) {
        bail!("--exp_name {name}: expected a name, or folders and a name, without . and ..");
    }
    Ok(flags.results_base_folder.join(dataset(flags)?).join(text(flags.model)).join(name))
}

/// The W&B run that the flags ask for, named as the experiment is.
fn wandb(flags: &Flags, experiment: &Path) -> anyhow::Result<Option<Wandb>> {
    if !flags.wandb {
        return Ok(None);
    }
    let dataset = dataset(flags)?;
    let model = flags.results_base_folder.join(dataset).join(text(flags.model));
    let name = experiment.strip_prefix(model).unwrap_or(experiment).display().to_string();
    let folder = std::env::var_os("WANDB_DIR").map_or_else(PathBuf::new, PathBuf::from).join("wandb");
    let config = [("dataset", dataset), ("exp_name", &name), ("wandb_project", &flags.wandb_project)];
    let config = config.map(|(key, value)| (key.to_string(), value.into())).into_iter().collect();
    Ok(Some(Wandb { project: flags.wandb_project.clone(), name, folder, config }))
}

fn time_limit(flags: &Flags) -> anyhow::Result<Option<Duration>> {
    flags.time_limit.map(Duration::try_from_secs_f64).transpose().context("--time_limit")
}

fn settings(flags: &Flags, vocabulary: &Vocabulary, device: &Device) -> anyhow::Result<Settings> {
    let model = GptConfig {
        vocab_size: vocabulary.size,
        landmark_id: vocabulary.landmark_id,
        n_embd: flags.n_embd,
        n_head: flags.n_head,
        n_layer: flags.n_layer,
        sequence_length: flags.sequence_length,
        mem_freq: flags.mem_freq,
        landmarks: match flags.landmarks {
            flags::Landmarks::Regular => Placement::Regular,
            flags::Landmarks::Sentence => Placement::Sentence,
            flags::Landmarks::Paragraph => Placement::Paragraph,
            flags::Landmarks::Line => Placement::Line,
            flags::Landmarks::Code => Placement::Code,
        },
        dropout: flags.dropout,
        group_dropout: flags.group_dropout,
        bias: flags.bias,
        norm: match flags.norm {
            flags::Norm::Layer => Norm::Layer,
            flags::Norm::Rms => Norm::Rms,
        },
        mlp: match flags.mlp {
            flags::MlpKind::Gelu => MlpKind::Gelu,
            flags::MlpKind::Swiglu => MlpKind::Swiglu,
        },
        qk_norm: flags.qk_norm,
        model: match flags.model {
            Model::BaseRotary => Variant::BaseRotary,
            Model::Landmark => Variant::Landmark,
            Model::LandmarkWithCmt => Variant::LandmarkWithCmt,
        },
        softmax_func: match flags.softmax_func {
            flags::SoftmaxFunc::MemOpt | flags::SoftmaxFunc::Mem => SoftmaxFunc::MemOpt,
            flags::SoftmaxFunc::NoMem => SoftmaxFunc::NoMem,
            flags::SoftmaxFunc::IgnoreMem => SoftmaxFunc::IgnoreMem,
        },
        positional_encoder: match flags.positional_encoder {
            flags::PositionalEncoder::Rotary => PositionalEncoder::Rotary,
            flags::PositionalEncoder::RotaryMemJump => PositionalEncoder::RotaryMemJump,
        },
        pos_jump_on_mem: flags.pos_jump_on_mem,
        under_rem_score_prob: flags.under_rem_score_prob,
        rem_cutoff: None,
    };
    let optimization_process = match (flags.optimization_process, flags.total_sequence_length, flags.mem_cache_size) {
        (OptimizationProcess::TransformerXl, Some(total_sequence_length), Some(mem_cache_size)) => {
            Process::TransformerXl { total_sequence_length, mem_cache_size }
        }
        // Without its numbers transformer_xl was refused before.
        _ => Process::Landmark,
    };
    let precision = match (device, flags.dtype) {
        (Device::Cpu, _) | (_, Dtype::Float32) => Precision::Float32,
        (_, Dtype::BFloat16) => Precision::BFloat16,
        (_, Dtype::Float16) => bail!("--dtype torch.float16: its gradients vanish; use torch.bfloat16"),
    };
    Ok(Settings {
        model,
        precision,
        optimization_process,
        whole_blocks: flags.whole_blocks,
        exercises: flags.exercises.options(),
        negatives: flags.negatives.options(),
        batch_size: flags.batch_size,
        eval_batch_size: None,
        acc_steps: flags.acc_steps,
        mean_gradients: false,
        seed: flags.seed,
        iterations: flags.iterations,
        lr: flags.lr,
        warmup_percent: flags.warmup_percent,
        scheduler: match flags.scheduler {
            Scheduler::Cos => Anneal::Cos,
            Scheduler::Linear => Anneal::Linear,
            Scheduler::None => Anneal::None,
        },
        opt: match flags.opt {
            Opt::Sgd => Method::Sgd,
            Opt::Adafactor => Method::Adafactor,
            Opt::AdamW => Method::AdamW { beta1: flags.beta1, beta2: flags.beta2 },
        },
        weight_decay: flags.weight_decay,
        grad_clip: flags.grad_clip,
        logging_steps: None,
        eval_freq: flags.eval_freq,
        save_checkpoint_freq: flags.save_checkpoint_freq,
        keep_checkpoints: flags.keep_checkpoints,
        activation_checkpointing: flags.activation_checkpointing,
    })
}

/// What a user should know before the first step.
fn notes(flags: &Flags, plan: &Plan) -> Vec<String> {
    let mut notes = vec![format!("experiment {}", plan.experiment.display())];
    notes.extend(flags.device.note(&plan.device));
    if plan.device.is_cpu() && flags.dtype != Dtype::Float32 {
        notes.push(format!(
            "--dtype {}: on the CPU training runs in float32, as the reference's does",
            text(flags.dtype)
        ));
    }
    if flags.no_compile {
        notes.push("--no_compile: nothing is ever compiled here".into());
    }
    if !flags.wandb && flags.wandb_project != "my-project" {
        notes.push("--wandb_project: without --wandb there is no W&B run".into());
    }
    if flags.postpone_lm_cache {
        notes.push("--postpone_lm_cache: caches are made when they are needed here".into());
    }
    if flags.max_groups_for_softmax != 16 {
        notes.push("--max_groups_for_softmax: there is no limit on the number of blocks here".into());
    }
    let train = plan.data.train.stream().len();
    let validation = plan.data.validation.as_ref().map_or(0, |batches| batches.stream().len());
    notes.push(format!("{train} training tokens and {validation} validation tokens, landmarks included"));
    if flags.landmarks != flags::Landmarks::Regular {
        let stream = plan.data.train.stream();
        let landmarks = stream.len() - stream.tokens().len();
        let mean = stream.tokens().len() as f64 / landmarks.max(1) as f64;
        notes.push(format!("--landmarks {}: {landmarks} blocks of {mean:.1} tokens on average", text(flags.landmarks)));
    }
    if plan.data.validation.is_none() {
        notes.push("there are no validation data: nothing will be evaluated".into());
    }
    if plan.data.tokenizer.is_none() {
        notes.push(
            "the data have no tokenizer.json: checkpoints will have none either, unless --tokenizer names it".into(),
        );
    }
    if flags.model != Model::BaseRotary && flags.mem_freq.is_none() {
        notes.push("--mem_freq None: a model with landmark attention, and no landmarks in its data".into());
    }
    notes
}

/// Ctrl-C, or a scheduler's SIGTERM, stops after the current step; a second one at once.
fn stop_on_signal() -> anyhow::Result<()> {
    let stop = || {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nStopping after this step, with a checkpoint. (Once more: at once, without.)");
    };
    ctrlc::set_handler(stop).context("cannot watch for Ctrl-C")
}
