//! Folders for what is read from files. Each thread has one of its own, which goes when the thread ends.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A new folder of this thread's.
pub fn folder(name: &str) -> PathBuf {
    thread_local! {
        static PLACE: TempDir = TempDir::with_prefix("landmark-fuzz-").expect("a folder for files can be made");
    }
    let folder = PLACE.with(|place| place.path().join(name));
    fs::create_dir_all(&folder).expect("a folder can be made");
    folder
}

/// Takes away what is in a folder, and puts these files there.
pub fn fill(folder: &Path, files: &[(String, Vec<u8>)]) {
    if folder.exists() {
        fs::remove_dir_all(folder).expect("a folder can be removed");
    }
    fs::create_dir_all(folder).expect("a folder can be made");
    files.iter().for_each(|(name, bytes)| put(&folder.join(name), bytes));
}

/// Writes a file.
pub fn put(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("a file can be written");
}

/// The files of a folder, in the order of their names.
pub fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let names = fs::read_dir(folder).expect("a folder that is there").flatten();
    let mut names: Vec<String> = names.map(|entry| entry.file_name().into_string().expect("names are UTF-8")).collect();
    names.sort();
    let file = |name: String| (name.clone(), fs::read(folder.join(name)).expect("a file that is there"));
    names.into_iter().map(file).collect()
}
