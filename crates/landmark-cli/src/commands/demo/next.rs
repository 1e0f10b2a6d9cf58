//! Where to go after the demonstration.

use std::path::Path;

/// Commands that work as they stand, where the demonstration ran.
pub fn commands(model: &Path, text: &Path) -> Vec<String> {
    let program = std::env::args().next().unwrap_or_else(|| "landmark".into());
    let words = [program, model.display().to_string(), text.display().to_string()];
    let [program, model, text] = words.map(|word| quoted(&word));
    vec![
        format!("{program} demo --key 31415 --depth 0.8"),
        format!(
            "{program} passkey --checkpoint {model} --filler {text} --keys 5 --lengths 2048,32768 --without_retrieval"
        ),
        format!("{program} eval --checkpoint {model} --file {text} --use_cache --eval_seq_length 16384"),
        format!("{program} generate --checkpoint {model} --file {text} --show_blocks"),
        format!("{program} train --help"),
    ]
}

/// As a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}
