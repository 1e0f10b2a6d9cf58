//! Files that appear whole or not at all.
//!
//! A file is written under a hidden temporary name beside its destination, flushed to the disk, then renamed over it. A
//! reader (also one that has the old file memory-mapped) never sees half a file, and an interrupted run leaves the old one.

use std::ffi::OsString;
#[cfg(unix)]
use std::fs::File;
use std::io::Write;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::{Error, Result};

/// The folder that `path` lies in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A temporary file in the folder of `path`; removed again unless [`commit`] gives it its name.
pub(crate) fn temporary(path: &Path) -> Result<NamedTempFile> {
    let mut prefix = OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    // The library's default is "owner only", which would survive the rename and hide a shared corpus from its users.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder_of(path)).map_err(Error::io(path))
}

/// Flushes `file` to the disk and renames it to `path`.
pub(crate) fn commit(file: NamedTempFile, path: &Path) -> Result<()> {
    file.as_file().sync_all().map_err(Error::io(path))?;
    file.persist(path).map_err(|e| Error::Io { path: path.to_path_buf(), source: e.error })?;
    sync_folder(path)
}

/// Renames the complete and flushed file `from` to `to`, on the same disk.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(Error::io(to))?;
    sync_folder(to)
}

/// A rename is durable only once the folder of `path` is. Windows cannot open folders, and does not need it.
fn sync_folder(path: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder_of(path)).and_then(|folder| folder.sync_all()).map_err(Error::io(path))?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Writes a small file whole.
pub(crate) fn write(path: &Path, contents: &[u8]) -> Result<()> {
    let mut file = temporary(path)?;
    file.write_all(contents).map_err(Error::io(path))?;
    commit(file, path)
}
