//! A reader whose text is in a session.

use crate::reader::{Opened, checkpoint, load_with_tokenizer};
use crate::{
    CacheFlags, DeviceFlags, LmCache, Memory, ModelFlags, Reader, SelectionMethod, bytes, hash_of_model, memory,
};
use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
use clap::{Args, ValueEnum};
use landmark_data::Pretrained;
use landmark_memory::session::{Session, Settings};
use landmark_memory::{LandmarkCache, PoolTier, Recall, Scoring};
use landmark_models::Model;
use landmark_models::llama::ADAPTER_FILES;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

/// What a session has to remember of how it is read. Another model, or another way to read, would not go on with the same text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// The program that made the session.
    pub program: String,
    /// Where the model was.
    pub model: PathBuf,
    /// SHA-256 of its files.
    pub model_hash: String,
    /// The files' sizes and times: while they are these, the hash is not computed again.
    pub model_files: Vec<(String, u64, u64)>,
    /// Where the model's adapter was.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// What `--tokenizer` named.
    pub tokenizer: Option<String>,
    /// SHA-256 of the tokenizer.
    pub tokenizer_hash: String,
    /// Blocks that a token reads. From here on: the flags, with no default left open.
    pub cache_topk: usize,
    /// Who shares them.
    pub cache_selection_method: String,
    /// Ordinary tokens of a block.
    pub mem_cache_freq: usize,
    /// Tokens that are read at once.
    pub mid_length: usize,
    /// Weight on the context-miss token under which nothing is retrieved.
    pub rem_cutoff: Option<f64>,
    /// Whether all landmarks are scored, and none through an index.
    pub exact: bool,
}

/// Which session, and how it is read this time.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case")]
pub struct SessionFlags {
    /// The session's folder
    #[arg(value_name = "DIR")]
    pub session: PathBuf,
    /// The model, if it is no longer where it was
    #[arg(long, value_name = "MODEL")]
    checkpoint: Option<PathBuf>,
    /// The model's adapter, if it is no longer where it was
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// RAM for blocks that are in use, such as 500MB or 2GiB; what one chunk reads in one layer is in RAM at least
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "512MiB")]
    ram: u64,
    /// GPU memory for blocks that are in use, beside the landmarks of all; what one token reads in one layer is there at least. Left out: 2GiB
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    gpu_memory: Option<u64>,
    /// Score all landmarks beside those that the index finds, and tell what it missed
    #[arg(long)]
    measure_recall: bool,
    #[command(flatten)]
    device: DeviceFlags,
}

impl SessionFlags {
    /// A session where it was made, with so many bytes of RAM, and of GPU memory, for blocks.
    pub fn of(session: PathBuf, device: DeviceFlags, ram: u64, gpu_memory: Option<u64>) -> Self {
        Self { session, checkpoint: None, adapter: None, device, ram, gpu_memory, measure_recall: false }
    }
}

/// `--gpu_memory` where it is left out.
const GPU_MEMORY: u64 = 2 << 30;

impl About {
    /// Makes a session of a model in a folder, read as the flags say.
    pub fn create(
        folder: &Path,
        model: &ModelFlags,
        flags: &CacheFlags,
        exact: bool,
        settings: Settings,
    ) -> anyhow::Result<Self> {
        let opened = Opened::open(model)?;
        let about = Self::new(&opened, flags, exact)?;
        about.create_of(folder, &opened.model, settings)?;
        Ok(about)
    }

    /// What sessions of a model, read as the flags say, have to remember. The model's files are read for it.
    pub fn new(opened: &Opened, flags: &CacheFlags, exact: bool) -> anyhow::Result<Self> {
        let Opened { model, pretrained, path, adapter, tokenizer } = opened;
        let (outline, adapter) = (model.outline(), adapter.as_deref());
        if flags.mem_cache_size.is_some() {
            bail!("--mem_cache_size is refused: a session keeps all its blocks; --disk limits what it may take");
        }
        if flags.kind(&outline)? != LmCache::Mem {
            bail!("a session needs a model with landmarks that reads with --lm_cache mem");
        }
        let config = memory::cache_config(flags, &outline, 1)?;
        let cache = LandmarkCache::new(config.clone(), outline.rope.clone(), model.activations(), model.device())?;
        let (_, mid_length) = Memory::of_text(flags, model, &pretrained.tokenizer, &[], cache)?;
        Ok(Self {
            program: concat!("landmark ", env!("CARGO_PKG_VERSION")).into(),
            model_hash: hash_of_model(path, adapter)?,
            model_files: files(path, adapter)?,
            adapter: adapter.map(std::path::absolute).transpose()?,
            model: std::path::absolute(path)?,
            tokenizer: tokenizer.clone(),
            tokenizer_hash: pretrained.tokenizer.fingerprint().to_string(),
            cache_topk: config.top_k,
            cache_selection_method: flags
                .cache_selection_method
                .unwrap_or(SelectionMethod::PerTokenAndHead)
                .name()
                .into(),
            mem_cache_freq: config.mem_freq,
            mid_length,
            rem_cutoff: flags.rem_cutoff.or(outline.rem_cutoff),
            exact,
        })
    }

    /// Makes a session that remembers this, of the model that it is about.
    pub fn create_of(&self, folder: &Path, model: &Model, settings: Settings) -> anyhow::Result<()> {
        let outline = model.outline();
        let config = memory::cache_config(&self.flags()?, &outline, 1)?;
        Session::create(folder, &config, outline.head_dim, settings, serde_json::to_value(self)?)?;
        Ok(())
    }

    /// Whether both are about the same model and tokenizer, wherever these are.
    pub fn is_of_same_model(&self, other: &Self) -> bool {
        self.model_hash == other.model_hash && self.tokenizer_hash == other.tokenizer_hash
    }

    /// What a session remembers.
    pub fn of(about: &serde_json::Value) -> anyhow::Result<Self> {
        serde_json::from_value(about.clone()).context("session.json is not one of this program's")
    }

    /// The model, if it is still the one that read the session's text.
    fn load(&self, flags: &SessionFlags) -> anyhow::Result<(Model, Pretrained)> {
        let path = match &flags.checkpoint {
            Some(moved) => checkpoint(moved)?,
            None => self.model.clone(),
        };
        let adapter = match (&self.adapter, &flags.adapter) {
            (None, Some(_)) => bail!("--adapter is refused: the session's model has none"),
            (adapter, moved) => moved.as_deref().or(adapter.as_deref()),
        };
        for (what, path, flag) in [("model", Some(&*path), "checkpoint"), ("adapter", adapter, "adapter")] {
            if let Some(path) = path.filter(|path| !path.exists()) {
                bail!("the session's {what} is not at {} any more: tell where it is with --{flag}", path.display());
            }
        }
        let is_moved = flags.checkpoint.is_some() || flags.adapter.is_some();
        if (is_moved || files(&path, adapter)? != self.model_files) && hash_of_model(&path, adapter)? != self.model_hash
        {
            let adapter =
                adapter.map_or(String::new(), |adapter| format!(" with the adapter in {}", adapter.display()));
            bail!(
                "the model in {}{adapter} is not the one that read the session's text: its files have another hash",
                path.display()
            );
        }
        let (model, pretrained) = load_with_tokenizer(&path, adapter, self.tokenizer.as_deref(), flags.device)?;
        if pretrained.tokenizer.fingerprint().to_string() != self.tokenizer_hash {
            bail!("the tokenizer of {} is not the one that the session's text was read with", path.display());
        }
        Ok((model, pretrained))
    }

    fn flags(&self) -> anyhow::Result<CacheFlags> {
        let method = SelectionMethod::from_str(&self.cache_selection_method, false);
        Ok(CacheFlags {
            lm_cache: Some(LmCache::Mem),
            cache_topk: Some(self.cache_topk),
            mem_cache_size: None,
            cache_selection_method: Some(method.map_err(|error| anyhow::anyhow!("cache_selection_method: {error}"))?),
            mid_length: Some(self.mid_length),
            mem_cache_freq: Some(self.mem_cache_freq),
            rem_cutoff: self.rem_cutoff,
        })
    }
}

/// Opens a session and the model that read its text. `exact`: all landmarks are scored, whatever the session is made for.
pub fn open_session(how: &SessionFlags, exact: bool) -> anyhow::Result<(Session, Reader)> {
    let folder = &how.session;
    let session = Session::open(folder)?;
    for note in session.notes() {
        eprintln!("{}: {note}", folder.display());
    }
    let about = About::of(session.about())?;
    let (model, pretrained) = about.load(how)?;
    if model.device().is_cpu() && how.gpu_memory.is_some() {
        bail!("--gpu_memory is refused: the session is read on the CPU; see --device");
    }
    if !model.device().is_cpu() && how.measure_recall {
        bail!("--measure_recall is refused: on a GPU all landmarks are scored, and there is no index to measure");
    }
    let scoring = match (about.exact || exact, how.measure_recall) {
        (true, true) => {
            bail!("--measure_recall is refused: all landmarks are scored, and there is no index to measure")
        }
        (true, false) => Scoring::Exact,
        (false, true) => Scoring::IndexMeasured,
        (false, false) => Scoring::Index,
    };
    let room = Room { ram: how.ram, gpu_memory: how.gpu_memory.unwrap_or(GPU_MEMORY) };
    let reader = Reader::of_session(&session, &about, model, &pretrained, room, scoring)?;
    Ok((session, reader))
}

/// Bytes for blocks of a session that are in use.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// In RAM.
    pub ram: u64,
    /// On the GPU, if the model is there.
    pub gpu_memory: u64,
}

impl Reader {
    /// Goes on with the text of a session, by the model that it is about.
    pub fn of_session(
        session: &Session,
        about: &About,
        model: impl Into<Arc<Model>>,
        pretrained: &Pretrained,
        room: Room,
        scoring: Scoring,
    ) -> anyhow::Result<Self> {
        let model = model.into();
        let (flags, outline) = (about.flags()?, model.outline());
        let config = memory::cache_config(&flags, &outline, 1)?;
        let (device, dtype, ram) = (model.device(), model.activations(), usize::try_from(room.ram)?);
        let (cache, hidden) = if device.is_cpu() {
            session.cache(config, outline.rope.clone(), ram, scoring)?
        } else {
            let bytes = usize::try_from(room.gpu_memory)?;
            let pool = PoolTier { device: device.clone(), dtype, bytes };
            session.cache_with_pool(config, outline.rope.clone(), ram, pool)?
        };
        if let Some(token) = session.tokens().iter().find(|&&token| token as usize >= outline.vocab_size) {
            bail!("the session has token {token}, which is none of the model's");
        }
        let (memory, chunk) = Memory::of_text(&flags, &model, &pretrained.tokenizer, session.tokens(), cache)?;
        let hidden = hidden.map(|hidden| {
            if hidden.len() != outline.width {
                bail!(
                    "the session has a hidden state of {} channels, and the model has {}",
                    hidden.len(),
                    outline.width
                );
            }
            let hidden = Tensor::from_vec(hidden, (1, 1, outline.width), &Device::Cpu)?;
            Ok(hidden.to_device(model.device())?.to_dtype(dtype)?)
        });
        Ok(Self {
            begin: pretrained.begin.clone(),
            end: pretrained.end.clone(),
            sampling: pretrained.sampling,
            memory,
            chunk,
            last: hidden.transpose()?,
            last_token: session.tokens().last().copied(),
            tokenizer: pretrained.tokenizer.clone(),
            model,
        })
    }

    /// Makes durable what was read since; see [`Session::commit`].
    pub fn commit(
        &mut self,
        session: &mut Session,
        tokens: &[u32],
        append_from: Option<usize>,
        last: bool,
    ) -> anyhow::Result<()> {
        let hidden = match &self.last {
            Some(last) => last.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?,
            None => Vec::new(),
        };
        let cache = self.memory.caches_mut().next().context("a session's reader has a cache")?;
        Ok(session.commit(cache, tokens, &hidden, append_from, last)?)
    }

    /// Where blocks are that are in use.
    pub fn tier(&self) -> &'static str {
        if self.model.device().is_cpu() { "in RAM" } else { "on the GPU" }
    }

    /// What the index found of what all landmarks would have given, as a line for people; nothing if it was not measured.
    pub fn recall_line(&self) -> Option<String> {
        let Recall { queries, mass, found, chosen } = self.memory.caches().next()?.recall();
        (queries > 0).then(|| {
            format!(
                "index: {:.2} % of the retrieved softmax mass, {:.2} % of the blocks, over {queries} queries",
                100. * mass / queries as f64,
                100. * found as f64 / chosen as f64
            )
        })
    }

    /// How often a head's block was brought into RAM, or onto the GPU, and how often it was there.
    pub fn loads(&self) -> (u64, u64) {
        self.memory.caches().next().map_or((0, 0), LandmarkCache::loads)
    }
}

/// Names, sizes and times of a model's files, and of its adapter's.
fn files(path: &Path, adapter: Option<&Path>) -> anyhow::Result<Vec<(String, u64, u64)>> {
    let adapter = adapter.map(|adapter| ADAPTER_FILES.map(|name| adapter.join(name)));
    let paths = match path.is_file() {
        true => vec![path.to_path_buf()],
        false => [vec![path.join("config.json")], landmark_models::llama::weight_files(path)?].concat(),
    };
    let file = |path: PathBuf| {
        let metadata = std::fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let time = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok((name, metadata.len(), time.map_or(0, |time| time.as_nanos() as u64)))
    };
    paths.into_iter().chain(adapter.into_iter().flatten()).map(file).collect()
}
