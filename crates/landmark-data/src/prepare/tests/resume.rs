//! Stopped and killed preparations, and those that must not be taken up.

use std::fs::File;

use super::*;

/// Enough records for several batches, in all forms that can be taken up in the middle.
fn large() -> TempDir {
    let texts: Vec<String> = (0..9000).map(|i| format!("text {i} {}", "y".repeat(i % 13))).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let json = lines(&texts);
    let rows: Vec<_> = texts.iter().map(|text| (Some(*text), "")).collect();
    let book = texts.concat().repeat(80);
    folder(&[
        ("1-train.jsonl", json.as_bytes()),
        ("2-train.jsonl.zst", &zst(json.as_bytes())),
        ("3-train.parquet", &parquet(&rows, 2500)),
        ("4-val.jsonl.gz", &gz(json.as_bytes())),
        ("5-test.jsonl", lines(&[&book, "end", &book]).as_bytes()),
    ])
}

fn files(out: &Path) -> Vec<Vec<u8>> {
    ["tokenizer.json", "train.tokens", "validation.tokens", "test.tokens"]
        .map(|name| fs::read(out.join(name)).unwrap())
        .into()
}

/// As if the process had been killed: all that is on the disk, in another place.
fn copy_work(from: &Path, to: &Path) {
    fs::create_dir_all(to.join(WORK_FOLDER)).unwrap();
    for entry in fs::read_dir(from.join(WORK_FOLDER)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(WORK_FOLDER).join(entry.file_name())).unwrap();
    }
}

#[test]
fn stopped_and_killed_preparations_give_the_same_files() {
    let dir = large();
    for vocabulary in [bytes(), Vocabulary::Train { entries: 300, split_digits: false }] {
        let options = Options { save_every: Duration::ZERO, ..options(&dir, Dataset::ArxivMath, &["."]) };
        let preparation = Preparation::find(options).unwrap();
        let out = TempDir::new().unwrap();
        let (mut copies, mut batches) = (Vec::new(), 0);
        let whole = preparation.run(&vocabulary, out.path(), &mut |event| {
            if let Event::Encoding(_) = event {
                batches += 1;
                let copy = TempDir::new().unwrap();
                copy_work(out.path(), copy.path());
                // What was written after the last safe place does not count.
                let mut torn = File::options().append(true).open(copy.path().join(".prepare/train.tokens")).unwrap();
                torn.write_all(&[7; 1000]).unwrap();
                copies.push(copy);
            }
            ControlFlow::Continue(())
        });
        let (whole, expected) = (whole.unwrap(), files(out.path()));
        assert!(batches >= 5, "{batches}");
        for copy in &copies {
            let mut first = None;
            let done = preparation.run(&vocabulary, copy.path(), &mut |event| {
                if let Event::Encoding(progress) = event {
                    first.get_or_insert(progress.bytes_done);
                }
                ControlFlow::Continue(())
            });
            assert_eq!(done.unwrap(), whole);
            assert!(files(copy.path()) == expected);
            assert_eq!(fs::read_dir(copy.path()).unwrap().count(), 4);
        }

        // Stopped again and again, after each batch.
        let out = TempDir::new().unwrap();
        let mut runs = 0;
        loop {
            runs += 1;
            let stop_at_encoding = |event: Event<'_>| match event {
                Event::Encoding(_) => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            };
            match preparation.run(&vocabulary, out.path(), &mut { stop_at_encoding }) {
                Err(Error::Interrupted) => assert!(fs::read_dir(out.path()).unwrap().count() == 1 && runs < 100),
                done => break assert_eq!(done.unwrap(), whole),
            }
        }
        assert_eq!(runs, batches + 1);
        assert!(files(out.path()) == expected);
    }
}

#[test]
fn work_that_does_not_fit_is_begun_anew() {
    let dir = large();
    let place = ["1-train.jsonl", "2-train.jsonl.zst"];
    let stopped = |out: &Path| {
        let mut batches = 0;
        let stop =
            Preparation::find(options(&dir, Dataset::RedPajama, &place)).unwrap().run(&bytes(), out, &mut |_| {
                batches += 1;
                if batches == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
        assert!(matches!(stop, Err(Error::Interrupted)));
    };
    let whole = TempDir::new().unwrap();
    prepare(options(&dir, Dataset::RedPajama, &place), whole.path()).unwrap();
    let same = |out: &Path| {
        ["train.tokens", "validation.tokens"]
            .iter()
            .all(|f| fs::read(out.join(f)).unwrap() == fs::read(whole.path().join(f)).unwrap())
    };

    // Tokens that were lost, a state that is damaged, and a text that has changed.
    let damage: [fn(&Path); 4] = [
        |work| File::options().write(true).open(work.join("train.tokens")).unwrap().set_len(1000).unwrap(),
        |work| {
            let mut tokens = fs::read(work.join("train.tokens")).unwrap();
            tokens[5000] ^= 1;
            fs::write(work.join("train.tokens"), tokens).unwrap();
        },
        |work| fs::remove_file(work.join("validation.borders")).unwrap(),
        |work| fs::write(work.join("state.json"), "{").unwrap(),
    ];
    for damage in damage {
        let out = TempDir::new().unwrap();
        stopped(out.path());
        damage(&out.path().join(WORK_FOLDER));
        prepare(options(&dir, Dataset::RedPajama, &place), out.path()).unwrap();
        assert!(same(out.path()));
    }
    let out = TempDir::new().unwrap();
    stopped(out.path());
    let path = dir.path().join(place[0]);
    let changed = fs::read_to_string(&path).unwrap().replacen("text 1 ", "text A ", 1);
    fs::write(path, changed).unwrap();
    prepare(options(&dir, Dataset::RedPajama, &place), out.path()).unwrap();
    assert!(texts(out.path()).0.contains("text A ") && !same(out.path()));
}

#[test]
fn what_was_skipped_does_not_count_for_who_stops() {
    let dir = folder(&[("a.jsonl", lines(&["x"; 20_000]) + "{\n" + &lines(&["y"; 20_000]))]);
    let out = TempDir::new().unwrap();
    let options = options(&dir, Dataset::RedPajama, &["a.jsonl"]);
    let skipping = Preparation::find(Options { on_error: OnError::Skip, ..options.clone() }).unwrap();
    let stopped = skipping.run(&bytes(), out.path(), &mut |event| match event {
        Event::Encoding(progress) if progress.skipped.total() > 0 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(matches!(prepare(options, out.path()), Err(Error::BadRecord { line: 20_001, .. })));
    assert_eq!(skipping.run(&bytes(), out.path(), &mut go_on).unwrap().documents, 40_000);
}

#[test]
fn threads_change_nothing() {
    let dir = large();
    let [one, three] = [1, 3].map(|threads| {
        let out = TempDir::new().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let preparation = Preparation::find(options(&dir, Dataset::ArxivMath, &["."])).unwrap();
        pool.install(|| {
            preparation.run(&Vocabulary::Train { entries: 320, split_digits: false }, out.path(), &mut go_on)
        })
        .unwrap();
        files(out.path())
    });
    assert!(one == three);
}

#[test]
fn a_folder_is_one_preparation_s_at_a_time() {
    let dir = folder(&[("a.txt", "text")]);
    let preparation = Preparation::find(options(&dir, Dataset::Text, &["a.txt"])).unwrap();
    let out = dir.path().join("out");
    let mut other = None;
    let done = preparation.run(&bytes(), &out, &mut |_| {
        other = Some(preparation.run(&bytes(), &out, &mut go_on));
        ControlFlow::Continue(())
    });
    assert!(matches!(other, Some(Err(Error::Busy { .. }))) && done.is_ok());
}
