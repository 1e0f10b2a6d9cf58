//! Files that appear whole or not at all: written under another name, synced to the disk and then renamed, so that a file by the final
//! name is always a whole one, whenever the machine stops.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// An error of the system's, at a path.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}

/// Writes `path`, which is replaced at once or not at all.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut name = path.as_os_str().to_os_string();
    name.push(".partial");
    let partial = PathBuf::from(name);
    write(&partial)?;
    File::open(&partial).and_then(|file| file.sync_all()).map_err(at(&partial))?;
    fs::rename(&partial, path).map_err(at(path))
}
