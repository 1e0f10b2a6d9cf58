//! What happens to a training run when the disk is full, the folder cannot be written, or a checkpoint was damaged.

#![cfg(unix)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use support::{landmark, succeed};

const TRAIN: &str = "train --model landmark --n_embd 32 --n_head 2 --n_layer 1 --batch_size 2 --acc_steps 1 --dataset tiny \
    --sequence_length 64 --mem_freq 7 --iterations 8 --save_checkpoint_freq 4 --data_dir .";

/// The last line of a command that fails, which is its error.
fn error(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text.lines().last().unwrap().to_string()
}

fn prepared() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..400).map(|i| format!("{i} green bottles hanging on the wall. ")).collect();
    fs::write(folder.path().join("tiny.txt"), text).unwrap();
    succeed(folder.path(), "prepare --dataset text --data_dir tiny.txt --tokenizer bytes --out tiny");
    folder
}

fn experiment(folder: &Path, name: &str) -> PathBuf {
    folder.join("exps/tiny/landmark").join(name)
}

fn weights(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(experiment(folder, name).join("ckpt_8/model.safetensors")).unwrap()
}

/// With no more room for a checkpoint (files may have 48 KiB, its weights need more): an error that names the file, no
/// half checkpoint, the one before still there, and with room again the same weights as ever.
#[test]
fn a_full_disk_stops_the_run_and_keeps_its_last_checkpoint() {
    let folder = prepared();
    let folder = folder.path();
    succeed(folder, &format!("{TRAIN} --exp_name whole"));
    succeed(folder, &format!("{TRAIN} --exp_name full --time_limit 0"));
    let limited =
        format!("trap '' XFSZ; ulimit -f 48; exec {} {TRAIN} --exp_name full --resume", env!("CARGO_BIN_EXE_landmark"));
    let output = Command::new("bash").current_dir(folder).args(["-c", &limited]).output().unwrap();
    let error = error(&output);
    assert!(error.contains("model.safetensors") && error.contains("File too large"), "{error}");
    let mut left: Vec<String> = fs::read_dir(experiment(folder, "full"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("ckpt"))
        .collect();
    left.sort();
    assert_eq!(left, ["ckpt_1"]);
    succeed(folder, &format!("{TRAIN} --exp_name full --resume"));
    assert!(weights(folder, "whole") == weights(folder, "full"));
}

#[test]
fn a_full_device_is_named() {
    if !Path::new("/dev/full").exists() {
        println!("skipped: this system has no /dev/full");
        return;
    }
    let folder = prepared();
    succeed(folder.path(), &format!("{TRAIN} --exp_name a"));
    let error = error(&landmark(folder.path(), "plot exps/tiny/landmark/a --out /dev/full"));
    assert!(error.contains("--out /dev/full") && error.contains("No space left"), "{error}");
}

/// Folders in which not even root can write, and files where a folder should be.
#[test]
fn a_folder_that_cannot_be_written_is_named_before_the_first_step() {
    let folder = prepared();
    for results in ["/proc/landmark", "tiny.txt/exps", "/dev/null"] {
        if results.starts_with("/proc") && !Path::new("/proc/self").exists() {
            println!("skipped: this system has no /proc");
            continue;
        }
        let output = landmark(folder.path(), &format!("{TRAIN} --results_base_folder {results}"));
        let error = error(&output);
        assert!(error.starts_with(&format!("landmark: error: cannot create {results}/")), "{error}");
        assert!(!String::from_utf8_lossy(&output.stderr).contains("loss="), "it trained");
    }
    let output = landmark(folder.path(), &format!("{TRAIN} --exp_name w --wandb"));
    assert!(output.status.success());
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(folder.path()).env("WANDB_DIR", "tiny.txt");
    let output = command.args(format!("{TRAIN} --exp_name v --wandb").split_whitespace()).output().unwrap();
    assert!(error(&output).contains("cannot create tiny.txt/wandb"), "{}", error(&output));
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_taken() {
    let folder = prepared();
    let folder = folder.path();
    succeed(folder, &format!("{TRAIN} --exp_name whole"));
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 3] = [
        ("model.safetensors is not what was written", |checkpoint| {
            let path = checkpoint.join("model.safetensors");
            let length = fs::metadata(&path).unwrap().len();
            fs::File::options().write(true).open(path).unwrap().set_len(length / 2).unwrap();
        }),
        ("optimizer.safetensors", |checkpoint| fs::remove_file(checkpoint.join("optimizer.safetensors")).unwrap()),
        ("has layout version 99, this program reads version 1", |checkpoint| {
            let state = fs::read_to_string(checkpoint.join("state.json")).unwrap();
            fs::write(checkpoint.join("state.json"), state.replace("\"version\": 1,", "\"version\": 99,")).unwrap();
            // A checkpoint of another version is whole in itself.
            let sum = "ls | grep -v SHA256SUMS | xargs sha256sum > SHA256SUMS";
            assert!(Command::new("sh").current_dir(checkpoint).args(["-c", sum]).status().unwrap().success());
        }),
    ];
    for (number, (reason, damage)) in damages.into_iter().enumerate() {
        let line = format!("{TRAIN} --exp_name d{number}");
        succeed(folder, &format!("{line} --time_limit 0"));
        // As if it had been killed after its last save.
        succeed(folder, &format!("{line} --resume"));
        let experiment = experiment(folder, &format!("d{number}"));
        fs::remove_file(experiment.join("summary.json")).unwrap();
        damage(&experiment.join("ckpt_8"));
        let (_, log) = succeed(folder, &format!("{line} --resume"));
        assert!(log.contains(reason) && log.contains("going back to iteration 4"), "{log}");
        assert!(weights(folder, "whole") == weights(folder, &format!("d{number}")));

        fs::remove_file(experiment.join("summary.json")).unwrap();
        for iteration in [1, 4, 8] {
            damage(&experiment.join(format!("ckpt_{iteration}")));
        }
        let error = error(&landmark(folder, &format!("{line} --resume")));
        assert!(error.contains("none of them usable") && error.contains(reason), "{error}");
    }
}
