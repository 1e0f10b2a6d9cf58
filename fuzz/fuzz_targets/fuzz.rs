//! All targets under libFuzzer: `LANDMARK_FUZZ_TARGET` names one. With `LANDMARK_FUZZ_SEEDS` its seeds are written into that folder, and nothing else is done.
#![no_main]

use landmark_fuzz::Target;
use std::sync::OnceLock;

static TARGET: OnceLock<&Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(init: start(), |bytes: &[u8]| {
    (TARGET.get().expect("it was set at the start").run)(bytes);
});

fn start() {
    // Panics that are caught are no findings, and one that is not ends the process in any case. libfuzzer_sys ends it at all of them.
    drop(std::panic::take_hook());
    let name = std::env::var("LANDMARK_FUZZ_TARGET").unwrap_or_default();
    let Some(target) = landmark_fuzz::target(&name) else {
        let names: Vec<&str> = landmark_fuzz::TARGETS.iter().map(|target| target.name).collect();
        eprintln!("LANDMARK_FUZZ_TARGET: expected one of {}", names.join(", "));
        std::process::exit(2);
    };
    if let Some(folder) = std::env::var_os("LANDMARK_FUZZ_SEEDS") {
        for (i, seed) in (target.seeds)().iter().enumerate() {
            let path = std::path::Path::new(&folder).join(format!("seed-{i}"));
            std::fs::write(path, seed).expect("the folder for seeds can be written to");
        }
        std::process::exit(0);
    }
    // What is made once is made now: no input's time is spent on it.
    (target.run)(&(target.seeds)()[0]);
    TARGET.get_or_init(|| target);
}
