//! What reads bytes from elsewhere, given any bytes.
//!
//! A [`Target`] is a function of bytes that does with them what the program does with a request's body, a session's folder, a model's file.
//! Whatever they are, it comes to its end: no panic, no hang, no memory that the bytes do not account for. libFuzzer looks for bytes
//! with which it does not (`fuzz_targets/fuzz.rs`, `scripts/fuzz.sh`); `tests/replay.rs` runs those that were found, and others of their kind, from `corpus/`.

mod http;
mod memory;
mod models;
mod place;
mod session;
mod text;

/// Something that reads bytes from elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which is that of its corpus.
    pub name: &'static str,
    /// Reads the bytes; whether they were what is read there. Panics if something is wrong with what it reads them with.
    pub run: fn(&[u8]) -> bool,
    /// Bytes that are, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 8] = [
    Target { name: "request", run: http::run, seeds: http::seeds },
    Target { name: "template", run: text::template, seeds: text::template_seeds },
    Target { name: "session", run: session::run, seeds: session::seeds },
    Target { name: "model", run: models::folder, seeds: models::folder_seeds },
    Target { name: "gguf", run: models::gguf, seeds: models::gguf_seeds },
    Target { name: "tokens", run: text::tokens, seeds: text::tokens_seeds },
    Target { name: "tokenizer", run: text::tokenizer, seeds: text::tokenizer_seeds },
    Target { name: "prepare", run: text::prepare, seeds: text::prepare_seeds },
];

/// The target of a name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
