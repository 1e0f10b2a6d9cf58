//! What a model is known by, wherever it is.

use anyhow::Context;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::Path;

/// SHA-256 of a model's files, and of its adapter's.
pub fn hash_of_model(folder: &Path, adapter: Option<&Path>) -> anyhow::Result<String> {
    let mut hasher = Sha256::new();
    let adapter = adapter.map(|adapter| landmark_models::llama::ADAPTER_FILES.map(|name| adapter.join(name)));
    let files = match folder.is_file() {
        true => vec![folder.to_path_buf()],
        false => [vec![folder.join("config.json")], landmark_models::llama::weight_files(folder)?].concat(),
    };
    for path in files.into_iter().chain(adapter.into_iter().flatten()) {
        let mut read = || std::io::copy(&mut File::open(&path)?, &mut hasher);
        read().with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(hex(&hasher.finalize()))
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
