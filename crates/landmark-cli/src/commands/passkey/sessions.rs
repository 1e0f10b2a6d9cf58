//! Pass keys through sessions: prompts that are read onto the disk, and asked for through the index and without it.

use super::prompt::Prompt;
use super::results::Trial;
use crate::args::bytes;
use crate::reader::{About, CacheFlags, ModelFlags, Reader, SessionFlags, open_session};
use crate::sampling::Sampler;
use anyhow::Context;
use landmark_memory::BlockType;
use landmark_memory::session::Settings;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How sessions are made.
#[derive(clap::Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Sessions")]
pub struct Flags {
    /// Read each prompt into a session in this folder, as `landmark session append` does, and ask it twice: through the index of its
    /// landmarks, and with all of them scored. A session is removed when it has answered
    #[arg(long, value_name = "DIR", conflicts_with_all = ["without_retrieval", "all_selection_methods", "batch_size", "max_cache_gb"])]
    pub sessions: Option<PathBuf>,
    /// How they keep keys and values: float32 (exact), bfloat16, or int8
    #[arg(long, value_name = "TYPE", default_value = "float32", requires = "sessions")]
    pub block_dtype: BlockType,
    /// RAM for blocks that are in use
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "512MiB", requires = "sessions")]
    pub ram: u64,
}

/// The two ways in which a session is asked.
pub const WAYS: [&str; 2] = ["index", "all landmarks scored"];

/// Reads a prompt into a new session, all but its question, and asks it in each of [`WAYS`]. `progress` is told how many tokens are read and
/// says whether to go on; nothing comes back if it does not.
pub fn answers(
    model: &ModelFlags,
    cache: &CacheFlags,
    flags: &Flags,
    number: u64,
    prompt: &Prompt,
    mut progress: impl FnMut(usize) -> bool,
) -> anyhow::Result<Option<[Trial; 2]>> {
    let parent = flags.sessions.as_deref().context("--sessions DIR is missing")?;
    std::fs::create_dir_all(parent).with_context(|| format!("--sessions: cannot make {}", parent.display()))?;
    let folder = parent.join(format!("passkey-{}-{number}", std::process::id()));
    let settings = Settings { block_type: flags.block_dtype, disk_limit: None, blocks_per_segment: None };
    About::create(&folder, model, cache, false, settings)?;
    // Whatever happens, what is tens of gigabytes does not stay.
    let _removed = Removed(&folder);

    let (text, question) = prompt.tokens.split_at(prompt.asked_at);
    let begun = Instant::now();
    let how = SessionFlags::of(folder.clone(), model.device, flags.ram);
    let (mut session, mut reader) = open_session(&how, false)?;
    let mut read = 0;
    for chunk in text.chunks(reader.chunk()) {
        reader.read(chunk, |_| true)?;
        read += chunk.len();
        reader.commit(&mut session, chunk, None, read == text.len())?;
        if !progress(read) {
            return Ok(None);
        }
    }
    drop((session, reader));
    let reading = begun.elapsed();

    let depth = prompt.told_at as f64 / prompt.tokens.len() as f64;
    let ask = |exact| {
        let begun = Instant::now();
        let (_session, mut reader) = open_session(&how, exact)?;
        let answer = answer(&mut reader, question)?;
        let seconds = (reading + begun.elapsed()).as_secs_f64();
        anyhow::Ok(Trial { trial: number, depth, key: prompt.key, answer, seconds })
    };
    Ok(Some([ask(false)?, ask(true)?]))
}

/// Removes a session when it goes out of scope.
struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        if let Err(error) = landmark_memory::session::delete(self.0) {
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
