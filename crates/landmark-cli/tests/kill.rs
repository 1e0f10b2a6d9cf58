//! kill -9 at random moments of a training run, also in the middle of a save, and --resume each time: the weights must be
//! those of a run that was never killed.

#![cfg(unix)]

mod support;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::random;

const ITERATIONS: usize = 60;

fn train(folder: &Path, device: &str, results: &str, resume: bool) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    let flags = "train --config_format rotary --model landmark --n_embd 64 --n_head 2 --n_layer 2 --batch_size 4 \
        --sequence_length 64 --acc_steps 2 --dataset tiny --mem_freq 7 --eval_freq 10 --exp_name run \
        --save_checkpoint_freq 2 --grad_clip 1.0 --data_dir . --results_base_folder";
    command.current_dir(folder).args(flags.split_whitespace()).arg(results);
    // A GPU does not drop.
    command.args(["--device", device, "--dropout", if device == "cpu" { "0.1" } else { "0.0" }]);
    command.args(["--iterations", &ITERATIONS.to_string()]).args(resume.then_some("--resume"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn run_to_the_end(mut command: Command) -> Duration {
    let begun = Instant::now();
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    begun.elapsed()
}

/// Whether a checkpoint is being made or removed.
fn is_saving(experiment: &Path) -> bool {
    let Ok(entries) = fs::read_dir(experiment) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with(".tmp"))
}

/// Kills the process: at once, or, `in_a_save`, when the next save has begun. Whether it still ran.
fn kill(mut child: Child, experiment: &Path, in_a_save: bool, deeper: Duration) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while in_a_save && !is_saving(experiment) && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "no save began");
        std::hint::spin_loop();
    }
    if in_a_save {
        std::thread::sleep(deeper);
    }
    let ran = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    ran
}

#[test]
fn killed_runs_end_as_one_that_was_never_killed() {
    kill_and_resume("cpu", 20, 10);
}

#[cfg(feature = "cuda")]
#[test]
fn so_do_runs_on_a_gpu() {
    if let Err(error) = candle_core::Device::new_cuda(0) {
        return eprintln!("skipped: no GPU here ({error})");
    }
    kill_and_resume("cuda", 10, 4);
}

/// `wanted` kills of a running process, of which `wanted_in_a_save` as soon as a save has begun.
fn kill_and_resume(device: &str, wanted: usize, wanted_in_a_save: usize) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let text: String = (0..800).map(|i| format!("{i} green bottles hanging on the wall, {} fall. ", i % 7)).collect();
    fs::write(folder.join("tiny.txt"), text).unwrap();
    let prepare = "prepare --dataset text --data_dir tiny.txt --tokenizer bytes --out tiny";
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    assert!(command.current_dir(folder).args(prepare.split_whitespace()).output().unwrap().status.success());

    let whole = run_to_the_end(train(folder, device, "whole", false));
    let mut random = random();
    let (mut kills, mut in_a_save, mut leftovers) = (0, 0, 0);
    let mut round = 0;
    while kills < wanted {
        round += 1;
        assert!(round < 4 * wanted, "too many runs ended before they were killed");
        let results = format!("killed{round}");
        let experiment = folder.join(&results).join("tiny/landmark/run");
        let mut resume = false;
        // Several kills to a run, so that resumed runs are killed too.
        while !experiment.join("summary.json").exists() {
            let child = train(folder, device, &results, resume).spawn().unwrap();
            resume = true;
            let while_saving = in_a_save < wanted_in_a_save;
            if kills < wanted && while_saving {
                // Saves take milliseconds: somewhere between their beginning and a little after.
                let hit = kill(child, &experiment, true, Duration::from_secs_f64(random() * 3e-3));
                leftovers += usize::from(hit && is_saving(&experiment));
                kills += usize::from(hit);
                in_a_save += usize::from(hit);
            } else if kills < wanted {
                std::thread::sleep(whole.mul_f64(random() * 0.7));
                kills += usize::from(kill(child, &experiment, false, Duration::ZERO));
            } else {
                let output = child.wait_with_output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
        }
        for file in ["model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"] {
            let of = |results: &str| {
                let experiment = folder.join(results).join("tiny/landmark/run");
                fs::read(experiment.join(format!("ckpt_{ITERATIONS}")).join(file)).unwrap()
            };
            assert!(of("whole") == of(&results), "{results}: {file} is not that of the run that was never killed");
        }
        assert!(!is_saving(&experiment), "leftovers were not cleaned");
    }
    println!("{kills} kills in {round} runs, {in_a_save} as a save went on, {leftovers} of which cut it short");
    assert!(leftovers > 0, "no kill cut a save short");
}
