//! A session's folder: made whole or not at all, and removed.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use super::{INDEX, TOKENS, head, journal, lock};
use crate::{Error, Result};

/// Writes a file beside, and puts it in the place of another once it is on the disk.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_extension("tmp");
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(Error::io("write", path))
}

/// Copies the first bytes of a file.
pub fn copy(from: &Path, to: &Path, length: u64) -> Result<()> {
    let copy = || {
        fs::copy(from, to)?;
        let file = OpenOptions::new().write(true).open(to)?;
        file.set_len(length)?;
        file.sync_all()
    };
    copy().map_err(Error::io("copy", from))
}

#[cfg(unix)]
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("write", folder))
}

/// Elsewhere folders cannot be waited for.
#[cfg(not(unix))]
pub fn sync_folder(_: &Path) -> Result<()> {
    Ok(())
}

/// Makes a folder beside with `fill`, and gives it its name when it is whole.
pub fn build(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let refuse = |reason: &str| Err(Error::Session { path: folder.to_path_buf(), reason: reason.into() });
    if folder.symlink_metadata().is_ok() {
        return refuse("there is something of this name already");
    }
    let Some(name) = folder.file_name().and_then(|name| name.to_str()) else {
        return refuse("a session's folder needs a name of its own, in UTF-8");
    };
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = parent.join(format!(".{name}.tmp"));
    let make = || {
        fs::create_dir_all(parent)?;
        fs::create_dir(&beside)
    };
    match make() {
        // Of a process that did not come to its end.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            remove(&beside)?;
            fs::create_dir(&beside).map_err(Error::io("make", &beside))?;
        }
        made => made.map_err(Error::io("make", &beside))?,
    }
    let filled = fill(&beside).and_then(|()| {
        sync_folder(&beside)?;
        fs::rename(&beside, folder).map_err(Error::io("make", folder))?;
        sync_folder(parent)
    });
    if filled.is_err() {
        let _ = remove(&beside);
    }
    filled
}

/// Removes a session's files, the head first, and its folder if nothing else is in it.
pub fn remove(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let is_ours = |name: &str| {
        let plain = [head::NAME, journal::NAME, lock::NAME, TOKENS, INDEX, "tail-0", "tail-1", "tail-2"];
        let stem = name.strip_suffix(".tmp").unwrap_or(name);
        let stem = if stem == "session" { head::NAME } else { stem };
        let number = stem.strip_prefix("blocks-").map(|rest| rest.trim_end_matches(".seg").trim_end_matches(".idx"));
        plain.contains(&stem)
            || number.is_some_and(|number| number.len() >= 6 && number.bytes().all(|b| b.is_ascii_digit()))
    };
    let mut names: Vec<_> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| is_ours(name));
    // Without it, it is no session any more, however far this comes.
    names.sort_by_key(|name| name != head::NAME);
    for name in names {
        let path = folder.join(name);
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    }
    fs::remove_dir(folder).map_err(Error::io("remove", folder))
}
