//! `landmark prepare` as a user runs it: data sets, bad input of every kind, a full disk, kills.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

fn command(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(folder).arg("prepare").args(arguments.split_whitespace());
    command
}

fn prepare(folder: &Path, arguments: &str) -> Output {
    command(folder, arguments).output().unwrap()
}

/// What a preparation that succeeds prints, and says on stderr.
fn prepared(folder: &Path, arguments: &str) -> (String, String) {
    let output = prepare(folder, arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments}: {stderr}");
    (String::from_utf8(output.stdout).unwrap(), stderr)
}

/// The one line that a preparation fails with. It leaves no file in `out`.
fn error(folder: &Path, arguments: &str) -> String {
    let output = prepare(folder, arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments}: {stderr}");
    assert!(stderr.lines().count() == 1 && output.stdout.is_empty(), "{stderr}");
    assert!(fs::read_dir(folder.join("out")).is_ok_and(|mut entries| entries.next().is_none()), "{stderr}");
    stderr
}

/// A folder with these files in it.
fn folder<C: AsRef<[u8]>>(files: &[(&str, C)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }
    dir
}

fn book(sentences: std::ops::Range<usize>) -> String {
    sentences.map(|i| format!("{i} green bottles hanging on the wall, and {} of them fall. ", i % 7)).collect()
}

fn records(texts: &[&str]) -> String {
    texts.iter().map(|text| format!("{{\"text\": {text:?}, \"meta\": {{\"source\": \"x\"}}}}\n")).collect()
}

fn contents(folder: &Path, out: &str) -> Vec<Vec<u8>> {
    let mut names: Vec<_> = fs::read_dir(folder.join(out)).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names.into_iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn pg19_with_every_tokenizer() {
    let files =
        [("pg19/train/1.txt", book(0..400)), ("pg19/validation/2.txt", book(7..99)), ("pg19/test/3.txt", book(5..50))];
    let dir = folder(&files);
    for (tokenizer, entries) in
        [("--tokenizer gpt2", 50_257u32), ("--tokenizer bytes", 258), ("--train_tokenizer 280 --split_digits", 280)]
    {
        let (stdout, _) = prepared(dir.path(), &format!("--dataset pg19 --data_dir pg19 {tokenizer}"));
        assert!(stdout.starts_with("data/pg19: ") && stdout.contains(" test tokens of 3 documents ("), "{stdout}");
        for set in ["train", "validation", "test"] {
            let file = fs::read(dir.path().join(format!("data/pg19/{set}.tokens"))).unwrap();
            assert_eq!(u32::from_le_bytes(*file[16..].first_chunk().unwrap()), entries, "{tokenizer}");
        }
        assert_eq!(fs::read_dir(dir.path().join("data/pg19")).unwrap().count(), 4);
    }
    // A tokenizer.json that was trained serves another corpus, which it finds by its path.
    let arguments = "--dataset text --data_dir pg19/test pg19/train/1.txt --tokenizer data/pg19/tokenizer.json --out b";
    prepared(dir.path(), arguments);
    let json = |folder: &str| fs::read(dir.path().join(folder).join("tokenizer.json")).unwrap();
    assert!(json("b") == json("data/pg19"));
}

#[test]
fn threads_change_nothing() {
    let dir = folder(&[("a.jsonl", records(&[&book(0..3000), &book(5..9000), "short"]))]);
    for threads in ["1", "2", "5"] {
        let arguments = format!("--dataset redpajama --data_dir a.jsonl --train_tokenizer 500 --out out{threads}");
        assert!(command(dir.path(), &arguments).env("RAYON_NUM_THREADS", threads).status().unwrap().success());
    }
    assert_eq!(contents(dir.path(), "out1").len(), 3);
    assert!(contents(dir.path(), "out1") == contents(dir.path(), "out2"));
    assert!(contents(dir.path(), "out1") == contents(dir.path(), "out5"));
}

/// Compresses with the program that everybody has.
fn gzip(contents: &[u8]) -> Vec<u8> {
    use std::io::Write;
    use std::process::Stdio;
    let mut child = Command::new("gzip").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(contents).unwrap();
    child.wait_with_output().unwrap().stdout
}

#[test]
fn bad_input_is_named_or_skipped() {
    let good = records(&["one", "two"]);
    let with = |line: &[u8]| [good.as_bytes(), line, b"\n", records(&["three"]).as_bytes()].concat();
    let archive = gzip(good.as_bytes());
    let cases = [
        (
            "bad.txt",
            b"fine\nnot \xff fine\n".to_vec(),
            "line 2 is not valid UTF-8 (byte 9 of the file)",
            "1 not UTF-8",
            0,
        ),
        ("bad.jsonl", with(b"{\"text\": \"\xff\"}"), "line 3 is not valid UTF-8", "1 not UTF-8", 3),
        ("bad.jsonl", with(b"{\"text\": \"cut"), "line 3 is no record: EOF while parsing", "1 broken lines", 3),
        ("bad.jsonl", with(b"{\"body\": \"x\"}"), "line 3 has no text in the field \"text\"", "1 without text", 3),
        (
            "bad.jsonl.gz",
            archive[..archive.len() - 6].to_vec(),
            "damaged or cut short after line",
            "1 damaged archives",
            2,
        ),
        ("bad.jsonl", Vec::new(), "the file is empty (line 1)", "1 empty files", 0),
        ("bad.txt", Vec::new(), "the file is empty (line 1)", "1 empty files", 0),
    ];
    for (name, contents, reason, skipped, documents) in cases {
        let (dataset, other) = if name.ends_with("txt") { ("text", "good.txt") } else { ("redpajama", "good.jsonl") };
        let dir = folder(&[(name, contents), (other, records(&["good"]).into_bytes())]);
        let line = format!("--dataset {dataset} --data_dir {name} {other} --val_fraction 0 --out out");
        let text = error(dir.path(), &line);
        assert!(text.starts_with("landmark: error: ") && text.contains(&format!("{name}: {reason}")), "{text}");
        let (stdout, stderr) = prepared(dir.path(), &(line + " --on_error skip"));
        assert!(stderr.starts_with(&format!("skipped: {name}: {reason}")), "{stderr}");
        assert!(stdout.contains(&format!(" of {} documents", documents + 1)), "{stdout}");
        assert!(stdout.contains(&format!("skipped 1: {skipped}")), "{stdout}");
        assert!(dir.path().join("out/train.tokens").is_file());
    }
}

#[test]
fn bad_command_lines_say_why() {
    let dir = folder(&[("a.txt", "text"), ("train/a.txt", "text"), ("a.csv", "x"), ("out/.keep", "")]);
    fs::remove_file(dir.path().join("out/.keep")).unwrap();
    for (arguments, reason) in [
        ("--dataset pg19 --data_dir .", "needs folders train and validation"),
        ("--dataset arxivmath --data_dir a.txt", "expected a .jsonl"),
        ("--dataset redpajama --data_dir .", "no text in"),
        ("--dataset text --data_dir none", "none: No such file"),
        ("--dataset text --data_dir a.txt --tokenizer none.json", "--tokenizer: none.json: No such file"),
        ("--dataset text --data_dir a.txt --tokenizer a.csv", "--tokenizer: a.csv: not a usable tokenizer.json"),
        ("--dataset text --data_dir a.txt --train_tokenizer 20", "--train_tokenizer is 20, expected at least 258"),
        ("--dataset text --data_dir a.txt --val_fraction 1", "--val_fraction is 1, expected at least 0 and below 1"),
        ("--dataset text --data_dir a.txt --save_every=-1", "--save_every"),
    ] {
        let text = error(dir.path(), &format!("{arguments} --out out"));
        assert!(text.contains(reason), "{arguments}: {text}");
    }
    let alone = prepare(dir.path(), "--dataset text --data_dir a.txt --split_digits");
    assert_eq!(alone.status.code(), Some(2));
    let both = prepare(dir.path(), "--dataset text --data_dir a.txt --tokenizer gpt2 --train_tokenizer 300");
    assert_eq!(both.status.code(), Some(2));
    assert!(!dir.path().join("data").exists());
}

/// A limit on the size of files stands for a disk that is full: the write fails in the same place.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_half_file_and_the_work_goes_on_later() {
    let text = book(0..60_000);
    let dir = folder(&[("a.txt", &text)]);
    let line = "--dataset text --data_dir a.txt --val_fraction 0 --save_every 0 --out out";
    // In units of 512 bytes: less than the tokens need.
    let limited = format!("trap '' XFSZ; ulimit -f 4000; exec {} prepare {line}", env!("CARGO_BIN_EXE_landmark"));
    let output = Command::new("sh").current_dir(dir.path()).args(["-c", &limited]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("out/.prepare/train.tokens: File too large") && stderr.lines().count() == 1, "{stderr}");
    assert!(!dir.path().join("out/train.tokens").exists() && !dir.path().join("out/tokenizer.json").exists());
    let (stdout, _) = prepared(dir.path(), line);
    assert!(stdout.contains(" 0 validation tokens of 1 documents"), "{stdout}");
    assert_eq!(contents(dir.path(), "out").len(), 3);
    prepared(dir.path(), &line.replace("--out out", "--out whole"));
    assert!(contents(dir.path(), "out") == contents(dir.path(), "whole"));
}

#[cfg(unix)]
#[test]
fn an_unwritable_folder_is_an_error() {
    // A file where the folder should be: also for a test that runs as root.
    let dir = folder(&[("a.txt", "text"), ("out", "a file")]);
    let output = prepare(dir.path(), "--dataset text --data_dir a.txt --out out");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && stderr.contains("out/.prepare: "), "{stderr}");
    assert_eq!(fs::read(dir.path().join("out")).unwrap(), b"a file");
}

/// Text for some seconds of work, in two files.
fn long() -> tempfile::TempDir {
    let long = book(0..300_000);
    let lines = (0..60).map(|i| records(&[&book(i * 1000..i * 1000 + 4000)])).collect::<String>();
    folder(&[
        ("text/train.jsonl", lines),
        ("text/train2.jsonl", records(&[&long[..12 << 20]])),
        ("text/val.jsonl", records(&["v"])),
    ])
}

#[cfg(unix)]
#[test]
fn killed_and_interrupted_preparations_go_on_to_the_same_files() {
    let dir = long();
    let line = "--dataset arxivmath --data_dir text --train_tokenizer 400 --save_every 0 --out";
    prepared(dir.path(), &format!("{line} whole"));
    let (mut killed, mut interrupted, mut taken_up) = (0, 0, 0);
    for (out, signal) in [("killed", "-KILL"), ("interrupted", "-INT")] {
        let state = dir.path().join(out).join(".prepare/state.json");
        for round in 0.. {
            assert!(round < 60, "it never ends");
            taken_up += usize::from(round > 0 && state.exists());
            let before = fs::read(&state).ok();
            let mut child =
                command(dir.path(), &format!("{line} {out}")).stdout(std::process::Stdio::null()).spawn().unwrap();
            // Until it has got on, and has made that safe.
            while fs::read(&state).ok() == before && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            // A few milliseconds later: anywhere in the next batch.
            std::thread::sleep(Duration::from_millis(round % 7 * 5));
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success());
                break;
            }
            assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
            let status = child.wait().unwrap();
            match status.code() {
                None => killed += 1,
                Some(130) => interrupted += 1,
                // It was done before the signal came.
                code => {
                    assert_eq!(code, Some(0));
                    break;
                }
            }
        }
        assert!(contents(dir.path(), out) == contents(dir.path(), "whole"), "{out}");
    }
    assert!(
        killed >= 1 && interrupted >= 1 && taken_up >= 2,
        "{killed} killed, {interrupted} interrupted, {taken_up} taken up"
    );
}

#[test]
fn records_of_another_part_are_counted() {
    let records = "{\"text\": \"a\", \"meta\": \"{\\\"config\\\": \\\"arxiv\\\"}\"}\n{\"text\": \"b\", \"meta\": \"{\\\"config\\\": \\\"books\\\"}\"}\n";
    let dir = folder(&[("train.jsonl", records)]);
    let (stdout, _) = prepared(dir.path(), "--dataset arxivmath --data_dir train.jsonl --out out");
    assert!(stdout.contains(" of 1 documents") && stdout.contains("\n1 records of other parts"), "{stdout}");
}
