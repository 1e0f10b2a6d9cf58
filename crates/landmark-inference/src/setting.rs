//! How a model reads texts of a measurement: the flags, resolved for that model.

use crate::{CacheFlags, LmCache, Memory, SelectionMethod, fitting};
use anyhow::bail;
use landmark_data::Tokenizer;
use landmark_models::{Attention, Model};
use serde::{Deserialize, Serialize};

/// All that decides how a sequence is read, with no default left open.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Tokens of a sequence.
    pub eval_seq_length: usize,
    /// Tokens that are read at once.
    pub mid_length: usize,
    /// `none`: each `mid_length` tokens by themselves.
    pub lm_cache: String,
    /// Blocks, or tokens with kv, that are kept; `None`: all, or with none nothing.
    pub mem_cache_size: Option<usize>,
    /// Ordinary tokens of a block.
    pub mem_cache_freq: Option<usize>,
    /// Blocks that a token reads.
    pub cache_topk: Option<usize>,
    /// Who shares them.
    pub cache_selection_method: Option<String>,
    /// Weight on the context-miss token under which nothing is retrieved.
    pub rem_cutoff: Option<f64>,
}

/// A setting, and the flags that make a [`Memory`] of it.
#[derive(Clone, Debug)]
pub struct Reading {
    /// What it comes to.
    pub setting: Setting,
    /// What makes the memory.
    pub flags: CacheFlags,
    /// Finds the borders of a text, for a model with landmarks at them.
    pub tokenizer: Option<Tokenizer>,
}

impl Reading {
    /// Resolves the flags for a model, and refuses what the model cannot do. `whole` is the length of the text if it is to be one
    /// sequence unless `eval_seq_length` says otherwise.
    pub fn resolve(
        flags: &CacheFlags,
        use_cache: bool,
        eval_seq_length: Option<usize>,
        whole: Option<usize>,
        model: &Model,
        tokenizer: Option<&Tokenizer>,
    ) -> anyhow::Result<Self> {
        let outline = model.outline();
        let window = outline.window;
        if eval_seq_length == Some(0) {
            bail!("--eval_seq_length 0: expected at least 1");
        }
        let mut flags = flags.clone();
        let kind = match (flags.lm_cache, use_cache) {
            (Some(kind), _) => kind,
            (None, false) => LmCache::None,
            (None, true) if outline.attention == Attention::Dense => LmCache::Kv,
            (None, true) if outline.attention == Attention::Landmarks => LmCache::Mem,
            (None, true) => bail!("--use_cache is refused: the model's softmax_func ignores landmarks' blocks"),
        };
        flags.lm_cache = Some(kind);
        // The reference's commands give it with every model.
        if kind != LmCache::Mem && flags.cache_selection_method == Some(SelectionMethod::PerTokenAndHead) {
            flags.cache_selection_method = None;
        }
        let fits = fitting(window, &outline);
        let usual = if kind == LmCache::None { fits } else { 4 * window };
        let eval_seq_length = eval_seq_length.or(whole).unwrap_or(usual);
        if kind == LmCache::None && flags.mid_length.is_none() {
            flags.mid_length = Some(fits.min(eval_seq_length));
        }
        let (_, mid_length) = Memory::new(&flags, model, tokenizer, 1)?;
        let mut setting = Setting {
            eval_seq_length,
            mid_length,
            lm_cache: kind.name().into(),
            mem_cache_size: flags.mem_cache_size,
            mem_cache_freq: None,
            cache_topk: None,
            cache_selection_method: None,
            rem_cutoff: None,
        };
        match kind {
            LmCache::Mem => {
                let mem_freq = flags.mem_cache_freq.or(outline.mem_freq);
                setting.mem_cache_freq = mem_freq;
                setting.cache_topk = mem_freq.map(|mem_freq| flags.top_k(window, mem_freq + 1));
                let method = flags.cache_selection_method.unwrap_or(SelectionMethod::PerTokenAndHead);
                setting.cache_selection_method = Some(method.name().into());
                setting.rem_cutoff = flags.rem_cutoff.or(outline.rem_cutoff);
            }
            LmCache::Kv => setting.mem_cache_size = Some(flags.mem_cache_size.unwrap_or(window / 2)),
            LmCache::None | LmCache::KvTrain => {}
        }
        Ok(Self { setting, flags, tokenizer: tokenizer.cloned() })
    }
}

impl Setting {
    /// In words.
    pub fn words(&self) -> String {
        let chunks = format!("chunks of {}", self.mid_length);
        match self.lm_cache.as_str() {
            "mem" => {
                let kept = self.mem_cache_size.map_or("all blocks".into(), |size| format!("the last {size} blocks"));
                format!(
                    "{chunks}, each token reads {} of {kept} of {} ({})",
                    self.cache_topk.unwrap_or(0),
                    self.mem_cache_freq.unwrap_or(0),
                    self.cache_selection_method.as_deref().unwrap_or_default()
                )
            }
            "kv" => format!("{chunks} with the {} tokens before", self.mem_cache_size.unwrap_or(0)),
            _ if self.mid_length >= self.eval_seq_length => "at once, in the window".into(),
            _ => format!("{chunks}, each by itself"),
        }
    }
}
