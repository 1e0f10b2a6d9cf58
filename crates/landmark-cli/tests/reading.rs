//! The commands that read with a model, on one that was trained for a moment: `generate`, `passkey`, and the demonstration.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

/// A folder with a trained model in `exps/text/landmark/e` and its text in `book.txt`.
static MODEL: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..400).map(|i| format!("Chapter {i}. It was a dark and stormy night. ")).collect();
    fs::write(folder.path().join("book.txt"), text).unwrap();
    let prepare = "prepare --dataset text --data_dir book.txt --tokenizer bytes --out data/text";
    let train = "train --dataset text --model landmark --n_embd 32 --n_head 2 --n_layer 2 --batch_size 4 --acc_steps 1 \
        --sequence_length 64 --mem_freq 7 --iterations 30 --exp_name e";
    for arguments in [prepare, train] {
        let output = landmark(folder.path(), arguments, "");
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
    folder
});

const CHECKPOINT: &str = "--checkpoint exps/text/landmark/e";

fn landmark(folder: &Path, arguments: &str, input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(folder).args(arguments.split_whitespace());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that fails early reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(arguments: &str, input: &str) -> String {
    let output = landmark(MODEL.path(), arguments, input);
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn error(arguments: &str) -> String {
    let output = landmark(MODEL.path(), arguments, "");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{arguments}: {text}");
    text
}

#[test]
fn generate_goes_on_with_a_file_or_a_pipe_the_same_way() {
    let flags = format!("generate {CHECKPOINT} --max_new_tokens 20 --seed 5");
    let book = fs::read_to_string(MODEL.path().join("book.txt")).unwrap();
    let of_file = text(&format!("{flags} --file book.txt"), "");
    assert_eq!(of_file, text(&flags, &book));
    assert_ne!(of_file, text(&format!("{flags} --file book.txt --temperature 3"), ""));
    // 20 bytes and the end of the line; those that are no text are replaced by longer ones.
    assert!(of_file.ends_with('\n') && of_file.len() > 20, "{of_file}");
    let greedy = format!("generate {CHECKPOINT} --max_new_tokens 20 --temperature 0 --prompt");
    assert_eq!(text(&format!("{greedy} It --seed 1"), ""), text(&format!("{greedy} It --seed 2"), ""));
}

#[test]
fn generate_shows_the_blocks_that_were_read() {
    let shown = text(&format!("generate {CHECKPOINT} --file book.txt --max_new_tokens 9 --show_blocks 3"), "");
    let lines: Vec<&str> = shown.lines().collect();
    let blocks: Vec<&&str> = lines.iter().filter(|line| line.contains("%  block ")).collect();
    assert_eq!(blocks.len(), 3, "{shown}");
    // The text is the book's and what was generated; white space is shown as one space.
    let book = fs::read_to_string(MODEL.path().join("book.txt")).unwrap() + shown.split("\nThe blocks").next().unwrap();
    let book = book.split_whitespace().collect::<Vec<_>>().join(" ");
    for words in lines.iter().filter_map(|line| line.trim().strip_prefix('"')) {
        let words = words.trim_end_matches('"');
        assert!(book.contains(words) || words.contains('\\'), "{words:?} is not of the text");
    }
}

#[test]
fn passkey_counts_every_prompt_in_table_json_csv_and_plot() {
    let flags = "--lengths 300,900 --trials 3 --without_retrieval --all_selection_methods --batch_size 2 --out found \
        --json found.json --csv found.csv --plot found.svg";
    let flags = format!("passkey {CHECKPOINT} --filler book.txt {flags}");
    let table = text(&flags, "");
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 1 + 2 * 4 + 1, "{table}");
    assert!(lines[1].trim_start().starts_with("300 ") && lines[5].trim_start().starts_with("900 "), "{table}");
    let ways =
        ["3 blocks, per_token_and_head", "3 blocks, max_over_heads", "3 blocks, max_over_tokens", "the last window"];
    for (line, way) in lines[1..].iter().zip(ways.into_iter().cycle()).take(8) {
        assert!(line.contains(way) && line.contains("/3 = "), "{way}: {table}");
    }
    let csv = fs::read_to_string(MODEL.path().join("found.csv")).unwrap();
    let (head, rows) = csv.split_once('\n').unwrap();
    assert_eq!(head, "length,trial,lm_cache,top_k,selection,depth,key,answer,right,seconds,session");
    for start in ["300,0,mem,3,per_token_and_head,", "900,2,mem,3,max_over_tokens,", "900,1,none,,,"] {
        assert!(rows.starts_with(start) || rows.contains(&format!("\n{start}")), "{start}: {csv}");
    }
    assert!(fs::read_to_string(MODEL.path().join("found.svg")).unwrap().contains("the last window alone"));
    let json = || -> serde_json::Value {
        serde_json::from_slice(&fs::read(MODEL.path().join("found.json")).unwrap()).unwrap()
    };
    let all = json();
    let results = all["results"].as_array().unwrap();
    assert_eq!((results.len(), results[7]["trials"].as_array().unwrap().len()), (8, 3));
    // Whatever is read side by side, the answers are the same; those that are kept are not asked for again.
    let answers = |all: &serde_json::Value| -> Vec<String> {
        let trials = all["results"].as_array().unwrap().iter().flat_map(|cell| cell["trials"].as_array().unwrap());
        trials.map(|trial| trial["answer"].to_string()).collect()
    };
    text(&flags.replace("--batch_size 2 --out found ", "--batch_size 3 --max_cache_gb 0.0001 --out other "), "");
    assert_eq!(answers(&json()), answers(&all));
    let more = flags.replace("--trials 3", "--trials 4");
    text(&more, "");
    let seconds = |all: &serde_json::Value, trial: usize| all["results"][1]["trials"][trial]["seconds"].clone();
    let went_on = json();
    assert_eq!(seconds(&went_on, 2), seconds(&all, 2));
    assert!(seconds(&went_on, 3).is_number());
}

#[test]
fn passkey_asks_for_one_of_several_keys() {
    let flags = "--lengths 900 --trials 2 --keys 4 --out several --json several.json";
    text(&format!("passkey {CHECKPOINT} --filler data/text/validation.tokens {flags}"), "");
    let json = fs::read_to_string(MODEL.path().join("several.json")).unwrap();
    let all: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&all["keys"], all["results"][0]["trials"].as_array().unwrap().len()), (&4.into(), 2));
}

/// Sessions are asked in two ways, and what they took of the disk is given back.
#[cfg(unix)]
#[test]
fn passkey_through_sessions() {
    let flags = "--lengths 900 --trials 2 --sessions read --ram 0 --block_dtype int8 --device cpu --out through --csv through.csv";
    let table = text(&format!("passkey {CHECKPOINT} --filler book.txt {flags}"), "");
    assert!(table.contains("session, index ") && table.contains("session, all landmarks scored "), "{table}");
    let csv = fs::read_to_string(MODEL.path().join("through.csv")).unwrap();
    // Of so few blocks all landmarks are scored in any case: the answers are the same.
    let answers = |way: &str| -> Vec<String> {
        let lines = csv.lines().filter(|line| line.ends_with(way));
        lines.map(|line| line.split(',').take(8).collect::<Vec<_>>().join(",")).collect()
    };
    assert_eq!(answers(",index"), answers(",all landmarks scored"));
    assert_eq!(answers(",index").len(), 2, "{csv}");
    assert_eq!(fs::read_dir(MODEL.path().join("read")).unwrap().count(), 0);

    // Read once as far as they are alike, prompts have the answers of a cache that reads each from its beginning.
    let flags = format!(
        "passkey {CHECKPOINT} --filler book.txt --same_filler --lengths 2500 --trials 5 --keys 2 --csv alike.csv"
    );
    let read = |more: &str| {
        text(&format!("{flags} {more}"), "");
        fs::read_to_string(MODEL.path().join("alike.csv")).unwrap()
    };
    let (alone, alike) = (read("--device cpu --out alone"), read("--sessions alike --device cpu --out alike_out"));
    let answers = |csv: &str, way: &str| -> Vec<Vec<String>> {
        let lines = csv.lines().skip(1).filter(|line| line.ends_with(way));
        lines.map(|line| line.split(',').skip(5).take(4).map(String::from).collect()).collect()
    };
    assert_eq!(answers(&alone, ","), answers(&alike, ",index"));
    assert_eq!(answers(&alike, ",index").len(), 5, "{alike}");
}

/// What was finished before an interruption is not done again.
#[cfg(unix)]
#[test]
fn an_interrupted_passkey_goes_on() {
    let flags = "passkey --checkpoint exps/text/landmark/e --filler book.txt --lengths 4000 --trials 400 --out stopped --csv stopped.csv";
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(MODEL.path()).args(flags.split_whitespace()).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let cells = MODEL.path().join("stopped/cells");
    while fs::read_dir(&cells).map_or(0, Iterator::count) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{log}");
    assert!(log.contains("The same command goes on"), "{log}");
    let csv = || fs::read_to_string(MODEL.path().join("stopped.csv")).unwrap();
    let before = csv();
    let done = before.lines().count() - 1;
    assert!((1..400).contains(&done), "{before}");
    text(&flags.replace("--trials 400", &format!("--trials {}", done + 1)), "");
    assert!(csv().starts_with(&before) && csv().lines().count() == done + 2);
}

/// A model that was trained on blocks that are sentences is read, evaluated and generated from with such blocks.
#[test]
fn landmarks_are_where_the_model_was_trained_to_have_them() {
    let train = "train --dataset text --model landmark --n_embd 32 --n_head 2 --n_layer 2 --batch_size 4 --acc_steps 1 \
        --sequence_length 128 --mem_freq 24 --landmarks sentence --iterations 10 --exp_name sentences";
    let output = landmark(MODEL.path(), train, "");
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && notes.contains("--landmarks sentence: "), "{notes}");
    let checkpoint = "--checkpoint exps/text/landmark/sentences";
    let shown = text(&format!("generate {checkpoint} --file book.txt --max_new_tokens 30 --show_blocks 99"), "");
    let book = fs::read_to_string(MODEL.path().join("book.txt")).unwrap();
    let mut short = 0;
    for line in shown.lines().filter(|line| line.contains("%  block ")) {
        let tokens = line.rsplit_once("tokens ").unwrap().1.replace(',', "");
        let (first, last) = tokens.split_once(" to ").unwrap();
        let (first, end) = (first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap() + 1);
        // Bytes are tokens. A block that is not full ends with a sentence; of what was generated nothing is known.
        let Some(words) = book.get(first..end) else { continue };
        assert!(
            words.len() == 24 || (6..24).contains(&words.len()) && words.trim_end().ends_with("night."),
            "{words:?}"
        );
        short += usize::from(words.len() < 24);
    }
    assert!(short > 0, "{shown}");
    let table = text(&format!("passkey {checkpoint} --filler book.txt --lengths 400 --trials 2"), "");
    assert!(table.contains(" 400 ") && table.contains("/2 = "), "{table}");
    for flags in ["--use_cache --eval_seq_length 300 --mid_length 40 --batch_size 3", "--lm_cache none"] {
        let table = text(&format!("eval {checkpoint} --file book.txt {flags}"), "");
        assert!(table.contains("perplexity"), "{table}");
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let cases = [
        ("generate --checkpoint nowhere", "--checkpoint nowhere: no such folder"),
        ("generate --checkpoint data", "--checkpoint data: no model in it"),
        (&format!("generate {CHECKPOINT} --file nowhere.txt"), "cannot read nowhere.txt"),
        (&format!("generate {CHECKPOINT} --show_blocks 0"), "--show_blocks 0: expected at least 1"),
        (&format!("generate {CHECKPOINT} --temperature -1"), "--temperature -1: expected a number from 0"),
        (&format!("generate {CHECKPOINT} --cache_topk 8"), "cache_topk"),
        (&format!("generate {CHECKPOINT} --mid_length 0"), "--mid_length 0: expected 1 to"),
        (&format!("generate {CHECKPOINT} --lm_cache kv"), "--lm_cache kv is refused"),
        (&format!("passkey {CHECKPOINT} --lengths 100"), "--lengths 100: too short"),
        (&format!("passkey {CHECKPOINT} --trials 0"), "--trials 0: expected at least 1"),
        (&format!("passkey {CHECKPOINT} --filler nowhere.txt"), "--filler nowhere.txt: cannot read nowhere.txt"),
        (&format!("passkey {CHECKPOINT} --lengths 300 --trials 1 --csv no/where.csv"), "--csv no/where.csv: cannot"),
        (&format!("passkey {CHECKPOINT} --lm_cache none --without_retrieval"), "--without_retrieval is refused"),
        (
            &format!("passkey {CHECKPOINT} --lm_cache none --all_selection_methods"),
            "--all_selection_methods is refused",
        ),
        (&format!("passkey {CHECKPOINT} --keys 0"), "--keys 0: expected 1 to 32"),
        (&format!("passkey {CHECKPOINT} --keys 9 --lengths 400"), "--lengths 400: too short, the task, 9 keys"),
        (&format!("passkey {CHECKPOINT} --batch_size 0"), "--batch_size 0: expected at least 1"),
        (&format!("passkey {CHECKPOINT} --max_cache_gb 0"), "--max_cache_gb: expected a number above 0"),
        (&format!("demo {CHECKPOINT} --file book.txt --depth 2"), "--depth 2: expected a share from 0 to 1"),
        (&format!("demo {CHECKPOINT} --file book.txt --tokens 9"), "--tokens 9: too short"),
        (&format!("demo {CHECKPOINT} --file book.txt --cache_topk 0"), "the demonstration is about retrieval"),
        ("demo --checkpoint nowhere", "--checkpoint nowhere: no such folder"),
    ];
    for (arguments, reason) in cases {
        let arguments = arguments.replace("--temperature -1", "--temperature=-1");
        let text = error(&arguments);
        assert!(text.contains(reason), "{arguments}: {text}");
    }
}

#[test]
fn the_demonstration_tells_reads_and_asks() {
    let demo = format!("demo {CHECKPOINT} --file book.txt --tokens 6000 --key 31415 --depth 0.6");
    let shown = text(&demo, "");
    for part in [
        "a model whose window is 64 tokens reads 6,000",
        "\"The pass key is 31415. Remember it. 31415 is the pass key.\" at token 3,",
        "6,000 tokens in ",
        "What is the pass key? The pass key is\n",
        "What is Martha's number? Martha's number is\n",
        "the same model, its window alone",
        "%  block ",
        "with retrieval",
        "at most ",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    // A model that learned for a moment cannot know, and nothing says that it does.
    assert!(shown.matches("  wrong: ").count() == 4 && !shown.contains("right: "), "{shown}");
    // What it proposes to do next works as it stands.
    for command in ["passkey", "eval", "generate"] {
        let next = shown.lines().find_map(|line| line.trim().split_once(&format!(" {command} "))).unwrap().1;
        let next = match command {
            "passkey" => format!("{next} --trials 1 --lengths 800"),
            "eval" => format!("{next} --eval_seq_length 2000"),
            _ => format!("{next} --max_new_tokens 3"),
        };
        text(&format!("{command} {next}"), "");
    }
}

/// What is exported is the model, in half of the bytes.
#[test]
fn an_exported_model_reads() {
    let size = |folder: &str| fs::metadata(MODEL.path().join(folder).join("model.safetensors")).unwrap().len();
    let said = text(&format!("export {CHECKPOINT} --out models/half"), "");
    assert!(said.starts_with("models/half: ") && said.trim_end().ends_with("bf16"), "{said}");
    text(&format!("export {CHECKPOINT} --out models/whole --dtype float32"), "");
    assert!(size("models/half") < size("models/whole") * 6 / 10);
    let write = |checkpoint: &str| {
        text(&format!("generate --checkpoint {checkpoint} --file book.txt --max_new_tokens 9 --temperature 0"), "")
    };
    assert_eq!(write("models/whole"), write("exps/text/landmark/e"));
    let perplexity = |checkpoint: &str| -> f64 {
        let table = text(&format!("eval --checkpoint {checkpoint} --file book.txt --use_cache"), "");
        let line = table.lines().find_map(|line| line.strip_prefix("perplexity ")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let (half, whole) = (perplexity("models/half"), perplexity("models/whole"));
    assert!(half != whole && (half / whole - 1.).abs() < 0.01, "{half} {whole}");
    let itself = error("export --checkpoint models/half --out models/half");
    assert!(itself.contains("it is the checkpoint itself"), "{itself}");
    let refused = error(&format!("generate {CHECKPOINT} --prompt It --dtype bfloat16 --device cpu"));
    assert!(refused.contains("--dtype bfloat16 is refused"), "{refused}");
}

/// Text is read as it ships: compressed.
#[test]
fn compressed_text_is_read_as_plain() {
    let plain = text(&format!("generate {CHECKPOINT} --file book.txt --max_new_tokens 9"), "");
    let book = fs::read(MODEL.path().join("book.txt")).unwrap();
    fs::write(MODEL.path().join("book.txt.zst"), zstd::encode_all(&book[..], 3).unwrap()).unwrap();
    assert_eq!(text(&format!("generate {CHECKPOINT} --file book.txt.zst --max_new_tokens 9"), ""), plain);
    fs::write(MODEL.path().join("broken.txt.zst"), b"no frame").unwrap();
    assert!(error(&format!("generate {CHECKPOINT} --file broken.txt.zst")).contains("cannot read broken.txt.zst"));
}
