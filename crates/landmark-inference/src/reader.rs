//! A model that reads a text of any length, and goes on with it.

use crate::{CacheFlags, DeviceFlags, Dtype, Memory, ModelFlags, Sampler, machine, memory};
use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
use landmark_data::{Pretrained, Sampling, TOKENIZER_FILE, Tokenizer};
use landmark_memory::{BlockRead, LandmarkCache};
use landmark_models::gpt::Gpt;
use landmark_models::llama::{Gguf, LandmarkConfig, Llama, LlamaConfig};
use landmark_models::{IGNORE, Model, hub};
use landmark_train::checkpoint::EXPERIMENT;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model that was opened, and where it came from.
pub struct Opened {
    /// The model.
    pub model: Arc<Model>,
    /// Its tokenizer, and the conventions that it comes with.
    pub pretrained: Pretrained,
    /// Where the model is.
    pub path: PathBuf,
    /// Where its adapter is.
    pub adapter: Option<PathBuf>,
    /// What `--tokenizer` named.
    pub tokenizer: Option<String>,
}

impl Opened {
    /// Opens the model that the flags name.
    pub fn open(flags: &ModelFlags) -> anyhow::Result<Self> {
        let ModelFlags { checkpoint: named, adapter, tokenizer, device } = flags;
        let path = checkpoint(named)?;
        let (model, pretrained) = load_with_tokenizer(&path, adapter.as_deref(), tokenizer.as_deref(), *device)?;
        let model = Arc::new(model);
        check_vocabulary(model.outline().vocab_size, &pretrained.tokenizer)?;
        Ok(Self { model, pretrained, path, adapter: adapter.clone(), tokenizer: tokenizer.clone() })
    }
}

/// A place in a text that was read, to go back to.
pub struct Mark {
    memory: memory::Mark,
    last: Option<Tensor>,
    last_token: Option<u32>,
}

/// A model, its tokenizer, and what it remembers of the text that it has read.
pub struct Reader {
    pub(crate) model: Arc<Model>,
    pub(crate) tokenizer: Tokenizer,
    /// The tokens that begin a text.
    pub(crate) begin: Vec<u32>,
    /// Those that end one.
    pub(crate) end: Vec<u32>,
    pub(crate) sampling: Sampling,
    pub(crate) memory: Memory,
    pub(crate) chunk: usize,
    /// The last hidden state `[1, 1, C]`: of it comes the next token.
    pub(crate) last: Option<Tensor>,
    pub(crate) last_token: Option<u32>,
}

impl Reader {
    /// Opens the model that the flags name.
    pub fn open(model: &ModelFlags, cache: &CacheFlags) -> anyhow::Result<Self> {
        let Opened { model, pretrained, .. } = Opened::open(model)?;
        Self::of_pretrained(model, &pretrained, cache)
    }

    /// Reads with a model at hand, by the conventions of its tokenizer.
    pub fn of_pretrained(
        model: impl Into<Arc<Model>>,
        pretrained: &Pretrained,
        cache: &CacheFlags,
    ) -> anyhow::Result<Self> {
        let reader = Self::new(model, pretrained.tokenizer.clone(), cache)?;
        let Pretrained { begin, end, sampling, .. } = pretrained.clone();
        Ok(Self { begin, end, sampling, ..reader })
    }

    /// Reads with a model at hand.
    pub fn new(model: impl Into<Arc<Model>>, tokenizer: Tokenizer, cache: &CacheFlags) -> anyhow::Result<Self> {
        let model = model.into();
        check_vocabulary(model.outline().vocab_size, &tokenizer)?;
        let (memory, chunk) = Memory::new(cache, &model, Some(&tokenizer), 1)?;
        let end = tokenizer.end_of_text().into_iter().collect();
        let (begin, sampling) = (Vec::new(), Sampling::default());
        Ok(Self { model, tokenizer, begin, end, sampling, memory, chunk, last: None, last_token: None })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokens that begin a text, of models that were trained with some.
    pub fn begin(&self) -> &[u32] {
        &self.begin
    }

    /// How the model's makers draw tokens.
    pub fn sampling(&self) -> Sampling {
        self.sampling
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

    /// Those of them that are in a session's pool on the GPU.
    pub fn pool_bytes(&self) -> usize {
        self.memory.caches().map(LandmarkCache::pool_bytes).sum()
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

    /// Reads the next token of several texts by one model, in one pass of it, and gives for each the logits `[V]` of what comes then. As one text after the
    /// other, but for the last bits: products of other sizes add in another order.
    pub fn read_together(texts: &mut [(&mut Self, u32)]) -> anyhow::Result<Vec<Vec<f32>>> {
        let Some(model) = texts.first().map(|(reader, _)| reader.model.clone()) else { return Ok(Vec::new()) };
        if texts.iter().any(|(reader, _)| !Arc::ptr_eq(&reader.model, &model)) {
            bail!("texts of several models are not read together");
        }
        let tokens: Vec<[u32; 1]> = texts.iter().map(|(_, token)| [*token]).collect();
        let memories = texts.iter_mut().map(|(reader, _)| &mut reader.memory);
        let mut memories: Vec<_> = memories.zip(tokens.iter().map(|token| &token[..])).collect();
        let hidden = Memory::forward_together(&model, &mut memories)?;
        for ((reader, token), hidden) in texts.iter_mut().zip(&hidden) {
            (reader.last, reader.last_token) = (Some(hidden.force_contiguous()?), Some(*token));
        }
        Ok(model.logits(&Tensor::cat(&hidden, 1)?)?.to_dtype(DType::F32)?.squeeze(0)?.to_vec2::<f32>()?)
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

    /// Goes on with the text by at most `max_tokens` tokens, up to an end of text (which is left out). `show` is given each token
    /// when it is drawn and says whether to go on. Landmarks and ids that the tokenizer does not know are never drawn.
    pub fn generate(
        &mut self,
        max_tokens: usize,
        sampler: &mut Sampler,
        mut show: impl FnMut(u32) -> anyhow::Result<bool>,
    ) -> anyhow::Result<usize> {
        let allowed = self.drawable();
        for count in 0..max_tokens {
            let token = sampler.sample(&self.logits()?, &allowed)?;
            if self.is_end(token) {
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

    /// The logits of the token that comes next, `[V]`.
    pub fn logits(&self) -> anyhow::Result<Vec<f32>> {
        let Some(last) = &self.last else { bail!("there is no text to go on with") };
        Ok(self.model.logits(last)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
    }

    /// Whether a token ends a text.
    pub fn is_end(&self, token: u32) -> bool {
        self.end.contains(&token)
    }

    /// Which tokens may be drawn; see [`drawable`].
    pub fn drawable(&self) -> impl Fn(u32) -> bool + use<> {
        drawable(&self.model, &self.tokenizer)
    }

    /// Reads the text's next tokens, at most a chunk of them, and gives for each the logits `[V]` that it was predicted by: none for the first
    /// of a text.
    pub fn read_with_logits(&mut self, chunk: &[u32]) -> anyhow::Result<Vec<Option<Vec<f32>>>> {
        let first = if self.last.is_some() { Some(self.logits()?) } else { None };
        let hidden = self.advance(chunk)?;
        let mut logits = vec![first];
        if chunk.len() > 1 {
            let states = hidden.narrow(1, 0, chunk.len() - 1)?.contiguous()?;
            let rows = self.model.logits(&states)?.to_dtype(DType::F32)?.squeeze(0)?.to_vec2::<f32>()?;
            logits.extend(rows.into_iter().map(Some));
        }
        Ok(logits)
    }

    /// This place in the text, to go back to; none if it is kept on disk, or not by blocks.
    pub fn mark(&self) -> anyhow::Result<Option<Mark>> {
        let Some(memory) = self.memory.mark()? else { return Ok(None) };
        Ok(Some(Mark { memory, last: self.last.clone(), last_token: self.last_token }))
    }

    /// Goes back to a place in this text: what came after it is forgotten, and what was noted of reads.
    pub fn rewind(&mut self, mark: &Mark) -> anyhow::Result<()> {
        self.memory.rewind(&mark.memory)?;
        (self.last, self.last_token) = (mark.last.clone(), mark.last_token);
        Ok(())
    }

    /// Forgets the text.
    pub fn clear(&mut self) {
        self.memory.clear();
        (self.last, self.last_token) = (None, None);
    }

    /// From here on, which blocks are read is noted.
    pub fn trace_reads(&mut self) {
        self.memory.caches_mut().for_each(LandmarkCache::trace_reads);
    }

    /// The blocks that were read since [`Self::trace_reads`], the most read first.
    pub fn reads(&self) -> Vec<BlockRead> {
        self.memory.caches().next().map_or(Vec::new(), |cache| cache.reads(0))
    }

    /// Reads one chunk: its hidden states `[1, n, C]`.
    fn advance(&mut self, chunk: &[u32]) -> anyhow::Result<Tensor> {
        let hidden = self.memory.forward(&self.model, &[chunk])?;
        // A copy: a part would keep the whole chunk in memory.
        self.last = Some(hidden.narrow(1, chunk.len() - 1, 1)?.force_contiguous()?);
        self.last_token = chunk.last().copied();
        Ok(hidden)
    }
}

/// Refuses a tokenizer that cannot be that of a model with a vocabulary of so many.
pub fn check_vocabulary(models: usize, tokenizer: &Tokenizer) -> anyhow::Result<()> {
    let own = tokenizer.vocab_size();
    if own > models {
        bail!("the tokenizer has {own} tokens and the model {models}: it is another model's");
    }
    Ok(())
}

/// Whether a token may be drawn: landmarks and ids that the tokenizer does not know never are.
pub fn drawable(model: &Model, tokenizer: &Tokenizer) -> impl Fn(u32) -> bool + use<> {
    let known = tokenizer.vocab_size();
    let landmarks = [tokenizer.landmark_id(), model.outline().landmark_id];
    move |id| (id as usize) < known && !landmarks.contains(&Some(id))
}

/// The model in a folder or a file, for reading, with the adapter in a folder.
pub fn load(path: &Path, adapter: Option<&Path>, flags: DeviceFlags) -> anyhow::Result<Model> {
    machine::compute_on_this_thread();
    let device = flags.device.open()?;
    let activations = match flags.dtype {
        Some(Dtype::BFloat16) if device.is_cpu() => {
            bail!("--dtype bfloat16 is refused: on the CPU models compute in float32")
        }
        None | Some(Dtype::Float32) if device.is_cpu() => None,
        Some(Dtype::Float32) => Some(DType::F32),
        None | Some(Dtype::BFloat16) => Some(DType::BF16),
    };
    let model = match (path.is_file(), is_llama(path)) {
        (true, _) => Gguf::open(path).and_then(|gguf| gguf.load(&device)).map(Model::Llama),
        // The weights are of the type that they meet.
        (_, true) => Llama::load_frozen(path, activations.unwrap_or(DType::F32), &device).map(Model::Llama),
        _ => Gpt::load(path, &device).map(|gpt| Model::Gpt(gpt.detached())),
    };
    let model = model.with_context(|| format!("--checkpoint {}", path.display()))?;
    let model = match (model, adapter) {
        (model, None) => model,
        (Model::Llama(llama), Some(adapter)) => Model::Llama(adapted(llama, adapter)?.for_reading()?),
        (Model::Gpt(_), Some(_)) => bail!("--adapter: {} is no LLaMA", path.display()),
    };
    let activations = activations.unwrap_or(model.activations());
    Ok(model.with_activations(activations)?)
}

/// The same with the [`pretrained`] tokenizer of its folder, which another thread makes meanwhile.
pub(crate) fn load_with_tokenizer(
    path: &Path,
    adapter: Option<&Path>,
    given: Option<&str>,
    flags: DeviceFlags,
) -> anyhow::Result<(Model, Pretrained)> {
    machine::compute_on_this_thread();
    std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| pretrained(path, adapter, given));
        let model = load(path, adapter, flags);
        let pretrained = tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((model?, pretrained))
    })
}

/// The model with the landmark and the adapter in a folder. A landmark comes right after the tokens of the tokenizer ([`pretrained`] compares
/// them), so its id is their number.
pub fn adapted(model: Llama, adapter: &Path) -> anyhow::Result<Llama> {
    let flag = || format!("--adapter {}", adapter.display());
    let landmarks = landmarks(adapter).with_context(flag)?;
    let model = model.with_landmarks(landmarks, landmarks.mem_id as usize).with_context(flag)?;
    model.with_adapter(adapter).with_context(flag)
}

/// The landmark of an adapter.
fn landmarks(adapter: &Path) -> anyhow::Result<LandmarkConfig> {
    LlamaConfig::load(adapter)?.landmarks.context("its config.json says nothing of landmarks")
}

/// Whether a folder has a model of the LLaMA family, or one that claims to be of Hugging Face's.
fn is_llama(folder: &Path) -> bool {
    let json = std::fs::read(folder.join("config.json")).unwrap_or_default();
    serde_json::from_slice::<serde_json::Value>(&json).is_ok_and(|config| config.get("model_type").is_some())
}

/// Where the model itself is: an experiment's newest checkpoint if it is an experiment, a file if it is a GGUF, or the cache's folder of a
/// model that is named.
pub fn checkpoint(named: &Path) -> anyhow::Result<PathBuf> {
    model_path("checkpoint", named)
}

/// The same of another flag's.
pub fn model_path(flag: &str, named: &Path) -> anyhow::Result<PathBuf> {
    let path = match named.to_str() {
        Some(name) => hub::locate(name, None).map_err(|error| anyhow::anyhow!("--{flag} {error}"))?,
        None => named.to_path_buf(),
    };
    if path.is_file() || path.join("config.json").exists() {
        return Ok(path);
    }
    let newest = EXPERIMENT.iterations(&path)?.pop();
    let newest = newest.map(|iteration| EXPERIMENT.path(&path, iteration));
    newest.with_context(|| {
        format!("--{flag} {}: no model in it: neither a config.json nor a folder ckpt_N", path.display())
    })
}

/// The tokenizer of the model in a folder or a file with an adapter, or the given one.
pub fn tokenizer(path: &Path, adapter: Option<&Path>, given: Option<&str>) -> anyhow::Result<Tokenizer> {
    Ok(pretrained(path, adapter, given)?.tokenizer)
}

/// The same with the conventions that it comes with.
pub fn pretrained(path: &Path, adapter: Option<&Path>, given: Option<&str>) -> anyhow::Result<Pretrained> {
    let pretrained = pretrained_alone(path, given)?;
    let Some(adapter) = adapter else { return Ok(pretrained) };
    let flag = || format!("--adapter {}", adapter.display());
    let (pretrained, id) = pretrained.with_landmark()?;
    let expected = landmarks(adapter).with_context(flag)?.mem_id;
    if id != expected {
        bail!("{}: its landmark is token {expected}, and in the model's tokenizer that would be {id}", flag());
    }
    Ok(pretrained)
}

fn pretrained_alone(path: &Path, given: Option<&str>) -> anyhow::Result<Pretrained> {
    if let Some(name) = given {
        let tokenizer = Tokenizer::named(name).context("--tokenizer")?;
        return Ok(Pretrained::from_settings(tokenizer, serde_json::Map::new()));
    }
    if path.is_file() {
        let (json, settings) = Gguf::open(path).and_then(|gguf| gguf.tokenizer()).context("--checkpoint")?;
        return Ok(Pretrained::from_settings(Tokenizer::from_json(json.as_bytes())?, settings));
    }
    if is_llama(path) {
        return Ok(Pretrained::from_folder(path)?);
    }
    let own = path.join(TOKENIZER_FILE);
    if !own.exists() {
        bail!("--checkpoint {}: no {TOKENIZER_FILE} in it; name one with --tokenizer FILE", path.display())
    }
    Ok(Pretrained::from_settings(Tokenizer::from_file(own)?, serde_json::Map::new()))
}
