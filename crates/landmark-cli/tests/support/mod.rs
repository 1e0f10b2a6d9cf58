//! The real binary, run as a user runs it.

// Every test file takes what it needs.
#![allow(dead_code)]

pub mod http;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The reference's command line as its authors give it.
pub const SEED: &str = "train --config_format rotary --model landmark --n_embd 1024 --n_head 8 --n_layer 12 --batch_size 16 \
    --sequence_length 512 --acc_steps 8 --wandb_project memory-llm --dataset pg19 --iterations 240000 --dropout 0.0 \
    --positional_encoder rotary --softmax_func mem_opt --mem_freq 50 --wandb --save_checkpoint_freq 20000";

/// A folder with prepared data named `pg19`, tiny.
pub fn prepared() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (set, lines) in [("train", 400), ("validation", 100)] {
        fs::create_dir_all(folder.path().join("text").join(set)).unwrap();
        let text: String = (0..lines).map(|i| format!("Chapter {i}. Call me Ishmael. ")).collect();
        fs::write(folder.path().join("text").join(set).join("1.txt"), text).unwrap();
    }
    succeed(folder.path(), "prepare --dataset pg19 --data_dir text --tokenizer bytes --out data/pg19");
    folder
}

/// `landmark` in a folder.
pub fn command(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(folder).args(arguments.split_whitespace()).stdin(Stdio::null()).env_remove("WANDB_DIR");
    command
}

/// Runs it.
pub fn landmark(folder: &Path, arguments: &str) -> Output {
    command(folder, arguments).output().unwrap()
}

/// The standard output and error of a command that must succeed.
pub fn succeed(folder: &Path, arguments: &str) -> (String, String) {
    let Output { status, stdout, stderr } = landmark(folder, arguments);
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{arguments}: {stderr}");
    (String::from_utf8(stdout).unwrap(), stderr)
}

/// The error that a command ends with, which is all that it says and one line.
pub fn error(folder: &Path, arguments: &str) -> String {
    let output = landmark(folder, arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{arguments}: {text}");
    text
}

/// Not the best of random numbers, in [0, 1), but others in each run of a test.
pub fn random() -> impl FnMut() -> f64 {
    let mut state = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}
