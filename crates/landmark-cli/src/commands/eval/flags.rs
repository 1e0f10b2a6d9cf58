//! The flags of `landmark eval`: those of the reference's `eval.py`, and ours.

use super::grid::GridName;
use clap::ValueEnum;
use landmark_inference::{CacheFlags, DeviceFlags, NoneOr, none_or};
use std::path::PathBuf;

/// `--split`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Split {
    /// What training evaluates on
    Validation,
    /// What nothing was decided by
    Test,
    /// What the model learned
    Train,
}

impl Split {
    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Validation => "validation",
            Self::Test => "test",
            Self::Train => "train",
        }
    }
}

/// The text.
#[derive(clap::Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Text")]
pub struct TextFlags {
    /// Prepared tokens, as `landmark prepare` made them; a grid takes several, --dataset A --dataset B
    #[arg(long, value_name = "NAME", conflicts_with = "file")]
    pub dataset: Vec<String>,
    /// The folder of prepared data: DIR/NAME, or DIR itself
    #[arg(long, value_name = "DIR", default_value = "./data")]
    pub data_dir: PathBuf,
    /// The part of it
    #[arg(long, value_enum, default_value_t = Split::Validation, hide_possible_values = true, value_name = "validation|test|train")]
    pub split: Split,
    /// A plain text instead; - is standard input
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Tokens of a sequence; each is read with nothing remembered of those before it. Left out: what the window holds; with a
    /// cache four windows; of a --file all of it
    #[arg(long, value_name = "N")]
    pub eval_seq_length: Option<usize>,
    /// Evaluate sequences drawn at random that have so many tokens together, or None: all. The rows of a grid read the same
    /// passages, of 4096 tokens
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None")]
    pub eval_sample_size: NoneOr<usize>,
    /// Decides which sequences are drawn
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub seed: u64,
}

/// Where the results go.
#[derive(clap::Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Results")]
pub struct ResultFlags {
    /// Write all figures here: settings, means, loss by position, retrieved blocks by distance, speed, memory
    #[arg(long, value_name = "FILE", conflicts_with = "grid")]
    pub json: Option<PathBuf>,
    /// Write settings and means here, a line under a header
    #[arg(long, value_name = "FILE", conflicts_with = "grid")]
    pub csv: Option<PathBuf>,
    /// Draw perplexity by position, as SVG
    #[arg(long, value_name = "FILE", conflicts_with = "grid")]
    pub plot: Option<PathBuf>,
    /// Draw how far the blocks are that were read, as SVG
    #[arg(long, value_name = "FILE", conflicts_with = "grid")]
    pub plot_distances: Option<PathBuf>,
    /// Bins of the loss by position
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub bins: usize,
}

/// The grids.
#[derive(clap::Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "The paper's tables")]
pub struct GridFlags {
    /// Evaluate all settings of a table of the paper instead of one
    #[arg(long, value_enum, conflicts_with_all = ["file", "eval_seq_length", "use_cache", "lm_cache", "cache_topk",
        "cache_selection_method", "mid_length", "mem_cache_size", "mem_cache_freq", "rem_cutoff", "checkpoint"])]
    pub grid: Option<GridName>,
    /// The model of the rows without any cache (base_rotary)
    #[arg(long, value_name = "DIR")]
    pub dense_checkpoint: Option<PathBuf>,
    /// The model of the rows with Transformer-XL's cache (base_rotary, trained with --optimization_process transformer_xl)
    #[arg(long, value_name = "DIR")]
    pub xl_checkpoint: Option<PathBuf>,
    /// The model of the rows with landmarks
    #[arg(long, value_name = "DIR")]
    pub landmark_checkpoint: Option<PathBuf>,
    /// The grid's folder: GRID.md, GRID.csv, plots, and cells/ with every figure of what is finished, from which an interrupted
    /// grid goes on; the tables may share it. Left out: ./exps/eval
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Flags of `landmark eval`.
#[derive(clap::Args, Clone, Debug)]
#[command(rename_all = "snake_case", after_help = super::EXAMPLES)]
pub struct Args {
    /// The model: a checkpoint's folder, or an experiment's, of which the newest checkpoint is taken
    #[arg(long, value_name = "DIR", required_unless_present = "grid", help_heading = "Model")]
    pub checkpoint: Option<PathBuf>,
    /// The folder of an adapter that was trained beside that model (`landmark finetune --lora_r`)
    #[arg(long, value_name = "DIR", conflicts_with = "grid", help_heading = "Model")]
    pub adapter: Option<PathBuf>,
    /// gpt2, bytes, or the path of a tokenizer.json, for a model without a tokenizer.json
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    pub tokenizer: Option<String>,
    #[command(flatten)]
    pub device: DeviceFlags,
    #[command(flatten)]
    pub text: TextFlags,
    /// Read through the model's cache; --lm_cache mem or kv does so too. Otherwise each --mid_length tokens are read by themselves
    #[arg(long, help_heading = "Reading")]
    pub use_cache: bool,
    /// Sequences that are read side by side; changes speed and memory, not the results
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Reading")]
    pub batch_size: usize,
    #[command(flatten)]
    pub cache: CacheFlags,
    #[command(flatten)]
    pub results: ResultFlags,
    #[command(flatten)]
    pub grid: GridFlags,
    #[command(flatten)]
    pub accepted: Accepted,
}

/// Flags that the reference's command lines have: any other value is refused.
#[derive(clap::Args, Clone, Debug)]
#[command(
    rename_all = "snake_case",
    next_help_heading = "Accepted, as the reference's commands have them: they change nothing"
)]
pub struct Accepted {
    /// The data have no landmarks: reading puts them in, see --mem_cache_freq
    #[arg(long, value_name = "None")]
    pub mem_freq: Option<String>,
    /// One process
    #[arg(long, value_name = "None")]
    pub distributed_backend: Option<String>,
    /// Positions do not jump in evaluation
    #[arg(long, value_name = "rotary")]
    pub positional_encoder: Option<String>,
    /// Positions do not jump in evaluation
    #[arg(long, value_name = "0")]
    pub pos_jump_on_mem: Option<String>,
    /// The format of the reference's configuration
    #[arg(long, value_name = "rotary")]
    pub config_format: Option<String>,
    /// Nothing is ever compiled here
    #[arg(long)]
    pub no_compile: bool,
}

impl GridFlags {
    /// Refuses flags of a grid where there is none. (clap drops its `requires` where what is required conflicts.)
    pub fn check(&self) -> anyhow::Result<()> {
        let flags = [
            ("dense_checkpoint", &self.dense_checkpoint),
            ("xl_checkpoint", &self.xl_checkpoint),
            ("landmark_checkpoint", &self.landmark_checkpoint),
            ("out", &self.out),
        ];
        match flags.into_iter().find(|(_, given)| self.grid.is_none() && given.is_some()) {
            Some((flag, _)) => anyhow::bail!("--{flag} is refused: it belongs to --grid"),
            None => Ok(()),
        }
    }
}

impl Accepted {
    /// Refuses values that would have to change something.
    pub fn check(&self) -> anyhow::Result<()> {
        let flags = [
            ("mem_freq", &self.mem_freq, "None"),
            ("distributed_backend", &self.distributed_backend, "None"),
            ("positional_encoder", &self.positional_encoder, "rotary"),
            ("pos_jump_on_mem", &self.pos_jump_on_mem, "0"),
            ("config_format", &self.config_format, "rotary"),
        ];
        for (flag, given, only) in flags {
            if let Some(given) = given
                && given != only
            {
                anyhow::bail!("--{flag} {given} is refused: evaluation knows only {only}");
            }
        }
        Ok(())
    }
}
