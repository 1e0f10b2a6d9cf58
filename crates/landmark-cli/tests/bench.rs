//! `landmark bench` of the real binary.

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn bench(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(folder).args(["bench", "op", "--lengths", "64", "--repeats", "1", "--json", "rows.jsonl"]);
    let output = command.args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The rows that a run wrote, and what it printed.
fn rows(folder: &Path, output: &Output) -> (Vec<Value>, String) {
    let text = fs::read_to_string(folder.join("rows.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(fs::read_dir(folder).unwrap().filter(|e| e.as_ref().unwrap().path().ends_with("partial")).count(), 0);
    (rows, String::from_utf8(output.stdout.clone()).unwrap())
}

#[test]
fn rows_without_a_peer() {
    let folder = tempfile::tempdir().unwrap();
    let output = bench(folder.path(), &["--no_peer"]);
    let (rows, table) = rows(folder.path(), &output);
    let metrics: Vec<_> = rows.iter().map(|row| row["metric"].as_str().unwrap()).collect();
    assert_eq!(metrics, ["forward ms", "forward+backward ms"]);
    for row in &rows {
        let mut names: Vec<_> = row.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort();
        assert_eq!(names, ["case", "metric", "ours", "peer", "peer_value", "ratio"]);
        assert_eq!(row["case"], "T 64 H 8 D 64 block 51");
        assert!(row["ours"].as_f64().unwrap() > 0. && row["peer_value"].is_null() && row["ratio"].is_null(), "{row}");
    }
    assert!(table.contains("not asked") && table.contains("GFLOP/s"), "{table}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("torch"));
}

#[test]
fn a_missing_peer_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let output = bench(folder.path(), &["--python", "no/such/python"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.starts_with("torch missing") && stderr.contains("pip install torch"), "{stderr}");
    let (rows, table) = rows(folder.path(), &output);
    assert!(table.contains("torch missing"), "{table}");
    assert!(rows.iter().all(|row| row["peer"] == "torch missing" && row["ratio"].is_null()));
}

/// A Python that says what a script would.
#[cfg(unix)]
fn python(folder: &Path, script: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("python");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

#[cfg(unix)]
#[test]
fn a_python_without_torch_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let python = python(folder.path(), r#"echo '{"error": "No module named torch"}'"#);
    let output = bench(folder.path(), &["--python", &python]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("No module named torch") && stderr.contains("pip install torch"), "{stderr}");
}

#[cfg(unix)]
#[test]
fn the_ratio_is_ours_over_the_peers() {
    let folder = tempfile::tempdir().unwrap();
    let script = r#"echo '{"torch": "9.9"}'; while read line; do echo '{"seconds": [0.5, 2, 0.25]}'; done"#;
    let output = bench(folder.path(), &["--python", &python(folder.path(), script)]);
    for row in rows(folder.path(), &output).0 {
        assert_eq!((row["peer"].as_str(), row["peer_value"].as_f64()), (Some("torch 9.9"), Some(500.)));
        assert!((row["ratio"].as_f64().unwrap() - row["ours"].as_f64().unwrap() / 500.).abs() < 1e-12);
    }
}

fn error(arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    let output = command.current_dir(folder.path()).args(["bench", "op"]).args(arguments).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{arguments:?}: {text}");
    text
}

/// A GPU that is not there is an error, and no flag of the other device is taken and ignored.
#[test]
fn devices_and_their_flags() {
    let text = error(&["--device", "cuda:99"]);
    assert!(text.contains("--device cuda:99: ") && text.contains("--device cpu"), "{text}");
    if cfg!(not(feature = "cuda")) {
        assert!(text.contains("this build has no CUDA; build it with `cargo build"), "{text}");
    }
    for flag in [["--shape", "1,2,64,32"], ["--authors", "somewhere"], ["--olmo", "somewhere"]] {
        let text = error(&flag);
        assert!(text.contains(&format!("{} is refused: it is for --device cuda", flag[0])), "{text}");
    }
    assert!(error(&["--block", "51,1"]).contains("--block 1: expected at least 2"));
}

#[test]
fn every_block_that_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let output = bench(folder.path(), &["--no_peer", "--block", "16,64", "--heads", "2", "--head_dim", "32"]);
    let cases: Vec<_> = rows(folder.path(), &output).0.iter().map(|row| row["case"].to_string()).collect();
    let (first, second) = (r#""T 64 H 2 D 32 block 16""#, r#""T 64 H 2 D 32 block 64""#);
    assert_eq!(cases, [first, first, second, second]);
}
