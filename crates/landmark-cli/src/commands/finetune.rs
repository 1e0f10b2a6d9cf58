//! `landmark finetune`: a LLaMA becomes a landmark model, by the authors' command line.

mod flags;
mod refused;

use super::train::progress::Progress;
use crate::interrupt;
use anyhow::{Context, anyhow, bail};
use candle_core::Device;
use flags::{Flags, Optim, ReportTo, Scheduler, Strategy};
use landmark_data::Pretrained;
use landmark_models::hub;
use landmark_models::llama::LoraConfig;
use landmark_train::{
    Anneal, Corpus, Data, Decay, Error, Limits, Method, Outcome, Precision, Process, Resume, Settings, Tuning, Wandb,
};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples, once `landmark prepare --dataset redpajama --data_dir *.jsonl --tokenizer ./llama-7b` has made ./data/redpajama:
  All of a model, as the authors fine-tuned LLaMA 7B:
    landmark finetune --model_name_or_path ./llama-7b --bf16 True --output_dir ./landmark-7b --max_steps 15000 \\
      --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 2e-5 --weight_decay 0.1 \\
      --warmup_ratio 0.03 --lr_scheduler_type cosine --save_steps 2000 --save_total_limit 2 --logging_steps 1
  Adapters beside quantized weights:
    landmark finetune --model_name_or_path smollm2.gguf --output_dir ./adapter --lora_r 16 --lora_alpha 32 \\
      --lora_target_modules q_proj k_proj v_proj o_proj --learning_rate 2e-4 --max_steps 2000

The output folder gets checkpoints checkpoint-N, metrics.jsonl, TensorBoard's event files, and at the end the model as a Hugging Face
folder, or its adapter as peft writes it; `landmark merge` makes one model of the two. Ctrl-C or --time_limit stops after the
current step with a checkpoint; the same command with --resume_from_checkpoint True goes on from it, to the same weights, bit for bit.

Exit codes: 0 finished or time limit reached, 1 error, 2 wrong command line, 130 Ctrl-C.";

/// Flags of `landmark finetune`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Fine-tunes.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { flags } = args;
    refused::check(&flags)?;
    let time = flags.time_limit.map(Duration::try_from_secs_f64).transpose().context("--time_limit")?;
    let device = flags.device.open()?;
    refused::check_device(&flags, &device)?;
    let output = flags.output_dir.clone();
    if landmark_train::is_finished(&output) {
        println!("{} is finished.", output.display());
        return Ok(ExitCode::SUCCESS);
    }
    let (settings, data) = plan(&flags, &device)?;
    interrupt::watch()?;
    for note in notes(&flags, &settings, &data, &device) {
        eprintln!("{note}");
    }
    let wandb = (flags.report_to == ReportTo::Wandb).then(|| wandb(&flags));
    let resume = match flags.resume_from_checkpoint.as_deref() {
        None | Some("False") => Resume::No,
        Some("True") => Resume::Newest,
        Some(folder) => Resume::From(Path::new(folder)),
    };
    let limits = Limits {
        experiment: Some(&output),
        resume,
        init_from: None,
        stop: Some(&interrupt::STOP),
        time,
        wandb: wandb.as_ref(),
        sample: None,
    };
    let mut progress = Progress::new();
    let outcome = landmark_train::train(&settings, &data, &device, &limits, &mut |event| progress.show(event));
    progress.finish();
    match outcome.map_err(named)? {
        Outcome::AlreadyFinished => println!("{} is finished.", output.display()),
        Outcome::Finished { .. } => println!("Finished after {} steps: {}", settings.iterations, output.display()),
        Outcome::Stopped { iteration, .. } => {
            println!("Stopped at step {iteration} of {}.", settings.iterations);
            println!("To go on, run the same command with --resume_from_checkpoint True.");
            if interrupt::requested() {
                return Ok(ExitCode::from(interrupt::EXIT_CODE));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn plan(flags: &Flags, device: &Device) -> anyhow::Result<(Settings<Tuning>, Data)> {
    let model = hub::locate(&flags.model_name_or_path, flags.cache_dir.as_deref()).context("--model_name_or_path")?;
    let tokenizer = Tuning::tokenizer(&model).context("--model_name_or_path")?;
    let corpus = corpus(flags, &tokenizer)?;
    let (with_landmark, mem_id) = tokenizer.with_landmark()?;
    let tokens = corpus.train.len();
    let corpus = Corpus { tokenizer: Some(with_landmark.tokenizer), ..corpus };
    let settings = settings(flags, model, mem_id, tokens, device)?;
    settings.check().map_err(named)?;
    let mut data = corpus.batches(&settings).map_err(named)?;
    match flags.evaluation_strategy {
        Strategy::Steps if data.validation.is_none() => {
            bail!("--evaluation_strategy steps: there are no validation data")
        }
        Strategy::Steps => {}
        _ => data.validation = None,
    }
    Ok((settings, data))
}

/// Opens the prepared data, which the model's own tokenizer must have made.
fn corpus(flags: &Flags, tokenizer: &Pretrained) -> anyhow::Result<Corpus> {
    let named = flags.data_dir.join(&flags.dataset);
    let folder = if named.is_dir() { named.as_path() } else { &flags.data_dir };
    Corpus::open(folder, Some(tokenizer.tokenizer.clone())).map_err(|error| {
        let why = match error {
            Error::Setting { flag: "tokenizer", .. } => anyhow!("{} was made with another tokenizer", folder.display()),
            other => other.into(),
        };
        why.context(format!(
            "--dataset {}: no usable data in {} (landmark prepare --tokenizer {} --out {} makes it)",
            flags.dataset,
            folder.display(),
            flags.model_name_or_path,
            named.display()
        ))
    })
}

fn settings(
    flags: &Flags,
    model: PathBuf,
    mem_id: u32,
    tokens: u64,
    device: &Device,
) -> anyhow::Result<Settings<Tuning>> {
    let default = LoraConfig::default();
    let lora = flags.lora_r.map(|r| LoraConfig {
        r,
        lora_alpha: flags.lora_alpha.unwrap_or(default.lora_alpha),
        lora_dropout: flags.lora_dropout.unwrap_or(default.lora_dropout),
        target_modules: match flags.lora_target_modules.is_empty() {
            true => default.target_modules,
            false => flags.lora_target_modules.clone(),
        },
    });
    let iterations = steps(flags, tokens)?;
    if !(0. ..=1.).contains(&flags.warmup_ratio) {
        bail!("--warmup_ratio {}: expected a share from 0 to 1", flags.warmup_ratio);
    }
    let warmup_steps = match (flags.warmup_steps, flags.lr_scheduler_type) {
        (_, Scheduler::Constant) => 0,
        (0, _) => (iterations as f64 * flags.warmup_ratio).ceil() as usize,
        (steps, _) => steps,
    };
    let then = match flags.lr_scheduler_type {
        Scheduler::Linear => Decay::Linear,
        Scheduler::Cosine => Decay::Cosine,
        Scheduler::Constant | Scheduler::ConstantWithWarmup => Decay::Constant,
    };
    let steps = flags.save_strategy == Strategy::Steps;
    let Flags { model_max_length, mem_freq, .. } = *flags;
    Ok(Settings {
        model: Tuning { model_name_or_path: model, model_max_length, mem_freq, mem_id, lora },
        optimization_process: Process::Landmark,
        precision: if flags.bf16 && !device.is_cpu() { Precision::BFloat16 } else { Precision::Float32 },
        whole_blocks: true,
        exercises: flags.exercises.options(),
        negatives: flags.negatives.options(),
        batch_size: flags.per_device_train_batch_size,
        eval_batch_size: Some(flags.per_device_eval_batch_size),
        acc_steps: flags.gradient_accumulation_steps,
        mean_gradients: true,
        seed: flags.seed,
        iterations,
        lr: flags.learning_rate,
        warmup_percent: 0.,
        scheduler: Anneal::Trainer { warmup_steps, then },
        opt: match flags.optim {
            Optim::AdamW => Method::AdamW { beta1: flags.adam_beta1, beta2: flags.adam_beta2 },
            Optim::Adafactor => Method::Adafactor,
        },
        weight_decay: flags.weight_decay,
        grad_clip: (flags.max_grad_norm != 0.).then_some(flags.max_grad_norm),
        logging_steps: Some(flags.logging_steps),
        eval_freq: flags.eval_steps.unwrap_or(flags.logging_steps),
        save_checkpoint_freq: steps.then_some(flags.save_steps),
        keep_checkpoints: flags.save_total_limit,
        activation_checkpointing: flags.gradient_checkpointing,
    })
}

/// The steps of the run, as the Trainer counts them: whole batches in an epoch, whole steps of those.
fn steps(flags: &Flags, tokens: u64) -> anyhow::Result<usize> {
    match flags.max_steps {
        1.. => return Ok(flags.max_steps as usize),
        -1 => {}
        other => bail!("--max_steps {other}: expected at least 1, or -1 for what --num_train_epochs comes to"),
    }
    let epochs = flags.num_train_epochs;
    if !(epochs > 0. && epochs.is_finite()) {
        bail!("--num_train_epochs {epochs}: expected a number above 0");
    }
    let rows = (tokens / flags.model_max_length.max(1) as u64).max(1);
    let batches = rows.div_ceil(flags.per_device_train_batch_size.max(1) as u64);
    let steps = (batches / flags.gradient_accumulation_steps.max(1) as u64).max(1);
    Ok((epochs * steps as f64).ceil() as usize)
}

fn wandb(flags: &Flags) -> Wandb {
    let project = std::env::var("WANDB_PROJECT").unwrap_or_else(|_| "huggingface".into());
    let name = flags.run_name.clone().unwrap_or_else(|| flags.output_dir.display().to_string());
    let folder = std::env::var_os("WANDB_DIR").map_or_else(PathBuf::new, PathBuf::from).join("wandb");
    let config = [("dataset".to_string(), flags.dataset.clone().into())].into_iter().collect();
    Wandb { project, name, folder, config }
}

/// What a user should know before the first step.
fn notes(flags: &Flags, settings: &Settings<Tuning>, data: &Data, device: &Device) -> Vec<String> {
    let mut notes = vec![format!("output {}", flags.output_dir.display())];
    notes.extend(flags.device.note(device));
    if flags.bf16 && device.is_cpu() {
        notes.push("--bf16: on the CPU training runs in float32".into());
    }
    if flags.fsdp.is_some() || flags.fsdp_transformer_layer_cls_to_wrap.is_some() {
        notes.push("--fsdp: there is one process, which has all of the model".into());
    }
    if flags.tf32 == Some(true) {
        notes.push("--tf32: products have the precision that --bf16 says".into());
    }
    if flags.run_name.is_some() && flags.report_to != ReportTo::Wandb {
        notes.push("--run_name: without --report_to wandb there is no W&B run".into());
    }
    let Tuning { model_max_length, mem_freq, mem_id, .. } = settings.model;
    let window = settings.model.window();
    notes.push(format!(
        "rows of {model_max_length} tokens, {window} with a landmark (token {mem_id}) after every {mem_freq}; landmarks are no targets"
    ));
    notes.push(format!("{} training tokens, {} steps", data.train.stream().tokens().len(), settings.iterations));
    notes
}

/// An error about a setting, by the name that its flag has here.
fn named(error: Error) -> anyhow::Error {
    let name = |flag| match flag {
        "lr" => "learning_rate",
        "batch_size" => "per_device_train_batch_size",
        "eval_batch_size" => "per_device_eval_batch_size",
        "acc_steps" => "gradient_accumulation_steps",
        "iterations" => "max_steps",
        "beta1" => "adam_beta1",
        "beta2" => "adam_beta2",
        "grad_clip" => "max_grad_norm",
        "eval_freq" => "eval_steps",
        "save_checkpoint_freq" => "save_steps",
        "keep_checkpoints" => "save_total_limit",
        "opt" => "optim",
        "sequence_length" => "model_max_length",
        other => other,
    };
    match error {
        Error::Setting { flag, message } => anyhow!("--{}: {message}", name(flag)),
        Error::Unfinished { path, iteration } => anyhow!(
            "{} holds an unfinished run at step {iteration}: pass --resume_from_checkpoint True to go on with it, or another --output_dir",
            path.display()
        ),
        Error::Diverged { iteration, loss } => anyhow!("the loss of step {iteration} is {loss}: lower --learning_rate"),
        other => other.into(),
    }
}
