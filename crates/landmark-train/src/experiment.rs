//! The folder of an experiment: its lock, its metrics, its checkpoints and its summary.

use crate::checkpoint::{self, Found};
use crate::data::{Data, Identity};
use crate::error::{Error, Result};
use crate::files;
use crate::logs::{Logs, Wandb};
use crate::model::Recipe;
use crate::run::Resume;
use crate::settings::Settings;
use crate::trainer::Trainer;
use landmark_models::gpt::GptConfig;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

const SUMMARY: &str = "summary.json";

/// What a run remembers from evaluation to evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// The iterations after which the run was evaluated.
    pub iterations: Vec<usize>,
    /// The loss of the step before.
    pub train_loss: Vec<f64>,
    /// The loss on the validation data, if there are any.
    pub val_loss: Vec<f64>,
    /// The accuracy on them.
    pub val_acc: Vec<f64>,
}

/// What a checkpoint remembers beside the model and the optimizer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State<C = GptConfig> {
    pub settings: Settings<C>,
    /// The number of the batch that comes next: all that is random follows from it and the seed.
    pub next_batch: u64,
    pub data: Identity,
    pub history: History,
}

impl<C: Recipe> State<C> {
    /// Refuses to go on from a checkpoint that other settings or data made.
    fn check(&self, settings: &Settings<C>, data: &Data, found: &Found<Self>) -> Result<()> {
        settings.check_same_run(&self.settings, &found.path)?;
        let other = |setting: &str, saved: String, given: String| {
            Err(Error::OtherRun { path: found.path.clone(), setting: setting.into(), saved, given })
        };
        if self.data != data.identity() {
            return other("data", format!("{:?}", self.data), format!("{:?}", data.identity()));
        }
        let next_batch = found.iteration as u64 * settings.acc_steps as u64;
        if self.next_batch != next_batch {
            return other("next_batch", self.next_batch.to_string(), next_batch.to_string());
        }
        Ok(())
    }
}

/// `summary.json`, with the reference's names.
#[derive(Serialize)]
struct Summary<'a, C> {
    iterations: &'a [usize],
    train_loss: &'a [f64],
    val_loss: &'a [f64],
    val_pp: Vec<f64>,
    val_acc: &'a [f64],
    checkpoint: String,
    args: &'a Settings<C>,
}

/// The folder, held against other processes.
pub(crate) struct Experiment {
    folder: PathBuf,
    logs: Logs,
    /// The iteration of the newest checkpoint that is whole.
    saved: Option<usize>,
    _lock: File,
}

/// Whether a run in this folder was finished.
pub fn is_finished(folder: &Path) -> bool {
    folder.join(SUMMARY).is_file()
}

/// The folder that was taken, and the checkpoint to go on from.
type Started<C> = (Experiment, Option<Found<State<C>>>);

/// Takes the folder, and finds the checkpoint to go on from. `None`: the run was finished before. `note` is told what a user
/// may want to know.
pub(crate) fn start<C: Recipe>(
    folder: &Path,
    settings: &Settings<C>,
    data: &Data,
    resume: Resume,
    wandb: Option<&Wandb>,
    note: &mut dyn FnMut(String),
) -> Result<Option<Started<C>>> {
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let lock = lock(folder)?;
    if is_finished(folder) {
        return Ok(None);
    }
    for name in C::CHECKPOINTS.clean(folder)? {
        note(format!("removed {name}, which a killed save left behind"));
    }
    let found = match resume {
        Resume::No => match C::CHECKPOINTS.iterations(folder)?.last() {
            Some(&iteration) => return Err(Error::Unfinished { path: folder.to_path_buf(), iteration }),
            None => None,
        },
        Resume::Newest => C::CHECKPOINTS.latest::<State<C>>(folder)?,
        Resume::From(path) => {
            let (iteration, state) = checkpoint::open(path)?;
            Some(Found { path: path.to_path_buf(), iteration, state, skipped: Vec::new() })
        }
    };
    let saved = found.as_ref().map(|found| found.iteration);
    match &found {
        Some(found) => {
            for error in &found.skipped {
                note(format!("{error}; going back to iteration {}", found.iteration));
            }
        }
        None if resume != Resume::No => {
            note(format!("no checkpoint in {} yet: starting from the first iteration", folder.display()))
        }
        None => {}
    }
    if let Some(found) = &found {
        found.state.check(settings, data, found)?;
    }
    let logs = Logs::open(folder, saved.unwrap_or(0), settings, wandb, note)?;
    Ok(Some((Experiment { folder: folder.to_path_buf(), logs, saved, _lock: lock }, found)))
}

/// Two processes in one folder would remove each other's files. The system drops the lock with the process.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(".lock");
    let file = File::create(&path).map_err(Error::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: folder.to_path_buf() }),
        // Some network file systems know no locks; training there is not to be prevented.
        Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
    }
}

impl Experiment {
    /// What the run tells of itself.
    pub(crate) fn logs(&mut self) -> &mut Logs {
        &mut self.logs
    }

    /// Saves a checkpoint, unless this iteration has one. Returns its folder if one was made.
    pub(crate) fn save<C: Recipe>(
        &mut self,
        settings: &Settings<C>,
        data: &Data,
        trainer: &Trainer<C::Model>,
        history: &History,
    ) -> Result<Option<PathBuf>> {
        let iteration = trainer.iteration();
        if self.saved == Some(iteration) {
            return Ok(None);
        }
        // A resumed run cuts the logs at its checkpoint: they must not end before it.
        self.logs.sync()?;
        let state = State {
            settings: settings.clone(),
            next_batch: iteration as u64 * settings.acc_steps as u64,
            data: data.identity(),
            history: history.clone(),
        };
        let path = C::CHECKPOINTS.save(&self.folder, iteration, state, |folder| {
            data.tokenizer.as_ref().map_or(Ok(()), |tokenizer| tokenizer.save(folder))?;
            trainer.save(folder)
        })?;
        self.saved = Some(iteration);
        if let Some(keep) = settings.keep_checkpoints {
            C::CHECKPOINTS.prune(&self.folder, keep)?;
        }
        Ok(Some(path))
    }

    /// Marks the run as finished.
    pub(crate) fn finish<C: Recipe>(&self, settings: &Settings<C>, history: &History) -> Result<()> {
        let summary = Summary {
            iterations: &history.iterations,
            train_loss: &history.train_loss,
            val_loss: &history.val_loss,
            val_pp: history.val_loss.iter().map(|loss| loss.exp()).collect(),
            val_acc: &history.val_acc,
            checkpoint: C::CHECKPOINTS.path(Path::new(""), settings.iterations).display().to_string(),
            args: settings,
        };
        let path = self.folder.join(SUMMARY);
        let summary = serde_json::to_vec_pretty(&summary).map_err(|error| Error::format(&path, error))?;
        files::write(&path, &summary)
    }
}
