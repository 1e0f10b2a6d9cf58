//! What a server is started with.

use crate::Keys;
use landmark_inference::{CacheFlags, ModelFlags, Room};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What a server is started with.
pub struct Settings {
    /// Which model.
    pub model: ModelFlags,
    /// How it reads. It has to be through the landmark cache, with all blocks kept.
    pub cache: CacheFlags,
    /// What clients call the model.
    pub name: String,
    /// How a conversation is written (Jinja), in place of the model's own template.
    pub chat_template: Option<String>,
    /// The folder that sessions are in; it is made if it is missing.
    pub sessions: PathBuf,
    /// Memory for blocks of a session that are in use, for each request that reads one.
    pub room: Room,
    /// The address to listen on.
    pub host: IpAddr,
    /// The port; 0: one that is free.
    pub port: u16,
    /// Who may ask.
    pub keys: Keys,
    /// What one client cannot take from the others.
    pub limits: Limits,
    /// The command that, with `html` or `pdf` after it, does what [`crate::convert`] does: this program's own, usually. Empty: such files are refused.
    pub converter: Vec<OsString>,
}

/// What one client cannot take from the others. What is over a limit is refused, and never cut.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body: u64,
    /// Tokens of a prompt, or of a text that is appended.
    pub prompt_tokens: usize,
    /// Tokens that a request may ask for in each choice.
    pub new_tokens: usize,
    /// How long a request may take, the waiting included.
    pub time: Duration,
    /// Requests that are worked on at once.
    pub parallel: usize,
    /// Requests that wait for their turn.
    pub queue: usize,
    /// Bytes of memory for prompts that were read, to be gone on with.
    pub kept: u64,
    /// Bytes that a session may take of the disk; `None`: what there is.
    pub session_disk: Option<u64>,
    /// Bytes that all sessions of a key may take; `None`: what there is.
    pub key_disk: Option<u64>,
    /// Connections at once; more wait to be taken.
    pub connections: usize,
    /// How long requests may go on once the server is told to end.
    pub grace: Duration,
}
