//! A model that reads a text of any length, and goes on with it.

mod flags;
mod memory;
mod setting;

use crate::sampling::Sampler;
use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
pub use flags::{CacheFlags, DeviceFlags, Dtype, LmCache, ModelFlags, SelectionMethod};
use landmark_data::{TOKENIZER_FILE, Tokenizer};
use landmark_memory::{BlockRead, LandmarkCache};
use landmark_models::IGNORE;
use landmark_models::gpt::Gpt;
use landmark_train::checkpoint::EXPERIMENT;
pub use memory::{Memory, fitting};
pub use setting::{Reading, Setting};
use std::path::{Path, PathBuf};

/// A model, its tokenizer, and what it remembers of the text that it has read.
pub struct Reader {
    model: Gpt,
    tokenizer: Tokenizer,
    memory: Memory,
    chunk: usize,
    /// The last hidden state `[1, 1, C]`: of it comes the next token.
    last: Option<Tensor>,
    last_token: Option<u32>,
}

impl Reader {
    /// Opens the model that the flags name.
    pub fn open(model: &ModelFlags, cache: &CacheFlags) -> anyhow::Result<Self> {
        let folder = checkpoint(&model.checkpoint)?;
        Self::new(load(&folder, model.device)?, tokenizer(&folder, model.tokenizer.as_deref())?, cache)
    }

    /// Reads with a model at hand.
    pub fn new(model: Gpt, tokenizer: Tokenizer, cache: &CacheFlags) -> anyhow::Result<Self> {
        check_vocabulary(&model, &tokenizer)?;
        let (memory, chunk) = Memory::new(cache, &model, Some(&tokenizer), 1)?;
        Ok(Self { model, tokenizer, memory, chunk, last: None, last_token: None })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tokens that are read at once. To read a text in other portions changes a little what is retrieved.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Whether the model reads through the landmark cache.
    pub fn has_blocks(&self) -> bool {
        self.memory.caches().next().is_some()
    }

    /// Blocks that each token reads, if the model reads through the landmark cache.
    pub fn top_k(&self) -> Option<usize> {
        self.memory.caches().next().map(LandmarkCache::top_k)
    }

    /// Finished blocks of the text.
    pub fn blocks(&self) -> usize {
        self.memory.caches().map(LandmarkCache::finished_blocks).sum()
    }

    /// Bytes that are set aside for blocks.
    pub fn cache_bytes(&self) -> usize {
        self.memory.caches().map(LandmarkCache::bytes).sum()
    }

    /// Sets memory aside for a text of so many tokens.
    pub fn reserve(&mut self, tokens: usize) -> anyhow::Result<()> {
        self.memory.reserve(tokens)
    }

    /// Reads the text's next tokens, chunk by chunk; `progress` is told how many are read and says whether to go on.
    pub fn read(&mut self, tokens: &[u32], mut progress: impl FnMut(usize) -> bool) -> anyhow::Result<()> {
        let mut done = 0;
        for chunk in tokens.chunks(self.chunk) {
            self.advance(chunk)?;
            done += chunk.len();
            if !progress(done) {
                break;
            }
        }
        Ok(())
    }

    /// As [`Self::read`], and gives the loss of each token that has one: not the first of a text, nor what follows an end of text.
    pub fn read_with_losses(
        &mut self,
        tokens: &[u32],
        mut progress: impl FnMut(usize, &[f64]) -> bool,
    ) -> anyhow::Result<Vec<f64>> {
        let mut losses = Vec::with_capacity(tokens.len());
        for chunk in tokens.chunks(self.chunk) {
            let (last, mut before) = (self.last.clone(), self.last_token);
            let hidden = self.advance(chunk)?;
            let others = hidden.narrow(1, 0, chunk.len() - 1)?;
            // Each token is predicted by the hidden state before it.
            let (states, targets) = match &last {
                Some(last) => (Tensor::cat(&[last, &others], 1)?, chunk),
                None => {
                    before = chunk.first().copied();
                    (others, &chunk[1..])
                }
            };
            let end_of_text = self.tokenizer.end_of_text();
            let scored = |&token: &u32| {
                let follows_end = before.is_some() && before == end_of_text;
                before = Some(token);
                if follows_end { IGNORE } else { token }
            };
            let targets: Vec<u32> = targets.iter().map(scored).collect();
            if !targets.is_empty() {
                let targets = Tensor::new(targets, &Device::Cpu)?.unsqueeze(0)?;
                let scores = self.model.token_scores(&states.contiguous()?, &targets)?;
                losses.extend(scores.into_iter().flatten().map(|score| score.loss));
            }
            if !progress(losses.len(), &losses) {
                break;
            }
        }
        Ok(losses)
    }

    /// Goes on with the text by at most `max_tokens` tokens, up to the end of text (which is left out). `show` is given each token
    /// when it is drawn and says whether to go on. Landmarks and ids that the tokenizer does not know are never drawn.
    pub fn generate(
        &mut self,
        max_tokens: usize,
        sampler: &mut Sampler,
        mut show: impl FnMut(u32) -> anyhow::Result<bool>,
    ) -> anyhow::Result<usize> {
        let allowed = drawable(&self.model, &self.tokenizer);
        for count in 0..max_tokens {
            let Some(last) = &self.last else { bail!("there is no text to go on with") };
            let logits = self.model.logits(last)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let token = sampler.sample(&logits, &allowed)?;
            if Some(token) == self.tokenizer.end_of_text() {
                return Ok(count);
            }
            // Read before it is shown: what it read itself counts too.
            self.advance(&[token])?;
            if !show(token)? {
                return Ok(count + 1);
            }
        }
        Ok(max_tokens)
    }

    /// From here on, which blocks are read is noted.
    pub fn trace_reads(&mut self) {
        self.memory.caches_mut().for_each(LandmarkCache::trace_reads);
    }

    /// The blocks that were read since [`Self::trace_reads`], the most read first.
    pub fn reads(&self) -> Vec<BlockRead> {
        self.memory.caches().next().map_or(Vec::new(), |cache| cache.reads(0))
    }

    /// Reads one chunk.
    fn advance(&mut self, chunk: &[u32]) -> anyhow::Result<Tensor> {
        let hidden = self.memory.forward(&self.model, &[chunk])?;
        // A copy: a part would keep the whole chunk in memory.
        self.last = Some(hidden.narrow(1, chunk.len() - 1, 1)?.force_contiguous()?);
        self.last_token = chunk.last().copied();
        Ok(hidden)
    }
}

/// Refuses a tokenizer that cannot be the model's.
pub fn check_vocabulary(model: &Gpt, tokenizer: &Tokenizer) -> anyhow::Result<()> {
    let (own, models) = (tokenizer.vocab_size(), model.config().vocab_size);
    if own > models {
        bail!("the tokenizer has {own} tokens and the model {models}: it is another model's");
    }
    Ok(())
}

/// Whether a token may be drawn: landmarks and ids that the tokenizer does not know never are.
pub fn drawable(model: &Gpt, tokenizer: &Tokenizer) -> impl Fn(u32) -> bool + use<> {
    let known = tokenizer.vocab_size();
    let landmarks = [tokenizer.landmark_id(), Some(model.config().landmark_id)];
    move |id| (id as usize) < known && !landmarks.contains(&Some(id))
}

/// The model in a folder, for reading.
pub fn load(folder: &Path, flags: DeviceFlags) -> anyhow::Result<Gpt> {
    let device = flags.device.open()?;
    let loaded = Gpt::load(folder, &device);
    let model = loaded.with_context(|| format!("--checkpoint {}", folder.display()))?.detached();
    let activations = match flags.dtype {
        Some(Dtype::BFloat16) if device.is_cpu() => {
            bail!("--dtype bfloat16 is refused: on the CPU models compute in float32")
        }
        None | Some(Dtype::Float32) if device.is_cpu() => model.dtype(),
        Some(Dtype::Float32) => DType::F32,
        None | Some(Dtype::BFloat16) => DType::BF16,
    };
    Ok(model.with_activations(activations)?)
}

/// The folder of the model itself: an experiment's newest checkpoint if it is an experiment.
pub fn checkpoint(folder: &Path) -> anyhow::Result<PathBuf> {
    if !folder.is_dir() {
        bail!("--checkpoint {}: no such folder; expected one that landmark train wrote", folder.display());
    }
    if folder.join("config.json").exists() {
        return Ok(folder.to_path_buf());
    }
    let newest = EXPERIMENT.iterations(folder)?.pop();
    let newest = newest.map(|iteration| EXPERIMENT.path(folder, iteration));
    newest.with_context(|| {
        format!("--checkpoint {}: no model in it: neither a config.json nor a folder ckpt_N", folder.display())
    })
}

/// The tokenizer of the model in a folder, or the given one.
pub fn tokenizer(folder: &Path, given: Option<&str>) -> anyhow::Result<Tokenizer> {
    let own = folder.join(TOKENIZER_FILE);
    match given {
        Some(name) => Tokenizer::named(name).context("--tokenizer"),
        None if !own.exists() => {
            bail!("--checkpoint {}: no {TOKENIZER_FILE} in it; name one with --tokenizer FILE", folder.display())
        }
        None => Ok(Tokenizer::from_file(own)?),
    }
}
