//! Ctrl-C, for commands that end at a clean place: after a chunk, or after a token.

use anyhow::Context;
use std::sync::atomic::{AtomicBool, Ordering};

/// The exit code of a command that was interrupted, as shells expect it.
pub const EXIT_CODE: u8 = 130;

/// Set by Ctrl-C.
pub static STOP: AtomicBool = AtomicBool::new(false);

/// Whether there is nothing to be stopped but the command.
static AT_ONCE: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C, or SIGTERM, asks the command to stop; a second one stops it at once.
pub fn watch() -> anyhow::Result<()> {
    let stop = || {
        if STOP.swap(true, Ordering::Relaxed) || AT_ONCE.load(Ordering::Relaxed) {
            std::process::exit(EXIT_CODE.into());
        }
    };
    ctrlc::set_handler(stop).context("cannot watch for Ctrl-C")
}

/// Whether Ctrl-C ends the command at once.
pub fn stop_at_once(yes: bool) {
    AT_ONCE.store(yes, Ordering::Relaxed);
}

/// What was stopped has stopped, and the command goes on.
pub fn clear() {
    STOP.store(false, Ordering::Relaxed);
}

/// Whether somebody asked to stop.
pub fn requested() -> bool {
    STOP.load(Ordering::Relaxed)
}
