//! The errors of this crate.

use std::path::{Path, PathBuf};

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A checkpoint is incomplete or was changed after it was written.
    #[error("checkpoint {} is damaged: {what}", path.display())]
    Damaged {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The file and what is wrong with it.
        what: String,
    },
    /// A checkpoint was written by a version of this program with another layout.
    #[error("checkpoint {} has layout version {found}, this program reads version {expected}", path.display())]
    Version {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version this program reads.
        expected: u32,
    },
    /// A setting is outside its range or does not fit another one.
    #[error("--{flag}: {message}")]
    Setting {
        /// The setting, named as the command line names it.
        flag: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A run cannot be resumed with these settings: another value would have made other weights.
    #[error("cannot resume {}: its {setting} is {saved}, this command's {given}", path.display())]
    OtherRun {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The setting that differs.
        setting: String,
        /// Its value in the checkpoint.
        saved: String,
        /// Its value now.
        given: String,
    },
    /// The experiment's folder holds a run that was not finished, and nobody asked to resume it.
    #[error(
        "{} holds an unfinished run at iteration {iteration}: pass --resume to go on with it, or --exp_name NAME for a new one",
        path.display()
    )]
    Unfinished {
        /// The experiment's folder.
        path: PathBuf,
        /// How far the run came.
        iteration: usize,
    },
    /// There are checkpoints, but none that can be used.
    #[error("{} has checkpoints, none of them usable; the newest: {newest}", path.display())]
    NothingUsable {
        /// The experiment's folder.
        path: PathBuf,
        /// What is wrong with the newest one.
        newest: Box<Error>,
    },
    /// Another process trains in the same folder.
    #[error("another process is training in {}", path.display())]
    Locked {
        /// The experiment's folder.
        path: PathBuf,
    },
    /// The loss is no longer a number, so that no further step means anything.
    #[error("the loss of iteration {iteration} is {loss}: lower --lr or set --grad_clip 1")]
    Diverged {
        /// The iteration, the first being 1.
        iteration: usize,
        /// The loss.
        loss: f64,
    },
    /// A sample could not be made.
    #[error("the sample after a training step: {0}")]
    Sample(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An error of the data.
    #[error(transparent)]
    Data(#[from] landmark_data::Error),
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] landmark_models::Error),
    /// An error of candle's.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of a call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What turns an I/O error into one that says what was done to which file.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn format(path: &Path, message: impl ToString) -> Self {
        Self::Format { path: path.to_path_buf(), message: message.to_string() }
    }

    pub(crate) fn setting(flag: &'static str, message: impl ToString) -> Self {
        Self::Setting { flag, message: message.to_string() }
    }
}
