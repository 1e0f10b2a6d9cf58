//! What a training run tells of itself, read back: by Python's `tensorboard` and `wandb` where they are installed, and the curves.

mod support;

use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{SEED, landmark, prepared, succeed};

/// Of two values of a flag the last one counts.
const SMALL: &str = "--n_embd 32 --n_layer 1 --batch_size 2 --acc_steps 1 --iterations 20 --eval_freq 5 --save_checkpoint_freq 4 \
    --sample_freq 10 --sample_tokens 9 --exp_name e";

/// A Python that has the packages, if this machine has one. `LANDMARK_PYTHON` names another than `python3`.
fn python() -> Option<OsString> {
    let python = std::env::var_os("LANDMARK_PYTHON").unwrap_or("python3".into());
    let has = Command::new(&python).args(["-c", "import tensorboard, wandb, yaml"]).output();
    if has.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    println!("skipped: {} has no tensorboard and wandb (LANDMARK_PYTHON names another one)", python.display());
    None
}

/// What a script of this folder prints.
fn script(python: &OsString, name: &str, arguments: &[&Path]) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name);
    let output = Command::new(python).arg(script).args(arguments).output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn offline_runs(folder: &Path) -> Vec<PathBuf> {
    let runs = fs::read_dir(folder.join("wandb")).unwrap().map(|entry| entry.unwrap().path());
    runs.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("offline-run-")).collect()
}

/// Stopped after its second iteration and killed by nothing, then resumed: one run, without a step twice.
#[test]
fn the_seeds_run_is_read_back_by_tensorboard_and_wandb() {
    let folder = prepared();
    let folder = folder.path();
    succeed(folder, &format!("{SEED} {SMALL} --time_limit 0"));
    let (_, log) = succeed(folder, &format!("{SEED} {SMALL} --resume"));
    assert!(log.contains("20 [sample] "), "{log}");
    let experiment = folder.join("exps/pg19/landmark/e");
    for file in ["loss.svg", "lr.svg", "summary.json"] {
        assert!(experiment.join(file).is_file(), "{file}");
    }
    let runs = offline_runs(folder);
    let [run] = &runs[..] else { panic!("{runs:?}") };
    let Some(python) = python() else { return };
    let read = script(&python, "read_back.py", &[&experiment, run]);

    let metrics = fs::read_to_string(experiment.join("metrics.jsonl")).unwrap();
    let metrics: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |key: &str| -> Vec<(u64, f64)> {
        let point = |line: &Value| Some((line["iteration"].as_u64()?, line.get(key)?.as_f64()?));
        metrics.iter().filter_map(point).collect()
    };
    assert_eq!((of("loss").len(), of("val_loss").len()), (20, 4));
    for (tag, key) in [("train/loss", "loss"), ("lr", "lr"), ("val/loss", "val_loss"), ("val/acc", "val_accuracy")] {
        let tensorboard: Vec<(u64, f64)> = serde_json::from_value(read["tensorboard"]["scalars"][tag].clone()).unwrap();
        let rows = read["wandb"]["history"].as_array().unwrap();
        let rows: Vec<(u64, f64)> =
            rows.iter().filter_map(|row| Some((row["_step"].as_u64()?, row.get(tag)?.as_f64()?))).collect();
        assert_eq!(rows, of(key), "{tag}");
        // Event files hold f32.
        let close = |(a, b): (&(u64, f64), &(u64, f64))| a.0 == b.0 && (a.1 - b.1).abs() <= 1e-6 * b.1.abs();
        assert!(tensorboard.len() == rows.len() && tensorboard.iter().zip(&rows).all(close), "{tag}: {tensorboard:?}");
    }
    let samples: Vec<(u64, String)> = serde_json::from_value(read["tensorboard"]["texts"]["sample"].clone()).unwrap();
    assert_eq!(samples.iter().map(|sample| sample.0).collect::<Vec<_>>(), [10, 20]);
    let wandb = &read["wandb"];
    assert_eq!(
        (&wandb["project"], &wandb["name"], &wandb["exit_code"]),
        (&json!("memory-llm"), &json!("e"), &json!(0))
    );
    for (key, value) in
        [("n_embd", json!(32)), ("dataset", json!("pg19")), ("opt", json!("adamw")), ("lr", json!(0.002))]
    {
        assert_eq!((&wandb["config"][key], &read["config_yaml"][key]), (&value, &value), "{key}");
    }
    assert_eq!(wandb["summary"]["val/loss"].as_f64(), of("val_loss").last().map(|point| point.1));
    assert_eq!(wandb["summary"], read["summary_json"]);
    assert!(read["metadata"]["args"].as_array().unwrap().contains(&json!("memory-llm")));
    assert!(wandb["output"].as_array().unwrap().iter().any(|line| line.as_str().unwrap().starts_with("5 [val] loss=")));

    let sent = script(&python, "wandb_sync.py", &[run]);
    let row = |row: &Value| (row["_step"].clone(), row["train/loss"].clone(), row["val/loss"].clone());
    let rows = |rows: &Value| rows.as_array().unwrap().iter().map(row).collect::<Vec<_>>();
    assert_eq!(rows(&sent["history"]), rows(&wandb["history"]), "{}", sent["said"]);
    assert_eq!((&sent["config"]["n_embd"], &sent["summary"]["val/loss"]), (&json!(32), &wandb["summary"]["val/loss"]));
    assert_eq!((&sent["display_name"], &sent["exit_code"]), (&json!("e"), &json!(0)));
}

#[test]
fn samples_and_plots() {
    let folder = prepared();
    let folder = folder.path();
    let base = "train --n_embd 32 --n_head 2 --n_layer 1 --batch_size 2 --acc_steps 1 --iterations 6 --dataset pg19 --sequence_length 64 \
        --mem_freq 7 --eval_freq 3";
    let sampled = |name: &str, more: &str| {
        let (_, log) = succeed(folder, &format!("{base} --exp_name {name} {more}"));
        log.lines().filter(|line| line.contains("[sample]")).map(str::to_string).collect::<Vec<_>>()
    };
    let samples = "--sample_freq 2 --sample_tokens 12 --sample_prompt Chapter";
    let landmark_samples = sampled("a", &format!("--model landmark {samples}"));
    assert_eq!(landmark_samples.len(), 3);
    assert_eq!(landmark_samples, sampled("b", &format!("--model landmark {samples}")), "a seed decides samples");
    let weights =
        |name: &str| fs::read(folder.join(format!("exps/pg19/landmark/{name}/ckpt_6/model.safetensors"))).unwrap();
    assert!(sampled("c", "--model landmark").is_empty());
    assert!(weights("a") == weights("c"), "samples change no weight");
    assert_eq!(sampled("a", &format!("--model base_rotary --sample_temperature 0 {samples}")).len(), 3);
    assert_eq!(sampled("a", &format!("--model landmark_with_cmt {samples}")).len(), 3);

    let runs = "exps/pg19/landmark/a exps/pg19/base_rotary/a";
    succeed(folder, &format!("plot {runs} --out both.svg"));
    let svg = fs::read_to_string(folder.join("both.svg")).unwrap();
    for text in ["landmark/a", "base_rotary/a", "base_rotary/a, validation", "iteration"] {
        assert!(svg.contains(text), "{text}");
    }
    for what in ["perplexity", "lr", "tokens_per_second"] {
        succeed(folder, &format!("plot {runs} --what {what}"));
        assert!(fs::read_to_string(folder.join("plot.svg")).unwrap().contains("</svg>"));
    }
    for (arguments, reason) in [
        ("plot nowhere", "nowhere: no such folder"),
        ("plot data", "data: no run, as there is no metrics.jsonl in it"),
        ("plot exps/pg19/landmark/a --out missing/plot.svg", "--out missing/plot.svg"),
        ("train --dataset pg19 --sample_tokens 5", "--sample_tokens is refused: it needs --sample_freq N"),
        ("train --dataset pg19 --sample_freq 0", "expected at least 1"),
    ] {
        let output = landmark(folder, arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && error.contains(reason), "{arguments}: {error}");
    }
}
