//! `metrics.jsonl`: one line for each step and one for each evaluation, in order.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The file, open for appending.
pub(crate) struct Metrics {
    path: PathBuf,
    file: File,
}

/// What every line has.
#[derive(Deserialize)]
struct Line {
    iteration: usize,
}

impl Metrics {
    /// Opens the file and cuts off what is later than `iteration`: the run that goes on from there writes it again. Half a
    /// line, which a killed process leaves, goes too.
    pub(crate) fn open(path: &Path, iteration: usize) -> Result<Self> {
        let opened = || -> std::io::Result<File> {
            let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
            let kept = kept(&mut BufReader::new(&file), iteration)?;
            file.set_len(kept)?;
            file.seek(SeekFrom::Start(kept))?;
            Ok(file)
        };
        let file = opened().map_err(Error::io("open", path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends a line.
    pub(crate) fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line).map_err(|error| Error::format(&self.path, error))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(Error::io("write", &self.path))
    }

    /// All lines reach the disk: before a checkpoint that counts on them.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

/// The length of the part that has whole lines up to `iteration`.
fn kept(file: &mut impl BufRead, iteration: usize) -> std::io::Result<u64> {
    let mut length = 0;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = file.read_until(b'\n', &mut line)?;
        let is_kept = || serde_json::from_slice::<Line>(&line).is_ok_and(|line| line.iteration <= iteration);
        if read == 0 || !line.ends_with(b"\n") || !is_kept() {
            return Ok(length);
        }
        length += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_keeps_whole_lines_up_to_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let line = |iteration: usize| serde_json::json!({"iteration": iteration, "loss": 0.5});
        let mut metrics = Metrics::open(&path, 0).unwrap();
        for iteration in 1..=5 {
            metrics.append(&line(iteration)).unwrap();
        }
        metrics.file.write_all(b"{\"iteration\":6,\"lo").unwrap();
        drop(metrics);

        let mut metrics = Metrics::open(&path, 3).unwrap();
        metrics.append(&line(4)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let expected: String = (1..=4).map(|iteration| format!("{}\n", line(iteration))).collect();
        assert_eq!(text, expected);
        Metrics::open(&path, 0).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}
