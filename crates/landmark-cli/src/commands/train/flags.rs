//! The flags of `landmark train`: those of the reference's `config/rotary.py` with its defaults, and ours.

use crate::args::{ExerciseFlags, NegativeFlags, RETRIEVAL, truth};
use clap::{Args, ValueEnum};
use landmark_inference::{DeviceChoice, NoneOr, none_or};
use std::path::PathBuf;

/// A choice as the command line spells it.
pub fn text(choice: impl ValueEnum) -> String {
    choice.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}

/// `--config_format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConfigFormat {
    /// The only one that the reference has
    #[value(name = "rotary")]
    Rotary,
}

/// `--model`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Model {
    /// A plain transformer: every token sees every earlier one
    #[value(name = "base_rotary", alias = "base")]
    BaseRotary,
    /// Landmark attention
    #[value(name = "landmark")]
    Landmark,
    /// Landmark attention with a context-miss token
    #[value(name = "landmark_with_cmt")]
    LandmarkWithCmt,
}

/// `--scheduler`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scheduler {
    /// Cosines: up from lr/100 during the warm-up, down to lr/5
    #[value(name = "cos")]
    Cos,
    /// Straight lines between the same rates
    #[value(name = "linear")]
    Linear,
    /// Always lr
    #[value(name = "none")]
    None,
}

/// `--opt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Opt {
    /// Adam with decoupled weight decay
    #[value(name = "adamw")]
    AdamW,
    /// Gradient descent with momentum 0.9
    #[value(name = "sgd")]
    Sgd,
    /// Adafactor, at the rate that --scheduler says
    #[value(name = "adafactor")]
    Adafactor,
}

/// `--softmax_func`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SoftmaxFunc {
    /// Landmark attention's grouped softmax
    #[value(name = "mem_opt")]
    MemOpt,
    /// Ablation: one softmax over everything, landmarks included
    #[value(name = "nomem")]
    NoMem,
    /// Another name of mem_opt
    #[value(name = "mem")]
    Mem,
    /// Ablation: one softmax over all tokens but landmarks
    #[value(name = "ignore_mem")]
    IgnoreMem,
}

/// `--positional_encoder`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PositionalEncoder {
    /// Rotary positions
    #[value(name = "rotary")]
    Rotary,
    /// Rotary positions that jump at landmarks, see --pos_jump_on_mem
    #[value(name = "rotary_mem_jump")]
    RotaryMemJump,
}

/// `--norm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Norm {
    /// LayerNorm
    #[value(name = "layer")]
    Layer,
    /// RMSNorm
    #[value(name = "rms")]
    Rms,
}

/// `--mlp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MlpKind {
    /// GELU, four times as wide as the model
    #[value(name = "gelu")]
    Gelu,
    /// SwiGLU, 8/3 as wide in multiples of 64
    #[value(name = "swiglu")]
    Swiglu,
}

/// `--landmarks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Landmarks {
    /// After every --mem_freq tokens
    #[value(name = "regular")]
    Regular,
    /// At the ends of sentences
    #[value(name = "sentence")]
    Sentence,
    /// After empty lines
    #[value(name = "paragraph")]
    Paragraph,
    /// At line ends
    #[value(name = "line")]
    Line,
    /// After empty lines and closing brackets at the left margin, of long blocks at any line end
    #[value(name = "code")]
    Code,
}

/// `--optimization_process`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimizationProcess {
    /// Windows are independent
    #[value(name = "landmark")]
    Landmark,
    /// A window also sees the last tokens before it
    #[value(name = "transformer_xl")]
    TransformerXl,
}

/// `--lm_cache`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LmCache {
    /// Nothing
    #[value(name = "none")]
    None,
    /// The landmark cache, which is read in inference alone
    #[value(name = "mem")]
    Mem,
    /// Keys and values of the last tokens
    #[value(name = "kv")]
    Kv,
    /// Another name of kv
    #[value(name = "kv_train")]
    KvTrain,
}

/// `--distributed_backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DistributedBackend {
    /// One process
    #[value(name = "None")]
    None,
    /// Several GPUs; not available yet
    #[value(name = "nccl")]
    Nccl,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// Activations in bfloat16 on a GPU
    #[value(name = "torch.bfloat16")]
    BFloat16,
    /// Refused on a GPU
    #[value(name = "torch.float16")]
    Float16,
    /// float32
    #[value(name = "torch.float32")]
    Float32,
}

/// The flags, as given.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Training")]
pub struct Flags {
    /// Sequences in a batch
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub batch_size: usize,
    /// Batches in a step; their gradients are added up, not averaged, as the reference does
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub acc_steps: usize,
    /// Decides the first weights, the order of the data and dropout
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub seed: u64,
    /// Where to train: auto, cpu or cuda:N
    #[arg(long, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Steps of the run
    #[arg(long, value_name = "N", default_value_t = 15000)]
    pub iterations: usize,
    /// The highest learning rate
    #[arg(long, value_name = "N", default_value_t = 2e-3)]
    pub lr: f64,
    /// The share of the steps in which the learning rate climbs, 0 to 1
    #[arg(long, value_name = "N", default_value_t = 0.02)]
    pub warmup_percent: f64,
    /// Weight decay of linear layers (never of biases, LayerNorm and embeddings)
    #[arg(long, value_name = "N", default_value_t = 1e-3)]
    pub weight_decay: f64,
    /// How slowly AdamW's mean of the gradient forgets
    #[arg(long, value_name = "N", default_value_t = 0.9)]
    pub beta1: f64,
    /// How slowly AdamW's mean of its square forgets
    #[arg(long, value_name = "N", default_value_t = 0.95)]
    pub beta2: f64,
    /// How the learning rate moves
    #[arg(long, value_enum, default_value_t = Scheduler::Cos)]
    pub scheduler: Scheduler,
    /// The optimizer
    #[arg(long, value_enum, default_value_t = Opt::AdamW)]
    pub opt: Opt,
    /// Bounds the norm of the gradient of a step, which is the sum over --acc_steps; the reference clips nothing
    #[arg(long, value_name = "N", value_parser = none_or::<f64>, default_value = "None")]
    pub grad_clip: NoneOr<f64>,
    /// Stop after so many seconds, with a checkpoint to resume from
    #[arg(long, value_name = "SECONDS")]
    pub time_limit: Option<f64>,
    /// The activations on a GPU: torch.bfloat16 or torch.float32. Parameters, gradients, sums and the residual stream are float32. On
    /// the CPU training runs in float32 whatever this says, in the reference and here
    #[arg(long, value_enum, default_value_t = Dtype::BFloat16, hide_possible_values = true)]
    pub dtype: Dtype,

    /// The prepared tokens to train on, as `landmark prepare` made them
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    pub dataset: Option<String>,
    /// The folder of prepared data: DIR/NAME, or DIR itself
    #[arg(long, value_name = "DIR", default_value = "./data", help_heading = "Data")]
    pub data_dir: PathBuf,
    /// gpt2, bytes, or the path of a tokenizer.json, for data that does not say which one made it
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub tokenizer: Option<String>,
    /// Rows of the embedding. Left out: what the data says, and 50304 for GPT-2's tokens
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub vocab_size: Option<usize>,
    /// A landmark after every so many tokens, or None
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "50", help_heading = "Data")]
    pub mem_freq: NoneOr<usize>,
    /// Where the landmarks are. At borders of the text, --mem_freq is the most tokens of a block, a quarter of it the least
    #[arg(long, value_enum, default_value_t = Landmarks::Regular, help_heading = "Data")]
    pub landmarks: Landmarks,

    /// The kind of model
    #[arg(long, value_enum, default_value_t = Model::BaseRotary, help_heading = "Model")]
    pub model: Model,
    /// Begin with the weights of this model: a checkpoint, or what landmark export wrote
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub init_from: Option<PathBuf>,
    /// The share of activations that dropout sets to zero
    #[arg(long, value_name = "N", default_value_t = 0., help_heading = "Model")]
    pub dropout: f64,
    /// The share of earlier blocks that group dropout hides, or None
    #[arg(long, value_name = "N", value_parser = none_or::<f64>, default_value = "None", help_heading = "Model")]
    pub group_dropout: NoneOr<f64>,
    /// Attention heads
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Model")]
    pub n_head: usize,
    /// Layers
    #[arg(long, value_name = "N", default_value_t = 12, help_heading = "Model")]
    pub n_layer: usize,
    /// The width of the model
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Model")]
    pub n_embd: usize,
    /// Tokens of a training window, landmarks included
    #[arg(long, value_name = "N", default_value_t = 512, help_heading = "Model")]
    pub sequence_length: usize,
    /// Whether linear layers and LayerNorm have biases: True or False
    #[arg(long, value_parser = truth, default_value = "False", action = clap::ArgAction::Set, help_heading = "Model")]
    pub bias: bool,
    /// How the residual stream is normalised
    #[arg(long, value_enum, default_value_t = Norm::Layer, help_heading = "Model")]
    pub norm: Norm,
    /// The feed-forward half of a layer
    #[arg(long, value_enum, default_value_t = MlpKind::Gelu, help_heading = "Model")]
    pub mlp: MlpKind,
    /// Normalise queries and keys head by head (RMSNorm) before they are rotated: True or False
    #[arg(long, value_parser = truth, default_value = "False", action = clap::ArgAction::Set, help_heading = "Model")]
    pub qk_norm: bool,
    /// Keep of a step the inputs of the layers alone and compute the layers again on the way back: True or False. The same bits in less memory
    /// and more time
    #[arg(long, value_parser = truth, default_value = "False", action = clap::ArgAction::Set, help_heading = "Model")]
    pub activation_checkpointing: bool,
    /// The softmax of attention
    #[arg(long, value_enum, default_value_t = SoftmaxFunc::MemOpt, help_heading = "Model")]
    pub softmax_func: SoftmaxFunc,
    /// How positions enter attention
    #[arg(long, value_enum, default_value_t = PositionalEncoder::Rotary, help_heading = "Model")]
    pub positional_encoder: PositionalEncoder,
    /// With rotary_mem_jump: positions jump by less than this at each landmark, or None
    #[arg(long, value_name = "N", value_parser = none_or::<u64>, default_value = "None", help_heading = "Model")]
    pub pos_jump_on_mem: NoneOr<u64>,
    /// With landmark_with_cmt: the share of landmarks that the context-miss token does not weigh, or None
    #[arg(long, value_name = "N", value_parser = none_or::<f64>, default_value = "0.0", help_heading = "Model")]
    pub under_rem_score_prob: NoneOr<f64>,

    /// Windows begin with a whole block, wherever in the text they begin, as texts do that are read; on GPUs also the faster kernels
    #[arg(long, help_heading = RETRIEVAL)]
    pub whole_blocks: bool,
    #[command(flatten)]
    pub exercises: ExerciseFlags,
    #[command(flatten)]
    pub negatives: NegativeFlags,

    /// How a model reads the tokens of a batch
    #[arg(long, value_enum, default_value_t = OptimizationProcess::Landmark, help_heading = "Transformer-XL training")]
    pub optimization_process: OptimizationProcess,
    /// Tokens of a row of a batch; it is read in windows of --sequence_length, each with its own loss
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None", help_heading = "Transformer-XL training")]
    pub total_sequence_length: NoneOr<usize>,
    /// What is kept of the windows before: kv_train
    #[arg(long, value_enum, default_value_t = LmCache::None, hide_possible_values = true, help_heading = "Transformer-XL training")]
    pub lm_cache: LmCache,
    /// The tokens before a window that it sees
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None", help_heading = "Transformer-XL training")]
    pub mem_cache_size: NoneOr<usize>,
    /// Must be given with transformer_xl, as the reference demands
    #[arg(long, help_heading = "Transformer-XL training")]
    pub allow_cache_during_training: bool,

    /// Measure loss, perplexity and accuracy on the validation data every so many iterations
    #[arg(long, value_name = "N", default_value_t = 200, help_heading = "Results")]
    pub eval_freq: usize,
    /// Experiments go to DIR/DATASET/MODEL/NAME
    #[arg(long, value_name = "DIR", default_value = "./exps", help_heading = "Results")]
    pub results_base_folder: PathBuf,
    /// The name of the experiment. Left out: made of the settings as the reference makes it
    #[arg(long, value_name = "NAME", help_heading = "Results")]
    pub exp_name: Option<String>,
    /// Goes before the name that is made of the settings
    #[arg(long, value_name = "PREFIX", help_heading = "Results")]
    pub run_prefix: Option<String>,
    /// Save a checkpoint every so many iterations; None: only when the run ends or is stopped
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None", help_heading = "Results")]
    pub save_checkpoint_freq: NoneOr<usize>,
    /// Keep only the newest so many checkpoints, or None for all
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None", help_heading = "Results")]
    pub keep_checkpoints: NoneOr<usize>,
    /// Write a run of Weights & Biases, offline, into ./wandb or the folder that WANDB_DIR names; `wandb sync` sends it
    #[arg(long, help_heading = "Results")]
    pub wandb: bool,
    /// The project of that run
    #[arg(long, value_name = "NAME", default_value = "my-project", help_heading = "Results")]
    pub wandb_project: String,
    /// Let the model write a text every so many iterations, printed and logged; or None
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None", help_heading = "Results")]
    pub sample_freq: NoneOr<usize>,
    /// What these texts go on with. Left out: the beginning of the validation data
    #[arg(long, value_name = "TEXT", help_heading = "Results")]
    pub sample_prompt: Option<String>,
    /// Tokens of these texts
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Results")]
    pub sample_tokens: usize,
    /// Below 1 likely tokens become likelier in these texts; 0 always takes the likeliest
    #[arg(long, value_name = "T", default_value_t = 0.8, help_heading = "Results")]
    pub sample_temperature: f64,
    /// Go on from the newest checkpoint of the experiment that is whole; from the start if there is none
    #[arg(long, help_heading = "Results")]
    pub resume: bool,

    /// The format of the reference's configuration
    #[arg(long, value_enum, default_value_t = ConfigFormat::Rotary, help_heading = "Accepted: they change nothing here")]
    pub config_format: ConfigFormat,
    /// Nothing is ever compiled here
    #[arg(long, help_heading = "Accepted: they change nothing here")]
    pub no_compile: bool,
    /// Caches are made when they are needed here
    #[arg(long, help_heading = "Accepted: they change nothing here")]
    pub postpone_lm_cache: bool,
    /// There is no limit on the number of blocks here
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Accepted: they change nothing here")]
    pub max_groups_for_softmax: usize,

    #[command(flatten)]
    pub refused: Refused,
}

/// Flags of the reference that have no meaning in training here: any value but the default is refused with the reason.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Flags of the reference that are refused, with the reason")]
pub struct Refused {
    /// Several devices: not available yet
    #[arg(long, value_enum, default_value_t = DistributedBackend::None)]
    pub distributed_backend: DistributedBackend,
    /// Accepted with landmark_with_cmt, which always has its context-miss token
    #[arg(long)]
    pub enable_rem_score: bool,
    /// Of inference
    #[arg(long, value_name = "N", value_parser = none_or::<f64>, default_value = "None")]
    pub rem_cutoff: NoneOr<f64>,
    /// Of inference
    #[arg(long)]
    pub use_cache: bool,
    /// Of inference
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None")]
    pub mem_cache_freq: NoneOr<usize>,
    /// Of inference
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cache_topk: usize,
    /// Of inference
    #[arg(long, default_value = "per_token_and_head")]
    pub cache_selection_method: String,
    /// Of inference
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub eval_seq_length: usize,
    /// Of inference
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None")]
    pub eval_sample_size: NoneOr<usize>,
    /// Of inference
    #[arg(long, value_name = "N", default_value_t = 250)]
    pub mid_length: usize,
}
