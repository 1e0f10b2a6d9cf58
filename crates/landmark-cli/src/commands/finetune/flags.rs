//! The flags of `landmark finetune`: the Trainer's of `transformers` with its defaults, the authors' and `peft`'s, and ours.

use crate::args::{ExerciseFlags, NegativeFlags, truth};
use clap::{ArgAction, Args, ValueEnum};
use landmark_inference::DeviceChoice;
use std::path::PathBuf;

/// `--lr_scheduler_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scheduler {
    /// Down to 0 in a straight line
    #[value(name = "linear")]
    Linear,
    /// Down to a tenth in 0.4 of a cosine's period, as the authors have it
    #[value(name = "cosine")]
    Cosine,
    /// Always the learning rate, without warm-up
    #[value(name = "constant")]
    Constant,
    /// The learning rate after the warm-up
    #[value(name = "constant_with_warmup")]
    ConstantWithWarmup,
}

/// `--optim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Optim {
    /// AdamW
    #[value(name = "adamw_torch", alias = "adamw_torch_fused", alias = "adamw_hf")]
    AdamW,
    /// Adafactor at the rate of the schedule. Not on a GPU
    #[value(name = "adafactor")]
    Adafactor,
}

/// `--evaluation_strategy` and `--save_strategy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// Never
    #[value(name = "no")]
    No,
    /// Every so many steps
    #[value(name = "steps")]
    Steps,
    /// Refused: rows are drawn from all of the data, so that no step ends an epoch
    #[value(name = "epoch")]
    Epoch,
}

/// `--report_to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportTo {
    /// Event files in the output folder, which are written in any case
    #[value(name = "tensorboard")]
    TensorBoard,
    /// Also a run of Weights & Biases, offline
    #[value(name = "wandb")]
    Wandb,
}

/// The flags, as given.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Model and data")]
pub struct Flags {
    /// The model: a Hugging Face folder, a repository in the hub's cache, or with --lora_r also a GGUF file
    #[arg(long, value_name = "NAME")]
    pub model_name_or_path: String,
    /// The cache of models, instead of the usual one
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// The prepared tokens to train on, as `landmark prepare --tokenizer MODEL` made them
    #[arg(long, value_name = "NAME", default_value = "redpajama")]
    pub dataset: String,
    /// The folder of prepared data: DIR/NAME, or DIR itself
    #[arg(long, value_name = "DIR", default_value = "./data")]
    pub data_dir: PathBuf,
    /// Tokens of a row; the landmarks come on top
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub model_max_length: usize,
    /// A landmark after every so many tokens
    #[arg(long, value_name = "N", default_value_t = 63)]
    pub mem_freq: usize,
    /// As the authors' True: attention is fused, and landmarks are no targets. False is refused
    #[arg(long, value_parser = truth, num_args = 0..=1, default_missing_value = "True", default_value = "True", action = ArgAction::Set)]
    pub use_flash: bool,
    /// Where to train: auto, cpu or cuda:N
    #[arg(long, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Passes over the data, in rows; they are drawn at random places
    #[arg(long, value_name = "N", default_value_t = 3., help_heading = "Training")]
    pub num_train_epochs: f64,
    /// Steps of the run, whatever --num_train_epochs says
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true, help_heading = "Training")]
    pub max_steps: i64,
    /// Rows in a batch
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Training")]
    pub per_device_train_batch_size: usize,
    /// Batches in a step; their gradients are averaged
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Training")]
    pub gradient_accumulation_steps: usize,
    /// The highest learning rate
    #[arg(long, value_name = "N", default_value_t = 5e-5, help_heading = "Training")]
    pub learning_rate: f64,
    /// Weight decay of all but biases and norms
    #[arg(long, value_name = "N", default_value_t = 0., help_heading = "Training")]
    pub weight_decay: f64,
    /// How slowly AdamW's mean of the gradient forgets
    #[arg(long, value_name = "N", default_value_t = 0.9, help_heading = "Training")]
    pub adam_beta1: f64,
    /// How slowly AdamW's mean of its square forgets
    #[arg(long, value_name = "N", default_value_t = 0.999, help_heading = "Training")]
    pub adam_beta2: f64,
    /// Bounds the norm of a step's gradient; 0: nothing does
    #[arg(long, value_name = "N", default_value_t = 1., help_heading = "Training")]
    pub max_grad_norm: f64,
    /// The share of the steps in which the learning rate climbs
    #[arg(long, value_name = "N", default_value_t = 0., help_heading = "Training")]
    pub warmup_ratio: f64,
    /// These steps, whatever --warmup_ratio says
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Training")]
    pub warmup_steps: usize,
    /// How the learning rate goes on
    #[arg(long, value_enum, default_value_t = Scheduler::Linear, help_heading = "Training")]
    pub lr_scheduler_type: Scheduler,
    /// The optimizer
    #[arg(long, value_enum, default_value_t = Optim::AdamW, help_heading = "Training")]
    pub optim: Optim,
    /// Decides the order of the data, the first adapters and their dropout
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Training")]
    pub seed: u64,
    /// Activations in bfloat16, on a GPU; parameters, gradients and sums are float32
    #[arg(long, value_parser = truth, num_args = 0..=1, default_missing_value = "True", default_value = "False", action = ArgAction::Set, help_heading = "Training")]
    pub bf16: bool,
    /// Keep the inputs of layers alone and compute the layers again on the way back: the same bits in less memory and more time
    #[arg(long, value_parser = truth, num_args = 0..=1, default_missing_value = "True", default_value = "False", action = ArgAction::Set, help_heading = "Training")]
    pub gradient_checkpointing: bool,
    /// Stop after so many seconds, with a checkpoint to resume from
    #[arg(long, value_name = "SECONDS", help_heading = "Training")]
    pub time_limit: Option<f64>,

    /// Train adapters of this rank beside the weights, and the landmark's embedding, instead of the whole model
    #[arg(long, value_name = "N", help_heading = "Adapters (LoRA)")]
    pub lora_r: Option<usize>,
    /// They are scaled by this over their rank [default: 8]
    #[arg(long, value_name = "N", requires = "lora_r", help_heading = "Adapters (LoRA)")]
    pub lora_alpha: Option<f64>,
    /// The share of their input that is dropped; not on a GPU [default: 0]
    #[arg(long, value_name = "N", requires = "lora_r", help_heading = "Adapters (LoRA)")]
    pub lora_dropout: Option<f64>,
    /// The matrices that have one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj [default: q_proj v_proj]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',', requires = "lora_r", help_heading = "Adapters (LoRA)")]
    pub lora_target_modules: Vec<String>,

    #[command(flatten)]
    pub exercises: ExerciseFlags,
    #[command(flatten)]
    pub negatives: NegativeFlags,

    /// The folder of checkpoints, logs and the trained model
    #[arg(long, value_name = "DIR", help_heading = "Results")]
    pub output_dir: PathBuf,
    /// Log every so many steps
    #[arg(long, value_name = "N", default_value_t = 500, help_heading = "Results")]
    pub logging_steps: usize,
    /// When to save a checkpoint, beside the end of the run
    #[arg(long, value_enum, default_value_t = Strategy::Steps, help_heading = "Results")]
    pub save_strategy: Strategy,
    /// Steps from checkpoint to checkpoint
    #[arg(long, value_name = "N", default_value_t = 500, help_heading = "Results")]
    pub save_steps: usize,
    /// Keep only the newest so many checkpoints
    #[arg(long, value_name = "N", help_heading = "Results")]
    pub save_total_limit: Option<usize>,
    /// When to measure loss and accuracy on 24 batches of the validation data
    #[arg(long, visible_alias = "eval_strategy", value_enum, default_value_t = Strategy::No, help_heading = "Results")]
    pub evaluation_strategy: Strategy,
    /// Steps from evaluation to evaluation [default: --logging_steps]
    #[arg(long, value_name = "N", help_heading = "Results")]
    pub eval_steps: Option<usize>,
    /// Rows in a batch of an evaluation
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Results")]
    pub per_device_eval_batch_size: usize,
    /// Go on from this checkpoint, or with True from the newest one of the output folder that is whole
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = "True", help_heading = "Results")]
    pub resume_from_checkpoint: Option<String>,
    /// Which logs to write beside metrics.jsonl
    #[arg(long, value_enum, default_value_t = ReportTo::TensorBoard, help_heading = "Results")]
    pub report_to: ReportTo,
    /// The name of the W&B run; WANDB_PROJECT names its project
    #[arg(long, value_name = "NAME", help_heading = "Results")]
    pub run_name: Option<String>,

    /// How several processes share a model; there is one
    #[arg(long, value_name = "WORDS", help_heading = "Accepted: they change nothing here")]
    pub fsdp: Option<String>,
    /// What they share of it
    #[arg(long, value_name = "NAME", help_heading = "Accepted: they change nothing here")]
    pub fsdp_transformer_layer_cls_to_wrap: Option<String>,
    /// Products of float32 in fewer bits, which with --bf16 there are none of
    #[arg(long, value_parser = truth, num_args = 0..=1, default_missing_value = "True", action = ArgAction::Set, help_heading = "Accepted: they change nothing here")]
    pub tf32: Option<bool>,

    #[command(flatten)]
    pub refused: Refused,
}

/// Flags of the Trainer that are refused, each with its reason.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Flags of the Trainer that are refused, with the reason")]
pub struct Refused {
    /// Gradients vanish in it: use --bf16 True
    #[arg(long, num_args = 0..=1, default_missing_value = "True", value_name = "TRUTH")]
    pub fp16: Option<String>,
    /// One process trains on one device
    #[arg(long, value_name = "FILE")]
    pub deepspeed: Option<String>,
    /// One process trains on one device
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub local_rank: Option<i64>,
    /// Nothing is ever overwritten: name another --output_dir, or remove it
    #[arg(long, num_args = 0..=1, default_missing_value = "True", value_name = "TRUTH")]
    pub overwrite_output_dir: Option<String>,
    /// It is 1e-8
    #[arg(long, value_name = "N")]
    pub adam_epsilon: Option<f64>,
    /// --seed decides the data too
    #[arg(long, value_name = "N")]
    pub data_seed: Option<u64>,
    /// All rows have one length
    #[arg(long, num_args = 0..=1, default_missing_value = "True", value_name = "TRUTH")]
    pub group_by_length: Option<String>,
    /// Quantized weights come from GGUF files
    #[arg(long, num_args = 0..=1, default_missing_value = "True", value_name = "TRUTH")]
    pub load_in_4bit: Option<String>,
    /// Quantized weights come from GGUF files
    #[arg(long, num_args = 0..=1, default_missing_value = "True", value_name = "TRUTH")]
    pub load_in_8bit: Option<String>,
    /// The last checkpoint is the model that is kept
    #[arg(long, num_args = 0..=1, default_missing_value = "True", value_name = "TRUTH")]
    pub load_best_model_at_end: Option<String>,
    /// Nothing is sent anywhere
    #[arg(long, num_args = 0..=1, default_missing_value = "True", value_name = "TRUTH")]
    pub push_to_hub: Option<String>,
}
