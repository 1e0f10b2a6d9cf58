//! `lock`: one process at a time has a session. The system lets go of the lock when the process ends, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use crate::{Error, Result};

pub const NAME: &str = "lock";

/// Held as long as it lives.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Takes the lock of a session, or says who has it.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(NAME);
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open().map_err(Error::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = std::fs::read_to_string(&path).unwrap_or_default();
                let holder = if holder.is_empty() { "another process" } else { holder.trim() };
                let reason = format!("the session is in use: {holder} has it");
                return Err(Error::Session { path: folder.to_path_buf(), reason });
            }
            Err(TryLockError::Error(source)) => return Err(Error::io("lock", &path)(source)),
        }
        let command: Vec<String> = std::env::args().take(3).collect();
        let program = command.first().map(|path| Path::new(path).file_name().unwrap_or_default().to_string_lossy());
        let words = [&[program.unwrap_or_default().into_owned()], command.get(1..).unwrap_or_default()].concat();
        // For those who wait; that it cannot be written, on a full disk, takes nothing from the lock.
        let _ = file.set_len(0);
        let _ = file.seek(SeekFrom::Start(0));
        let _ = write!(file, "process {} ({})", std::process::id(), words.join(" "));
        Ok(Self(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.set_len(0);
    }
}
