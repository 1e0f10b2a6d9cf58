//! Pass keys through sessions: prompts that are read onto the disk, and asked for through the index and without it. What prompts that follow each other
//! begin with alike is read once, and each is a fork of it.

use super::prompt::Prompt;
use super::results::Trial;
use anyhow::Context;
use landmark_inference::{
    About, CacheFlags, DeviceFlags, ModelFlags, Reader, Sampler, SessionFlags, bytes, open_session,
};
use landmark_memory::BlockType;
use landmark_memory::session::{Session, Settings};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How sessions are made.
#[derive(clap::Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Sessions")]
pub struct Flags {
    /// Read each prompt into a session in this folder, as `landmark session append` does, and ask it twice: through the index of its
    /// landmarks, and with all of them scored, on the CPU both times: on a GPU, where --device can have prompts read, all are scored
    /// in any case. A session is removed when it has answered
    #[arg(long, value_name = "DIR", conflicts_with_all = ["without_retrieval", "all_selection_methods", "batch_size", "max_cache_gb"])]
    pub sessions: Option<PathBuf>,
    /// How they keep keys and values: float32 (exact), bfloat16, or int8
    #[arg(long, value_name = "TYPE", default_value = "float32", requires = "sessions")]
    pub block_dtype: BlockType,
    /// RAM for blocks that are in use
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "512MiB", requires = "sessions")]
    pub ram: u64,
    /// GPU memory for blocks that are in use, where prompts are read on a GPU. Left out: 2GiB
    #[arg(long, value_name = "SIZE", value_parser = bytes, requires = "sessions")]
    pub gpu_memory: Option<u64>,
}

/// The two ways in which a session is asked.
pub const WAYS: [&str; 2] = ["index", "all landmarks scored"];

/// Reads prompts into sessions.
pub struct Sessions<'a> {
    model: &'a ModelFlags,
    cache: &'a CacheFlags,
    flags: &'a Flags,
    parent: &'a Path,
    /// What the last prompt began with, up to the chunk that tells its first key.
    trunk: Option<(Temporary, Vec<u32>)>,
}

impl<'a> Sessions<'a> {
    /// Sessions in the folder of `flags`, which is made.
    pub fn new(model: &'a ModelFlags, cache: &'a CacheFlags, flags: &'a Flags) -> anyhow::Result<Self> {
        let parent = flags.sessions.as_deref().context("--sessions DIR is missing")?;
        std::fs::create_dir_all(parent).with_context(|| format!("--sessions: cannot make {}", parent.display()))?;
        Ok(Self { model, cache, flags, parent, trunk: None })
    }

    /// Reads a prompt into a session, all but its question, and asks it in each of [`WAYS`]. `progress` is told how many tokens more are read and says
    /// whether to go on; nothing comes back if it does not.
    pub fn answers(
        &mut self,
        number: u64,
        prompt: &Prompt,
        mut progress: impl FnMut(usize) -> bool,
    ) -> anyhow::Result<Option<[Trial; 2]>> {
        let (text, question) = prompt.tokens.split_at(prompt.asked_at);
        let begun = Instant::now();
        if self.trunk.as_ref().is_some_and(|(_, read)| !text[..prompt.keys_at].starts_with(read)) {
            self.trunk = None;
        }
        let (trunk, read) = match &mut self.trunk {
            Some(trunk) => trunk,
            None => {
                let trunk = Temporary(self.parent.join(format!("passkey-{}", std::process::id())));
                let settings =
                    Settings { block_type: self.flags.block_dtype, disk_limit: None, blocks_per_segment: None };
                About::create(&trunk.0, self.model, self.cache, false, settings)?;
                self.trunk.insert((trunk, Vec::new()))
            }
        };
        let Flags { ram, gpu_memory, .. } = *self.flags;
        let known = read.len();
        let how = |session: &Temporary| SessionFlags::of(session.0.clone(), self.model.device, ram, gpu_memory);
        let branch = Temporary(self.parent.join(format!("passkey-{}-{number}", std::process::id())));
        {
            let (mut session, mut reader) = open_session(&how(trunk), false)?;
            // From one beginning of a chunk to another: the chunks are those of the prompt alone.
            let alike = prompt.keys_at - prompt.keys_at % reader.chunk();
            if !append(&mut session, &mut reader, &text[read.len()..alike], &mut progress)? {
                return Ok(None);
            }
            read.extend_from_slice(&text[read.len()..alike]);
            session.fork(&branch.0)?;
        }
        {
            let (mut session, mut reader) = open_session(&how(&branch), false)?;
            if !append(&mut session, &mut reader, &text[read.len()..], &mut progress)? {
                return Ok(None);
            }
        }
        let (reading, tokens) = (begun.elapsed(), prompt.tokens.len() - known);

        let depth = prompt.told_at as f64 / prompt.tokens.len() as f64;
        let ask = |exact| {
            let begun = Instant::now();
            let how = SessionFlags::of(branch.0.clone(), DeviceFlags::CPU, ram, None);
            let (_session, mut reader) = open_session(&how, exact)?;
            let answer = answer(&mut reader, question)?;
            let seconds = (reading + begun.elapsed()).as_secs_f64();
            anyhow::Ok(Trial { trial: number, depth, key: prompt.key, answer, seconds, tokens: Some(tokens) })
        };
        Ok(Some([ask(false)?, ask(true)?]))
    }
}

/// Says whether all was read.
fn append(
    session: &mut Session,
    reader: &mut Reader,
    text: &[u32],
    mut progress: impl FnMut(usize) -> bool,
) -> anyhow::Result<bool> {
    let mut left = text.len();
    for chunk in text.chunks(reader.chunk()) {
        reader.read(chunk, |_| true)?;
        left -= chunk.len();
        reader.commit(session, chunk, None, left == 0)?;
        if !progress(chunk.len()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A session that is removed when it goes out of scope: whatever happens, what is tens of gigabytes does not stay.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.0.exists()
            && let Err(error) = landmark_memory::session::delete(&self.0)
        {
            eprintln!("{}: cannot remove it: {error}", self.0.display());
        }
    }
}

fn answer(reader: &mut Reader, question: &[u32]) -> anyhow::Result<String> {
    reader.read(question, |_| true)?;
    let mut answer = Vec::new();
    reader.generate(super::ask::ANSWER, &mut Sampler::greedy(), |token| {
        answer.push(token);
        // To its end, which is near: what is cut off would be kept as the answer.
        Ok(true)
    })?;
    Ok(reader.tokenizer().decode(&answer)?)
}
