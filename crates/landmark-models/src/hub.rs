//! Models by name: a folder, a file, or what the Hugging Face hub's cache on this machine has of a repository.

use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo};

use crate::{Error, Result};

/// Where the model `name` is: that folder or file itself, or for the id of a repository, `organisation/name`, its folder in the cache: `cache_dir`
/// or the one that Hugging Face's tools use (`HF_HOME`). Nothing is downloaded.
///
/// # Errors
/// There is no such folder and no such file, and the cache has no such repository.
pub fn locate(name: &str, cache_dir: Option<&Path>) -> Result<PathBuf> {
    let path = PathBuf::from(name);
    if path.exists() {
        return Ok(path);
    }
    let missing = |reason: String| Error::NoModel { path: path.clone(), reason };
    let parts: Vec<&str> = name.split('/').collect();
    let is_part = |part: &&str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && !part.contains("..") && part.chars().all(known)
    };
    if parts.len() > 2 || !parts.iter().all(is_part) {
        return Err(missing("no such folder or file".into()));
    }
    let Some(cache) = cache_dir.map(|dir| Cache::new(dir.to_path_buf())).or_else(own_cache) else {
        return Err(missing("no such folder or file, and there is no home for a cache of models".into()));
    };
    let repo = cache.repo(Repo::model(name.to_string()));
    let found = repo.get("config.json").and_then(|file| Some(file.parent()?.to_path_buf()));
    found.ok_or_else(|| {
        let cache = cache.path().display();
        missing(format!(
            "no such folder or file, and no repository of that name in the cache {cache}; nothing is downloaded: \
             `hf download {name}` fetches it"
        ))
    })
}

/// The cache of Hugging Face's tools, if there is a place for it. (The library panics where there is no home.)
fn own_cache() -> Option<Cache> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(cache) = of("HF_HUB_CACHE") {
        return Some(Cache::new(cache));
    }
    let is_home = of("HF_HOME").is_some() || std::env::home_dir().is_some();
    is_home.then(Cache::from_env)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_folders_files_or_cached_repositories() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().to_str().unwrap();
        assert_eq!(locate(here, None).unwrap(), dir.path());
        let error = locate("some-org/some-model", Some(dir.path())).unwrap_err().to_string();
        assert!(error.contains("hf download some-org/some-model") && error.contains(here), "{error}");
        let repo = dir.path().join("models--some-org--some-model");
        let snapshot = repo.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        // A download that stopped before the configuration.
        assert!(locate("some-org/some-model", Some(dir.path())).is_err());
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(locate("some-org/some-model", Some(dir.path())).unwrap(), snapshot);
        for name in ["../x", "a/b/c", "/no/such", "a//b", "", "a/..b"] {
            let error = locate(name, Some(dir.path())).unwrap_err().to_string();
            assert!(error.contains("no such folder"), "{error}");
        }
    }
}
