//! The work of a preparation that is not finished: a folder that it can be taken up from.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::OnError;
use super::layout::Set;
use super::progress::Progress;
use super::reader::Place;
use crate::folder::{TEST_FILE, TOKENIZER_FILE, TRAIN_FILE, VALIDATION_FILE};
use crate::token_file::{Body, Mark};
use crate::{Error, Result, TokenFileInfo, Tokenizer, output};

/// The folder, inside the output folder.
pub const WORK_FOLDER: &str = ".prepare";
const STATE_FILE: &str = "state.json";
const LOCK_FILE: &str = "lock";
const BORDERS_EXTENSION: &str = "borders";
/// Changes with what the files mean.
const VERSION: u32 = 1;

/// The unfinished output. Dropped before it was ever saved, it leaves nothing.
#[derive(Debug)]
pub(super) struct Work {
    out_dir: PathBuf,
    folder: PathBuf,
    /// Held for as long as this is.
    _lock: File,
    state: State,
    bodies: BTreeMap<Set, Body>,
    /// Whether the folder is worth keeping.
    saved: bool,
}

/// What is known at a safe place.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    version: u32,
    /// Which preparation this is.
    key: String,
    place: Place,
    marks: BTreeMap<Set, Mark>,
    progress: Progress,
    finished: bool,
}

impl Work {
    /// Opens the work on the preparation `key` in `out_dir`, or begins it. Unfinished work on any other one is thrown away.
    pub(super) fn open(out_dir: &Path, key: String, on_error: OnError) -> Result<Self> {
        let folder = out_dir.join(WORK_FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let lock_path = folder.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(Error::io(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Busy { path: out_dir.to_path_buf() }),
            Err(TryLockError::Error(error)) => return Err(Error::io(&lock_path)(error)),
        }
        let state = fs::read(folder.join(STATE_FILE)).ok().and_then(|json| serde_json::from_slice::<State>(&json).ok());
        let state = state.filter(|state| {
            // Whoever does not want bad input skipped does not want it to have been skipped.
            let skipped = on_error == OnError::Stop && state.progress.skipped.total() > 0;
            state.version == VERSION && state.key == key && !skipped
        });
        let mut work = Self {
            out_dir: out_dir.into(),
            folder,
            _lock: lock,
            saved: state.is_some(),
            state: State::default(),
            bodies: BTreeMap::new(),
        };
        match state {
            Some(state) => work.state = state,
            None => {
                work.clear()?;
                work.state = State { version: VERSION, key, ..State::default() };
            }
        }
        Ok(work)
    }

    /// Whether only [`Work::publish`] is left.
    pub(super) fn is_finished(&self) -> bool {
        self.state.finished
    }

    /// The tokenizer that was [kept](Work::keep_tokenizer).
    pub(super) fn tokenizer(&self) -> Option<Tokenizer> {
        // One that cannot be read is as good as none: it is trained again, and the tokens' fingerprint tells if it is the same.
        if self.saved { Tokenizer::from_file(self.folder.join(TOKENIZER_FILE)).ok() } else { None }
    }

    /// Keeps a tokenizer that was trained.
    pub(super) fn keep_tokenizer(&mut self, tokenizer: &Tokenizer) -> Result<()> {
        tokenizer.save(&self.folder)?;
        self.write_state()
    }

    /// Opens the token files of `sets`, at their marks if there are some.
    pub(super) fn start(
        &mut self,
        tokenizer: &Tokenizer,
        sets: impl Iterator<Item = Set>,
        bytes_total: u64,
    ) -> Result<()> {
        let info = TokenFileInfo::of(tokenizer);
        let sets: Vec<Set> = sets.collect();
        for &set in &sets {
            let (path, borders) = self.files(set);
            let body = match self.state.marks.get(&set) {
                Some(mark) => Body::resume(&path, &borders, &info, mark)?,
                None => None,
            };
            if let Some(body) = body {
                self.bodies.insert(set, body);
            }
        }
        if self.bodies.len() < sets.len() {
            // All or none of them go on.
            self.bodies.clear();
            self.state = State { version: VERSION, key: std::mem::take(&mut self.state.key), ..State::default() };
            for &set in &sets {
                let (path, borders) = self.files(set);
                self.bodies.insert(set, Body::create(&path, &borders, &info)?);
                self.state.progress.set_tokens(set, 0);
            }
        }
        self.state.progress.bytes_total = bytes_total;
        Ok(())
    }

    /// Where reading goes on.
    pub(super) fn place(&self) -> Place {
        self.state.place
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.state.progress
    }

    pub(super) fn push(&mut self, set: Set, tokens: &[u32]) -> Result<()> {
        self.body(set).push(tokens)
    }

    pub(super) fn end_document(&mut self, set: Set) -> Result<()> {
        self.state.progress.documents += 1;
        self.body(set).end_document()
    }

    /// Leaves bad input out, and what there is of the current document.
    pub(super) fn skip(&mut self, set: Set, error: &Error) -> Result<()> {
        self.state.progress.skipped.count(error);
        self.body(set).abandon_document()
    }

    /// Counts a record of another part of the data set.
    pub(super) fn pass_over(&mut self) {
        self.state.progress.other_records += 1;
    }

    /// Everything up to `place` was done, `text_bytes` since the last call.
    pub(super) fn advance(&mut self, place: Place, text_bytes: usize) {
        self.state.place = place;
        self.state.progress.bytes_done = place.disk;
        self.state.progress.text_bytes += text_bytes as u64;
        for (&set, body) in &self.bodies {
            self.state.progress.set_tokens(set, body.len());
        }
    }

    /// Makes everything up to here safe.
    pub(super) fn save(&mut self) -> Result<()> {
        for (&set, body) in &mut self.bodies {
            self.state.marks.insert(set, body.mark()?);
        }
        self.write_state()
    }

    /// Completes the files.
    pub(super) fn finish(&mut self, tokenizer: &Tokenizer) -> Result<()> {
        for body in std::mem::take(&mut self.bodies).into_values() {
            body.complete()?;
        }
        tokenizer.save(&self.folder)?;
        self.state.finished = true;
        self.write_state()
    }

    /// Gives the complete files their names. Of a preparation that was killed while it did this, the rest of them.
    pub(super) fn publish(mut self) -> Result<Progress> {
        for name in [TOKENIZER_FILE, TRAIN_FILE, VALIDATION_FILE, TEST_FILE] {
            let (from, to) = (self.folder.join(name), self.out_dir.join(name));
            if from.exists() {
                output::rename(&from, &to)?;
            } else if name == TEST_FILE && self.state.progress.test_tokens.is_none() && to.exists() {
                // An earlier preparation's: it would pass for this one's.
                fs::remove_file(&to).map_err(Error::io(&to))?;
            }
        }
        // Dropping it removes the folder.
        self.saved = false;
        Ok(std::mem::take(&mut self.state.progress))
    }

    fn body(&mut self, set: Set) -> &mut Body {
        self.bodies.get_mut(&set).expect("the sets are those that the inputs may hold")
    }

    /// The unfinished token file of a set and its borders.
    fn files(&self, set: Set) -> (PathBuf, PathBuf) {
        let path = self.folder.join(match set {
            Set::Train => TRAIN_FILE,
            Set::Validation => VALIDATION_FILE,
            Set::Test => TEST_FILE,
        });
        let borders = path.with_extension(BORDERS_EXTENSION);
        (path, borders)
    }

    fn write_state(&mut self) -> Result<()> {
        let path = self.folder.join(STATE_FILE);
        let json = serde_json::to_vec(&self.state).map_err(|e| Error::io(&path)(e.into()))?;
        output::write(&path, &json)?;
        self.saved = true;
        Ok(())
    }

    /// Removes everything but the lock.
    fn clear(&self) -> Result<()> {
        let io = |error| Error::io(&self.folder)(error);
        for entry in fs::read_dir(&self.folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            if entry.file_name() != LOCK_FILE {
                fs::remove_file(entry.path()).map_err(io)?;
            }
        }
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.saved {
            // The output, if any, is in its place. What cannot be removed now is thrown away by the next preparation.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}
