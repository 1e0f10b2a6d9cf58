//! Checkpoints: folders `ckpt_N` of an experiment, or `checkpoint-N` as `transformers` names them, N being the iteration.
//!
//! | file | holds |
//! |---|---|
//! | `model.safetensors`, `config.json` | the model, as `landmark-models` reads it; of a model with adapters, `peft`'s files |
//! | `tokenizer.json` | the tokenizer of the data; of a fine-tuned model all that its folder has of one |
//! | `optimizer.safetensors` | the optimizer's state, `{parameter}.{state}`, and the number of steps in its metadata |
//! | `state.json` | how far the run was, its settings, its data, its evaluations |
//! | `SHA256SUMS` | the checksums of all the others, as `sha256sum -c` reads them |
//!
//! A checkpoint is made in a folder of another name, every file synced, and renamed when complete: whenever a process is
//! killed, a folder of that name is whole. Checksums tell what happens to it later.

use crate::error::{Error, Result};
use crate::files;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fs;
use std::path::{Path, PathBuf};

/// The layout that this program writes and reads.
const VERSION: u32 = 1;
const STATE: &str = "state.json";
const SUMS: &str = "SHA256SUMS";

/// What `state.json` holds: the layout's version, the iteration and whatever else the run remembers.
#[derive(Debug, Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    iteration: usize,
    #[serde(flatten)]
    state: T,
}

/// The version alone, which can be read whatever else the file holds.
#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// A checkpoint that was found whole.
#[derive(Debug)]
pub struct Found<T> {
    /// Its folder.
    pub path: PathBuf,
    /// The iterations that were done.
    pub iteration: usize,
    /// What `state.json` holds.
    pub state: T,
    /// Newer checkpoints that cannot be used, newest first, and why.
    pub skipped: Vec<Error>,
}

/// The checkpoints of an experiment's folder, by how they are named.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoints {
    prefix: &'static str,
}

/// Those of `landmark train`: `ckpt_N`.
pub const EXPERIMENT: Checkpoints = Checkpoints { prefix: "ckpt_" };

/// Those of `landmark finetune`: `checkpoint-N`.
pub const TRAINER: Checkpoints = Checkpoints { prefix: "checkpoint-" };

impl Checkpoints {
    /// The folder of the checkpoint of an iteration.
    pub fn path(self, experiment: &Path, iteration: usize) -> PathBuf {
        experiment.join(format!("{}{iteration}", self.prefix))
    }

    /// Writes the checkpoint of an iteration. `fill` puts all files but `state.json` into the folder it is given.
    pub fn save<T: Serialize>(
        self,
        experiment: &Path,
        iteration: usize,
        state: T,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let beside = self.hidden(experiment, iteration, "new");
        remove(&beside)?;
        let saved = self.write(experiment, iteration, state, &beside, fill);
        if saved.is_err() {
            // On a full disk it is in the way. What went wrong before is what counts.
            let _ = remove(&beside);
        }
        saved
    }

    fn write<T: Serialize>(
        self,
        experiment: &Path,
        iteration: usize,
        state: T,
        beside: &Path,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.path(experiment, iteration);
        fs::create_dir_all(beside).map_err(Error::io("create", beside))?;
        fill(beside)?;
        let state = serde_json::to_vec_pretty(&Versioned { version: VERSION, iteration, state });
        let state_path = beside.join(STATE);
        let state = state.map_err(|error| Error::format(&state_path, error))?;
        fs::write(&state_path, state).map_err(Error::io("write", &state_path))?;
        let mut sums = String::new();
        for name in names(beside)? {
            let file = beside.join(&name);
            files::sync_file(&file)?;
            sums += &format!("{}  {name}\n", files::sha256(&file)?);
        }
        files::write(&beside.join(SUMS), sums.as_bytes())?;
        // Only a damaged checkpoint can be in the way: a run does not save the iteration it resumed from.
        let old = self.hidden(experiment, iteration, "old");
        if path.exists() {
            remove(&old)?;
            fs::rename(&path, &old).map_err(Error::io("move away", &path))?;
        }
        fs::rename(beside, &path).map_err(Error::io("rename to", &path))?;
        files::sync_folder(experiment)?;
        remove(&old)?;
        Ok(path)
    }

    /// The newest checkpoint that is whole, if there are any checkpoints.
    pub fn latest<T: DeserializeOwned>(self, experiment: &Path) -> Result<Option<Found<T>>> {
        let mut skipped = Vec::new();
        for iteration in self.iterations(experiment)?.into_iter().rev() {
            let path = self.path(experiment, iteration);
            match open(&path) {
                Ok((iteration, state)) => return Ok(Some(Found { path, iteration, state, skipped })),
                Err(error @ (Error::Damaged { .. } | Error::Version { .. })) => skipped.push(error),
                Err(error) => return Err(error),
            }
        }
        match skipped.into_iter().next() {
            None => Ok(None),
            Some(newest) => Err(Error::NothingUsable { path: experiment.to_path_buf(), newest: Box::new(newest) }),
        }
    }

    /// The iterations of the checkpoints of an experiment, in order. Their folders are only listed, not read.
    pub fn iterations(self, experiment: &Path) -> Result<Vec<usize>> {
        if !experiment.is_dir() {
            return Ok(Vec::new());
        }
        let names = names(experiment)?;
        let mut iterations: Vec<usize> =
            names.iter().filter_map(|name| name.strip_prefix(self.prefix)?.parse().ok()).collect();
        iterations.sort_unstable();
        Ok(iterations)
    }

    /// Removes all but the newest `keep` checkpoints.
    pub fn prune(self, experiment: &Path, keep: usize) -> Result<()> {
        let iterations = self.iterations(experiment)?;
        let surplus = iterations.len().saturating_sub(keep);
        for &iteration in &iterations[..surplus] {
            // Renamed first: half a folder must never be named as a checkpoint.
            let (path, old) = (self.path(experiment, iteration), self.hidden(experiment, iteration, "old"));
            fs::rename(&path, &old).map_err(Error::io("remove", &path))?;
            remove(&old)?;
        }
        Ok(())
    }

    /// Removes what a killed process left of a save or a removal. Returns the names.
    pub fn clean(self, experiment: &Path) -> Result<Vec<String>> {
        let mut names = names(experiment)?;
        names.retain(|name| name.starts_with(&format!(".{}", self.prefix)) && name.ends_with(".tmp"));
        for name in &names {
            remove(&experiment.join(name))?;
        }
        Ok(names)
    }

    /// The name of a checkpoint that is being made or removed.
    fn hidden(self, experiment: &Path, iteration: usize, kind: &str) -> PathBuf {
        experiment.join(format!(".{}{iteration}.{kind}.tmp", self.prefix))
    }
}

/// Reads the state of a checkpoint after comparing every file with its checksum.
pub fn open<T: DeserializeOwned>(path: &Path) -> Result<(usize, T)> {
    let damaged = |what: String| Error::Damaged { path: path.to_path_buf(), what };
    let sums = fs::read_to_string(path.join(SUMS)).map_err(|error| damaged(format!("{SUMS}: {error}")))?;
    let mut listed = Vec::new();
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").ok_or_else(|| damaged(format!("{SUMS} is not a list of checksums")))?;
        // A file of the checkpoint: elsewhere there are some without an end.
        let file = path.join(name);
        if name.contains(['/', '\\']) || (file.exists() && !file.is_file()) {
            return Err(damaged(format!("{SUMS} lists what is no file of it")));
        }
        let found = files::sha256(&file).map_err(|error| damaged(error.to_string()))?;
        if found != sum {
            return Err(damaged(format!("{name} is not what was written (checksum {found}, expected {sum})")));
        }
        listed.push(name);
    }
    // What the user keeps beside them is not ours.
    let is_ours = |name: &String| name.ends_with(".safetensors") || name.ends_with(".json");
    let found = names(path)?.into_iter().filter(is_ours);
    let needed = [STATE, "optimizer.safetensors"].map(String::from);
    if let Some(name) = found.chain(needed).find(|name| !listed.contains(&name.as_str())) {
        return Err(damaged(format!("{SUMS} does not list {name}")));
    }
    let state = fs::read(path.join(STATE)).map_err(Error::io("read", &path.join(STATE)))?;
    let unreadable = |error: serde_json::Error| damaged(format!("{STATE}: {error}"));
    let VersionOnly { version: found } = serde_json::from_slice(&state).map_err(unreadable)?;
    if found != VERSION {
        return Err(Error::Version { path: path.to_path_buf(), found, expected: VERSION });
    }
    let Versioned { iteration, state, .. } = serde_json::from_slice(&state).map_err(unreadable)?;
    Ok((iteration, state))
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() { fs::remove_dir_all(folder).map_err(Error::io("remove", folder)) } else { Ok(()) }
}

/// The names in a folder, sorted.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<std::io::Result<Vec<_>>>().map_err(Error::io("list", folder))?;
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(folder: &Path) -> Result<()> {
        for name in ["model.safetensors", "config.json", "optimizer.safetensors"] {
            let path = folder.join(name);
            fs::write(&path, name.repeat(9)).map_err(Error::io("write", &path))?;
        }
        Ok(())
    }

    fn experiment(iterations: &[usize]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for &iteration in iterations {
            EXPERIMENT.save(folder.path(), iteration, serde_json::json!({"seed": 7}), fill).unwrap();
        }
        folder
    }

    type Json = serde_json::Value;

    #[test]
    fn the_newest_is_found_by_number() {
        let folder = experiment(&[900, 1000, 20]);
        let found = EXPERIMENT.latest::<Json>(folder.path()).unwrap().unwrap();
        assert_eq!((found.iteration, found.path), (1000, EXPERIMENT.path(folder.path(), 1000)));
        assert_eq!(found.state["seed"], 7);
        assert!(found.skipped.is_empty());
        assert!(EXPERIMENT.latest::<Json>(experiment(&[]).path()).unwrap().is_none());
    }

    #[test]
    fn files_elsewhere_are_not_read() {
        for name in ["/dev/zero", "../../secret", "."] {
            let folder = experiment(&[1]);
            let sums = EXPERIMENT.path(folder.path(), 1).join(SUMS);
            let lines = fs::read_to_string(&sums).unwrap();
            fs::write(&sums, format!("{}  {name}\n{lines}", "0".repeat(64))).unwrap();
            let error = EXPERIMENT.latest::<Json>(folder.path()).unwrap_err();
            assert!(error.to_string().contains("no file of it"), "{error}");
        }
    }

    #[test]
    fn a_changed_truncated_or_missing_file_is_named_and_the_checkpoint_before_is_used() {
        for name in ["model.safetensors", "config.json", "optimizer.safetensors", STATE, SUMS] {
            type Damage = fn(&Path);
            let flip: Damage = |file| {
                let mut bytes = fs::read(file).unwrap();
                bytes[10] ^= 1;
                fs::write(file, bytes).unwrap();
            };
            let truncate: Damage = |file| {
                let bytes = fs::read(file).unwrap();
                fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
            };
            let delete: Damage = |file| fs::remove_file(file).unwrap();
            for damage in [flip, truncate, delete] {
                let folder = experiment(&[2, 4]);
                damage(&EXPERIMENT.path(folder.path(), 4).join(name));
                let found = EXPERIMENT.latest::<Json>(folder.path()).unwrap().unwrap();
                assert_eq!(found.iteration, 2);
                let [error] = &found.skipped[..] else { panic!("one was skipped") };
                // A checksum that was changed shows as a difference of the file it is of.
                assert!(matches!(error, Error::Damaged { .. }) && error.to_string().contains("ckpt_4"), "{error}");
                assert!(name == SUMS || error.to_string().contains(name), "{error}");
                damage(&EXPERIMENT.path(folder.path(), 2).join(name));
                assert!(matches!(EXPERIMENT.latest::<Json>(folder.path()), Err(Error::NothingUsable { .. })));
                // The iteration can be saved again over what is left of it.
                EXPERIMENT.save(folder.path(), 4, serde_json::json!({}), fill).unwrap();
                assert_eq!(EXPERIMENT.latest::<Json>(folder.path()).unwrap().unwrap().iteration, 4);
            }
        }
    }

    #[test]
    fn another_layout_is_refused_by_its_version() {
        let folder = experiment(&[3]);
        let path = EXPERIMENT.path(folder.path(), 3);
        let state = fs::read_to_string(path.join(STATE)).unwrap().replace("\"version\": 1", "\"version\": 2");
        let old = files::sha256(&path.join(STATE)).unwrap();
        fs::write(path.join(STATE), state).unwrap();
        let new = files::sha256(&path.join(STATE)).unwrap();
        let sums = fs::read_to_string(path.join(SUMS)).unwrap().replace(&old, &new);
        fs::write(path.join(SUMS), sums).unwrap();
        assert!(matches!(open::<Json>(&path), Err(Error::Version { found: 2, expected: 1, .. })));
    }

    #[test]
    fn leftovers_are_no_checkpoints_and_are_cleaned() {
        let folder = experiment(&[1]);
        let failed = EXPERIMENT.save(folder.path(), 2, Json::Null, |path| Err(Error::format(path, "no space")));
        assert!(failed.is_err());
        assert_eq!(names(folder.path()).unwrap(), ["ckpt_1"], "a failed save leaves nothing");
        fs::create_dir(EXPERIMENT.hidden(folder.path(), 2, "new")).unwrap();
        assert_eq!(EXPERIMENT.iterations(folder.path()).unwrap(), [1]);
        assert_eq!(EXPERIMENT.clean(folder.path()).unwrap(), [".ckpt_2.new.tmp"]);
        assert_eq!(names(folder.path()).unwrap(), ["ckpt_1"]);
    }

    #[test]
    fn pruning_keeps_the_newest() {
        let folder = experiment(&[8, 9, 10, 11]);
        EXPERIMENT.prune(folder.path(), 2).unwrap();
        assert_eq!(names(folder.path()).unwrap(), ["ckpt_10", "ckpt_11"]);
    }
}
