//! `landmark session` as a user runs it, on a model that was trained for a moment; and killed.

#![cfg(unix)]

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use support::{command, random, succeed};

/// A folder with a trained model in `exps/text/landmark/e`, one of other weights in `other`, and texts.
static MODEL: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("book.txt"), book()).unwrap();
    let prepare = "prepare --dataset text --data_dir book.txt --tokenizer bytes --out data/text";
    let train = "train --dataset text --model landmark --n_embd 32 --n_head 2 --n_layer 2 --batch_size 4 --acc_steps 1 \
        --sequence_length 64 --mem_freq 7 --device cpu --exp_name";
    for arguments in [prepare, &format!("{train} e --iterations 30"), &format!("{train} other --iterations 2")] {
        succeed(folder.path(), arguments);
    }
    folder
});

const CREATE: &str = "--checkpoint exps/text/landmark/e";

fn book() -> String {
    (0..400).map(|i| format!("Chapter {i}. It was a dark and stormy night. ")).collect()
}

/// What reads with the model does it on the CPU, if no device is named.
fn on_cpu(arguments: &str) -> String {
    let reads =
        ["session create", "session append", "session ask"].iter().any(|command| arguments.starts_with(command));
    let device = if reads && !arguments.contains("--device") { " --device cpu" } else { "" };
    format!("{arguments}{device}")
}

fn text(arguments: &str) -> String {
    succeed(MODEL.path(), &on_cpu(arguments)).0
}

fn error(arguments: &str) -> String {
    support::error(MODEL.path(), &on_cpu(arguments))
}

fn json(arguments: &str) -> serde_json::Value {
    serde_json::from_str(&text(arguments)).unwrap()
}

#[test]
fn a_session_is_read_asked_and_shown() {
    let book = book();
    fs::write(MODEL.path().join("half.txt"), &book[..5000]).unwrap();
    fs::write(MODEL.path().join("rest.txt"), &book[5000..9000]).unwrap();
    text(&format!("session create one/a {CREATE}"));
    text("session append one/a --file half.txt");
    let ask = "session ask one/a --prompt It --temperature 0 --max_new_tokens 12";
    let answer = text(ask);
    // The session stays as it is, and the answer is that of reading the text and the prompt at once.
    assert_eq!(text(ask), answer);
    let generate =
        format!("generate {CREATE} --file half.txt --prompt It --temperature 0 --max_new_tokens 12 --device cpu");
    assert_eq!(answer, text(&generate));
    // Little RAM changes nothing.
    assert_eq!(text(&format!("{ask} --ram 0")), answer);
    let shown = json(&format!("{ask} --json --show_blocks 2"));
    assert_eq!(shown["answer"].as_str().unwrap(), answer.trim_end_matches('\n'));
    assert_eq!((shown["tokens"].as_u64(), shown["session_tokens"].as_u64()), (Some(12), Some(5000)));
    for block in shown["blocks"].as_array().unwrap() {
        let (first, last) = (block["first_token"].as_u64().unwrap(), block["last_token"].as_u64().unwrap());
        let expected = format!("{}It{answer}", &book[..5000]);
        assert_eq!(block["text"].as_str().unwrap(), &expected[first as usize..=last as usize]);
    }
    assert!(text(&format!("{ask} --show_blocks 3")).contains("The blocks that it read most, of 71"));
    // With --keep it goes on.
    text(&format!("{ask} --keep"));
    let kept = format!("{}It{}", &book[..5000], answer.trim_end_matches('\n'));
    text("session export one/a --out kept.txt");
    assert_eq!(fs::read_to_string(MODEL.path().join("kept.txt")).unwrap(), kept);
    text("session fork one/a one/b");
    text("session append one/b --file rest.txt");
    assert_eq!(text("session export one/b --out -"), kept.clone() + &book[5000..9000]);
    assert_eq!(text("session export one/a --out -"), kept);
    text("session export one/a --out kept.jsonl");
    let lines = fs::read_to_string(MODEL.path().join("kept.jsonl")).unwrap();
    let blocks: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(blocks.len(), 5014 / 7);
    assert!(blocks.iter().all(|block| block["tokens"].as_array().unwrap().len() == 7));
    let listed = text("session list one");
    assert!(listed.contains("5,014 tokens") && listed.contains("9,014 tokens"), "{listed}");
    assert!(text("session show one/b --verify --text 0..12").contains("everything is as it was written"));
    assert!(text("session show one/b --text 0..12").ends_with("\nChapter 0. I\n"));
    assert_eq!(json("session show one/b --json")["tokens"], 9014);
    text("session delete one/a");
    assert!(error("session show one/a").contains("no session: there is no session.json in it"));
    // What the fork shared is still there.
    assert!(text("session show one/b --verify").contains("everything is as it was written"));
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    fs::write(MODEL.path().join("short.txt"), &book()[..3000]).unwrap();
    text(&format!("session create two/a {CREATE} --block_dtype int8"));
    text("session append two/a --file short.txt");
    assert!(error(&format!("session create two/a {CREATE}")).contains("there is something of this name already"));
    let moved = "session ask two/a --prompt It --checkpoint exps/text/landmark/other";
    assert!(error(moved).contains("is not the one that read the session's text"));
    assert!(
        error(&format!("session create two/b {CREATE} --mem_cache_size 9")).contains("a session keeps all its blocks")
    );
    assert!(error(&format!("session create two/b {CREATE} --lm_cache none")).contains("--lm_cache mem"));
    assert!(
        error(&format!("session create two/b {CREATE} --mid_length 1000")).contains("--mid_length 1000: expected 1 to")
    );
    assert!(error("session append two/none --file short.txt").contains("no session"));
    assert!(error("session append two/a --file none.txt").contains("none.txt"));
    assert!(error("session show two/a --text 0..9000").contains("the session has 3000 tokens"));
    fs::write(MODEL.path().join("empty.txt"), "").unwrap();
    assert!(error("session append two/a --file empty.txt").contains("the text is empty"));
    let on_gpu = "session ask two/a --prompt It --gpu_memory 1GiB";
    assert!(error(on_gpu).contains("--gpu_memory is refused: the session is read on the CPU"));
    assert!(error("session ask two/a --prompt It --device cuda:1000").contains("--device cuda:1000: "));
    assert!(error("session ask two/a --prompt It --adapter exps").contains("the session's model has none"));
    // Two processes: the second is told who has it.
    let lock = fs::OpenOptions::new().write(true).open(MODEL.path().join("two/a/lock")).unwrap();
    fs::write(MODEL.path().join("two/a/lock"), "process 1 (landmark session append)").unwrap();
    lock.lock().unwrap();
    assert!(error("session show two/a").contains("in use: process 1 (landmark session append) has it"));
    lock.unlock().unwrap();
    // A flipped bit, and the repair.
    let path = MODEL.path().join("two/a/blocks-000000.seg");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let checked = command(MODEL.path(), "session show two/a --verify").output().unwrap();
    assert_eq!(checked.status.code(), Some(1));
    let shown = String::from_utf8(checked.stdout).unwrap();
    assert!(shown.contains("damaged  block 213: its keys and values are damaged"), "{shown}");
    assert!(text("session repair two/a").contains("dropped 1 blocks"));
    assert!(text("session repair two/a").contains("nothing is damaged"));
    text("session ask two/a --prompt It --max_new_tokens 3");
    // No room, by the session's own limit and by the system's.
    text(&format!("session create two/c {CREATE} --disk 300kB"));
    assert!(error("session append two/c --file short.txt").contains("no room: it may take 300000 bytes"));
    assert!(json("session show two/c --json")["bytes"].as_u64().unwrap() <= 300_000);
    text(&format!("session create two/d {CREATE}"));
    let before = json("session show two/d --json")["tokens"].as_u64().unwrap();
    let limited = "trap '' XFSZ; ulimit -f 300; exec \"$0\" session append two/d --file short.txt --device cpu";
    let mut command = Command::new("sh");
    command.current_dir(MODEL.path()).args(["-c", limited, env!("CARGO_BIN_EXE_landmark")]);
    let output = command.output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && message.contains("no room"), "{message}");
    let after = json("session show two/d --json --verify");
    assert_eq!(after["damage"].as_array().unwrap().len(), 0);
    assert!(after["tokens"].as_u64().unwrap() > before && after["append_from"] == 0, "{after}");
    // The rest, when there is room; another text first has to be allowed.
    fs::write(MODEL.path().join("another.txt"), "Another text. ".repeat(50)).unwrap();
    assert!(error("session append two/d --file another.txt").contains("a text that is not this one"));
    text("session fork two/d two/e");
    text("session append two/e --file another.txt --new_text");
    text("session append two/d --file short.txt");
    assert_eq!(text("session export two/d --out -"), book()[..3000]);
    text("session append two/d --file short.txt --skip_tokens 100 --max_tokens 50");
    assert_eq!(text("session export two/d --out -"), book()[..3000].to_string() + &book()[100..150]);
}

/// On a GPU a session answers as a cache in its memory, whatever is on the GPU and in RAM. Where there is none the test says so and checks nothing.
#[test]
fn on_a_gpu_a_session_answers_as_generate_does() {
    fs::write(MODEL.path().join("start.txt"), &book()[..4000]).unwrap();
    let on_gpu = "--device cuda --dtype float32";
    let created = command(MODEL.path(), &format!("session create five/a {CREATE} {on_gpu}")).output().unwrap();
    if !created.status.success() {
        let error = String::from_utf8(created.stderr).unwrap();
        assert!(error.contains("--device cuda:0"), "{error}");
        eprintln!("skipped: {error}");
        return;
    }
    text(&format!("session append five/a --file start.txt {on_gpu}"));
    let go_on = "--prompt It --temperature 0 --max_new_tokens 40";
    let expected = text(&format!("generate {CREATE} --file start.txt {go_on} {on_gpu}"));
    for tiers in ["", "--gpu_memory 0", "--gpu_memory 0 --ram 0", "--gpu_memory 100kB --ram 1MB", "--show_blocks 1"] {
        let answer = text(&format!("session ask five/a {go_on} {on_gpu} {tiers}"));
        assert!(answer.starts_with(&expected), "{tiers}: {answer:?}, expected {expected:?}");
    }
    text(&format!("session ask five/a {go_on} {on_gpu} --keep --gpu_memory 50kB"));
    assert!(json("session show five/a --json --verify")["tokens"].as_u64().unwrap() > 4002);
    assert!(
        error(&format!("session ask five/a {go_on} {on_gpu} --measure_recall")).contains("--measure_recall is refused")
    );
    // What was read on one device is there for the other.
    text(&format!("session ask five/a {go_on}"));
    text(&format!("session ask five/a {go_on} --device cuda"));
}

/// Starts a command and kills it after this time; whether it was still running.
fn kill(folder: &Path, arguments: &str, after: Duration) -> bool {
    let mut child = command(folder, &on_cpu(arguments)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(after);
    let ran = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    ran
}

fn files(session: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(session)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .filter(|(name, _)| name.starts_with("blocks") || name == "tokens")
        .collect();
    files.sort();
    files
}

/// kill -9 during append, ask and fork: no session is lost, and all go on as if nothing had been.
#[test]
fn killed_sessions_go_on_as_those_that_were_never_killed() {
    let folder = MODEL.path();
    text(&format!("session create three/empty {CREATE}"));
    text("session fork three/empty three/whole");
    let begun = Instant::now();
    text("session append three/whole --file book.txt");
    let append = begun.elapsed();
    let ask = |session: &str| format!("session ask {session} --prompt It --temperature 0 --max_new_tokens 20 --keep");
    let begun = Instant::now();
    text("session fork three/whole three/asked");
    let fork = begun.elapsed();
    let begun = Instant::now();
    text(&ask("three/asked"));
    let asking = begun.elapsed();
    let (whole, asked) = (files(&folder.join("three/whole")), files(&folder.join("three/asked")));
    let length = book().len() as u64;

    let mut random = random();
    let (mut kills, mut rounds) = (0, 0);
    while kills < 60 {
        rounds += 1;
        let session = format!("three/killed{rounds}");
        text(&format!("session fork three/empty {session}"));
        let arguments = format!("session append {session} --file book.txt");
        let mut tokens = 0;
        while kills < 60 && tokens < length {
            kills += usize::from(kill(folder, &arguments, append.mul_f64(random() * 0.6)));
            let shown = json(&format!("session show {session} --json --verify"));
            assert!(shown["damage"].as_array().unwrap().is_empty(), "{shown}");
            assert!(shown["tokens"].as_u64().unwrap() >= tokens, "{shown}");
            tokens = shown["tokens"].as_u64().unwrap();
        }
        text(&arguments);
        // The same text twice, if the first append had come to its end.
        if json(&format!("session show {session} --json"))["tokens"] == length {
            assert!(files(&folder.join(&session)) == whole, "{session} is not the session that was never killed");
        }
        text(&format!("session delete {session}"));
    }
    let mut asks = 0;
    while asks < 20 {
        text("session fork three/whole three/ask");
        asks += usize::from(kill(folder, &ask("three/ask"), asking.mul_f64(random() * 1.1)));
        let now = files(&folder.join("three/ask"));
        assert!(text("session show three/ask --verify").contains("everything is as it was written"));
        if json("session show three/ask --json")["tokens"] == length {
            text(&ask("three/ask"));
        } else {
            assert!(now == asked);
        }
        assert!(files(&folder.join("three/ask")) == asked, "an ask that was killed is not one that was not");
        text("session delete three/ask");
    }
    let mut forks = 0;
    while forks < 20 {
        forks += usize::from(kill(folder, "session fork three/whole three/fork", fork.mul_f64(random() * 1.1)));
        assert!(text("session show three/whole --verify").contains("everything is as it was written"));
        if !folder.join("three/fork").exists() {
            text("session fork three/whole three/fork");
        }
        assert!(files(&folder.join("three/fork")) == whole);
        text("session delete three/fork");
    }
    println!("{kills} kills of append in {rounds} rounds, {asks} of ask, {forks} of fork");
}
