//! Results that are kept as soon as they are known, so that a long measurement which was stopped goes on from there: a file for
//! each, under the hash of all that decides it.

use crate::files;
use anyhow::Context;
use landmark_inference::hex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// A file.
#[derive(Serialize, Deserialize)]
struct Kept<K, R> {
    key: K,
    report: R,
}

/// Where results are kept.
pub struct Folder(PathBuf);

impl Folder {
    /// `out/cells`, which is made for the first result.
    pub fn new(out: &Path) -> Self {
        Self(out.join("cells"))
    }

    /// What is kept under `key`.
    pub fn get<K: Serialize + DeserializeOwned + PartialEq, R: DeserializeOwned>(
        &self,
        key: &K,
    ) -> anyhow::Result<Option<R>> {
        let path = self.path(key)?;
        let Ok(bytes) = fs::read(&path) else { return Ok(None) };
        Ok(match serde_json::from_slice::<Kept<K, R>>(&bytes) {
            Ok(kept) if kept.key == *key => Some(kept.report),
            Ok(_) => None,
            Err(error) => {
                eprintln!("{}: {error}; computed again", path.display());
                None
            }
        })
    }

    /// Keeps a result, in place of an earlier one.
    pub fn put<K: Serialize, R: Serialize>(&self, key: &K, report: &R) -> anyhow::Result<()> {
        let path = self.path(key)?;
        let text = serde_json::to_string_pretty(&Kept { key, report })? + "\n";
        let write = || fs::create_dir_all(&self.0).and_then(|()| files::write(&path, text.as_bytes()));
        write().with_context(|| format!("--out: cannot write {}", path.display()))
    }

    fn path<K: Serialize>(&self, key: &K) -> anyhow::Result<PathBuf> {
        let hash = hex(&Sha256::digest(serde_json::to_vec(key)?));
        Ok(self.0.join(format!("{}.json", &hash[..16])))
    }
}

/// SHA-256 of tokens, which come in parts.
pub fn hash_of_tokens(parts: impl IntoIterator<Item = anyhow::Result<Vec<u32>>>) -> anyhow::Result<String> {
    let mut hasher = Sha256::new();
    for part in parts {
        part?.iter().for_each(|id| hasher.update(id.to_le_bytes()));
    }
    Ok(hex(&hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found_by_its_key_alone() {
        let out = tempfile::tempdir().unwrap();
        let folder = Folder::new(out.path());
        let key = |n: u32| ("a".to_string(), n);
        folder.put(&key(1), &vec![1.5]).unwrap();
        folder.put(&key(1), &vec![2.5]).unwrap();
        assert_eq!(folder.get(&key(1)).unwrap(), Some(vec![2.5]));
        assert_eq!(folder.get::<_, Vec<f64>>(&key(2)).unwrap(), None);
        // A damaged file is no result.
        fs::write(folder.path(&key(1)).unwrap(), "{").unwrap();
        assert_eq!(folder.get::<_, Vec<f64>>(&key(1)).unwrap(), None);
    }
}
