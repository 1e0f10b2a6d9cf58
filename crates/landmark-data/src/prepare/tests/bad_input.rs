//! Bad input stops a preparation, by file and line, or is left out and counted.

use super::super::reader::{self, Place};
use super::*;

/// Bad input, what the error says (after the file's name), the kind it is counted as, and the text that is left without it.
fn bad_inputs() -> Vec<(&'static str, Vec<u8>, &'static str, Skipped, &'static str)> {
    let good = lines(&["one", "two"]);
    let broken = |line: &[u8]| [good.as_bytes(), line, b"\n", lines(&["three"]).as_bytes()].concat();
    let long = lines(&["a long text that does not end here"; 4000]);
    let cut = |mut archive: Vec<u8>| {
        archive.truncate(archive.len() - 9);
        archive
    };
    let one = |count: fn(&mut Skipped) -> &mut u64| {
        let mut skipped = Skipped::default();
        *count(&mut skipped) = 1;
        skipped
    };
    let (utf8, record) = (one(|s| &mut s.invalid_utf8), one(|s| &mut s.bad_records));
    let (field, archive, empty) =
        (one(|s| &mut s.missing_fields), one(|s| &mut s.archives), one(|s| &mut s.empty_files));
    // In its checksum.
    let flipped = |mut archive: Vec<u8>| {
        *archive.last_mut().unwrap() ^= 0x10;
        archive
    };
    let rows = [(Some("one"), ""), (None, ""), (Some("two"), "")];
    vec![
        (
            "train.jsonl",
            broken(b"{\"text\": \"\xff\"}"),
            ": line 3 is not valid UTF-8 (byte ",
            utf8.clone(),
            "one two three",
        ),
        ("train.jsonl", broken(b"{\"text\": \"x\""), ": line 3 is no record: EOF", record.clone(), "one two three"),
        (
            "train.jsonl",
            broken(b"{\"text\": \"x\"} 1"),
            ": line 3 is no record: trailing",
            record.clone(),
            "one two three",
        ),
        (
            "train.jsonl",
            broken(b"[\"text\"]"),
            ": line 3 is no record: invalid type: sequence",
            record.clone(),
            "one two three",
        ),
        (
            "train.jsonl",
            broken(b"{\"text\": 1}"),
            ": line 3 is no record: the field \"text\" is not",
            record.clone(),
            "one two three",
        ),
        (
            "train.jsonl",
            broken(b"{\"txt\": \"x\"}"),
            ": line 3 has no text in the field \"text\"",
            field.clone(),
            "one two three",
        ),
        (
            "train.jsonl",
            broken(b"{\"text\": null}"),
            ": line 3 has no text in the field \"text\"",
            field.clone(),
            "one two three",
        ),
        ("train.jsonl.gz", cut(gz(good.as_bytes())), ": damaged or cut short after line ", archive.clone(), "*"),
        ("train.jsonl.gz", cut(gz(long.as_bytes())), ": damaged or cut short after line ", archive.clone(), "*"),
        ("train.jsonl.zst", cut(zst(long.as_bytes())), ": damaged or cut short after line ", archive.clone(), "*"),
        ("train.jsonl.zst", flipped(zst(long.as_bytes())), ": damaged or cut short after line ", archive.clone(), "*"),
        ("train.jsonl.gz", b"not gzip at all".to_vec(), ": damaged or cut short after line 0", archive.clone(), ""),
        ("train.jsonl", Vec::new(), ": the file is empty (line 1)", empty.clone(), ""),
        ("train.jsonl", b"\n \n".to_vec(), ": the file is empty (line 1)", empty.clone(), ""),
        ("train.jsonl.gz", gz(b""), ": the file is empty (line 1)", empty.clone(), ""),
        ("train.parquet", parquet(&rows, 9), ": line 2 has no text in the field \"text\"", field.clone(), "one two"),
        ("train.parquet", cut(parquet(&rows, 9)), ": damaged or cut short after line 0", archive.clone(), ""),
        ("train.parquet", Vec::new(), ": the file is empty (line 1)", empty, ""),
    ]
}

#[test]
fn bad_records_stop_or_are_skipped() {
    for (name, contents, message, kind, left) in bad_inputs() {
        let dir = folder(&[(name, &contents[..]), ("validation.jsonl", lines(&["good"]).as_bytes())]);
        let out = dir.path().join("out");
        let options = options(&dir, Dataset::ArxivMath, &[name, "validation.jsonl"]);
        let error = prepare(options.clone(), &out).unwrap_err().to_string();
        let path = dir.path().join(name).display().to_string();
        assert!(error.starts_with(&format!("{path}{message}")), "{error}");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "{error}");

        let mut named = Vec::new();
        let preparation = Preparation::find(Options { on_error: OnError::Skip, ..options }).unwrap();
        let done = preparation.run(&bytes(), &out, &mut |event| {
            if let Event::Skipped(error) = event {
                named.push(error.to_string());
            }
            ControlFlow::Continue(())
        });
        assert_eq!(done.unwrap().skipped, kind, "{error}");
        assert_eq!(named, std::slice::from_ref(&error));
        let (train, validation, _) = texts(&out);
        assert_eq!(validation, "good\0");
        let train: Vec<&str> = train.split_terminator(END).collect();
        match left {
            "*" => {
                assert!(train.iter().all(|text| ["one", "two", "a long text that does not end here"].contains(text)))
            }
            left => assert_eq!(train.join(" "), left, "{error}"),
        }
    }
}

#[test]
fn a_bad_document_is_left_out_whole() {
    // Its first pieces are written when the last turns out to be bad.
    let long = "word ".repeat(200_000);
    let bad = [long.as_bytes(), b"\n\xff"].concat();
    let packed = gz(long.as_bytes());
    let files = [
        ("1.txt", b"one".to_vec()),
        ("2.txt", bad),
        ("3.txt", vec![]),
        ("4.txt.gz", packed[..packed.len() - 4].to_vec()),
        ("5.txt", b"two".to_vec()),
    ];
    let dir = folder(&files);
    let options = Options { on_error: OnError::Skip, val_fraction: Some(0.0), ..options(&dir, Dataset::Text, &["."]) };
    let out = TempDir::new().unwrap();
    let done = prepare(options, out.path()).unwrap();
    assert_eq!(done.skipped, Skipped { invalid_utf8: 1, archives: 1, empty_files: 1, ..Skipped::default() });
    assert_eq!(texts(out.path()).0, "one\0two\0");
}

#[test]
fn damaged_archives_never_panic() {
    let texts: Vec<String> = (0..40).map(|i| format!("text {i} {}", "x".repeat(i))).collect();
    let rows: Vec<_> = texts.iter().map(|text| (Some(text.as_str()), "")).collect();
    let json = lines(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let archives =
        [("a.parquet", parquet(&rows, 16)), ("a.jsonl.gz", gz(json.as_bytes())), ("a.jsonl.zst", zst(json.as_bytes()))];
    let dir = TempDir::new().unwrap();
    for (name, good) in archives {
        for at in 0..good.len() {
            for damaged in [[&good[..at], &[good[at] ^ (1 << (at % 8))], &good[at + 1..]].concat(), good[..at].to_vec()]
            {
                fs::write(dir.path().join(name), damaged).unwrap();
                let options = Options { on_error: OnError::Skip, ..options(&dir, Dataset::RedPajama, &[name]) };
                let preparation = Preparation::find(options).unwrap();
                let read = reader::read(&preparation.inputs, preparation.rules(), Place::default(), &mut |_| true);
                assert!(read.is_ok(), "{name} {at}: {read:?}");
            }
        }
    }
}

#[test]
fn bad_options_are_errors_and_leave_nothing() {
    let dir = folder(&[("a.txt", "text"), ("empty/.keep", "")]);
    let out = dir.path().join("out");
    for fraction in [-0.1, 1.0, f64::NAN] {
        let options = Options { val_fraction: Some(fraction), ..options(&dir, Dataset::Text, &["a.txt"]) };
        assert!(matches!(prepare(options, &out), Err(Error::Param { name: "val_fraction", .. })));
    }
    assert!(matches!(prepare(options(&dir, Dataset::Text, &["none"]), &out), Err(Error::Io { .. })));
    assert!(matches!(prepare(options(&dir, Dataset::Text, &["empty"]), &out), Err(Error::NoText { .. })));
    let preparation = Preparation::find(options(&dir, Dataset::Text, &["a.txt"])).unwrap();
    let few = preparation.run(&Vocabulary::Train { entries: 257, split_digits: false }, &out, &mut go_on);
    assert!(matches!(few, Err(Error::Param { name: "train_tokenizer", .. })));
    assert!(!out.exists());
}
