//! The flags of commands that read with a model, and what they come to for a given model.

use crate::{DeviceChoice, NoneOr, none_or};
use anyhow::bail;
use clap::{Args, ValueEnum};
use landmark_memory::Selection;
use landmark_models::{Attention, Outline};
use std::path::PathBuf;

/// `--lm_cache`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LmCache {
    /// No cache: every token sees the window before it, which is computed anew (in eval each chunk by itself)
    #[value(name = "none")]
    None,
    /// The landmark cache
    #[value(name = "mem")]
    Mem,
    /// Transformer-XL's: the last tokens
    #[value(name = "kv")]
    Kv,
    /// Of Transformer-XL training; refused here
    #[value(name = "kv_train")]
    KvTrain,
}

/// `--cache_selection_method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SelectionMethod {
    /// Each token and head has blocks of its own
    #[value(name = "per_token_and_head")]
    PerTokenAndHead,
    /// The heads of a token share theirs
    #[value(name = "max_over_heads")]
    MaxOverHeads,
    /// The tokens of a chunk share theirs, per head
    #[value(name = "max_over_tokens")]
    MaxOverTokens,
}

/// Which model.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Model")]
pub struct ModelFlags {
    /// The model: a checkpoint's folder, an experiment's, of which the newest checkpoint is taken, a Hugging Face folder, a GGUF file, or
    /// the name of a model in the Hugging Face cache
    #[arg(long, value_name = "MODEL", visible_alias = "model_name_or_path")]
    pub checkpoint: PathBuf,
    /// The folder of an adapter that was trained beside that model (`landmark finetune --lora_r`)
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// gpt2, bytes, or the path of a tokenizer.json, for a model without a tokenizer.json
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<String>,
    /// Where to compute.
    #[command(flatten)]
    pub device: DeviceFlags,
}

/// What a model reads with.
#[derive(Args, Clone, Copy, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Model")]
pub struct DeviceFlags {
    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Of activations, and so of the blocks that are kept. Left out: bfloat16 on a GPU; the CPU computes in float32 alone
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
}

impl DeviceFlags {
    /// The processor.
    pub const CPU: Self = Self { device: DeviceChoice::Cpu, dtype: None };
}

/// `--dtype` of commands that read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// 32 bits
    #[value(name = "float32", alias = "torch.float32")]
    Float32,
    /// 16 bits
    #[value(name = "bfloat16", alias = "torch.bfloat16")]
    BFloat16,
}

/// How the model reads what is longer than its window.
#[derive(Args, Clone, Debug, Default)]
#[command(rename_all = "snake_case", next_help_heading = "Reading")]
pub struct CacheFlags {
    /// What is remembered of earlier text. Left out: mem for a landmark model, kv for base_rotary (in eval with --use_cache only)
    #[arg(long, value_enum)]
    pub lm_cache: Option<LmCache>,
    /// Blocks that each token reads; 0: none, only its chunk. Left out: at most 4, in at most half of the window
    #[arg(long, value_name = "N")]
    pub cache_topk: Option<usize>,
    /// Blocks that are kept (with kv: tokens), the oldest go first; or None: all (with kv: half a window)
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None")]
    pub mem_cache_size: NoneOr<usize>,
    /// Who shares the blocks that are read. Left out: per_token_and_head
    #[arg(long, value_enum)]
    pub cache_selection_method: Option<SelectionMethod>,
    /// Tokens that are read at once. Left out: as many as the window holds beside what is remembered
    #[arg(long, value_name = "N")]
    pub mid_length: Option<usize>,
    /// Tokens of a block. Left out: as the model was trained
    #[arg(long, value_name = "N", value_parser = none_or::<usize>, default_value = "None")]
    pub mem_cache_freq: NoneOr<usize>,
    /// With landmark_with_cmt: a token whose weight on the context-miss token is below this reads no blocks
    #[arg(long, value_name = "N", value_parser = none_or::<f64>, default_value = "None")]
    pub rem_cutoff: NoneOr<f64>,
}

impl CacheFlags {
    /// Which cache, for this model; refuses flags that it has no use for.
    pub fn kind(&self, model: &Outline) -> anyhow::Result<LmCache> {
        let (is_base, is_ablation) = (model.attention == Attention::Dense, model.attention == Attention::Ablation);
        let kind = self.lm_cache.unwrap_or(match (is_base, is_ablation) {
            (true, _) => LmCache::Kv,
            (_, true) => LmCache::None,
            _ => LmCache::Mem,
        });
        match kind {
            LmCache::KvTrain => bail!("--lm_cache kv_train is refused: it belongs to Transformer-XL training; use kv"),
            LmCache::Mem if is_base => {
                bail!("--lm_cache mem is refused: the model has no landmarks; use kv or none")
            }
            LmCache::Mem if is_ablation => {
                bail!("--lm_cache mem is refused: the model's softmax_func ignores landmarks' blocks; use none")
            }
            LmCache::Kv if !is_base => {
                bail!(
                    "--lm_cache kv is refused: it is for models without landmarks, and this one has some; use mem or none"
                )
            }
            _ => {}
        }
        let blocks = [
            ("cache_topk", self.cache_topk.is_some()),
            ("cache_selection_method", self.cache_selection_method.is_some()),
            ("mem_cache_freq", self.mem_cache_freq.is_some()),
        ];
        if let Some((flag, _)) = blocks.into_iter().find(|(_, given)| *given && kind != LmCache::Mem) {
            bail!("--{flag} is refused: it belongs to --lm_cache mem, and the model reads with {}", kind.name());
        }
        if self.mem_cache_size.is_some() && kind == LmCache::None {
            bail!("--mem_cache_size is refused: with --lm_cache none nothing is kept");
        }
        if self.rem_cutoff.is_some() && (!model.has_miss_token || kind != LmCache::Mem) {
            bail!(
                "--rem_cutoff is refused: only a landmark_with_cmt model that reads with --lm_cache mem has a use for it"
            );
        }
        if self.rem_cutoff.is_some_and(|cutoff| !(0. ..=1.).contains(&cutoff)) {
            bail!("--rem_cutoff: expected a weight from 0 to 1");
        }
        Ok(kind)
    }

    /// The selection.
    pub fn selection(&self) -> Selection {
        match self.cache_selection_method {
            None | Some(SelectionMethod::PerTokenAndHead) => Selection::PerTokenAndHead,
            Some(SelectionMethod::MaxOverHeads) => Selection::MaxOverHeads,
            Some(SelectionMethod::MaxOverTokens) => Selection::MaxOverTokens,
        }
    }

    /// Blocks that a token reads. Left out, they and the unfinished one take at most half of the window.
    pub fn top_k(&self, window: usize, block: usize) -> usize {
        self.cache_topk.unwrap_or_else(|| (window / 2 / block).saturating_sub(1).clamp(1, 4))
    }

    /// `--mid_length`, or the most that is possible.
    pub fn chunk(&self, usual: usize, most: usize) -> anyhow::Result<usize> {
        match self.mid_length {
            None => Ok(usual),
            Some(chunk) if (1..=most).contains(&chunk) => Ok(chunk),
            Some(chunk) => {
                bail!(
                    "--mid_length {chunk}: expected 1 to {most}, which the model's window holds beside what it remembers"
                )
            }
        }
    }
}

impl SelectionMethod {
    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerTokenAndHead => "per_token_and_head",
            Self::MaxOverHeads => "max_over_heads",
            Self::MaxOverTokens => "max_over_tokens",
        }
    }
}

impl LmCache {
    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mem => "mem",
            Self::Kv => "kv",
            Self::KvTrain => "kv_train",
        }
    }
}
