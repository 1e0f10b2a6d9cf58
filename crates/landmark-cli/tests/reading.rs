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
fn passkey_counts_every_prompt_in_table_csv_and_plot() {
    let flags = "--lengths 300,900 --trials 3 --without_retrieval --csv found.csv --plot found.svg";
    let table = text(&format!("passkey {CHECKPOINT} --filler book.txt {flags}"), "");
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.lines().nth(1).unwrap().trim_start().starts_with("300 ") && table.contains("/3 = "), "{table}");
    let csv = fs::read_to_string(MODEL.path().join("found.csv")).unwrap();
    let (head, rows) = csv.split_once('\n').unwrap();
    assert_eq!(head, "length,trial,top_k,selection,depth,key,answer,right,seconds");
    for start in ["300,0,3,per_token_and_head,", "900,2,0,per_token_and_head,"] {
        assert!(rows.starts_with(start) || rows.contains(&format!("\n{start}")), "{start}: {csv}");
    }
    assert!(fs::read_to_string(MODEL.path().join("found.svg")).unwrap().contains("without retrieval"));
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
    assert_eq!(table.lines().count(), 2, "{table}");
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
        (&format!("passkey {CHECKPOINT} --filler nowhere.txt"), "--filler: cannot read nowhere.txt"),
        (&format!("passkey {CHECKPOINT} --lengths 300 --trials 1 --csv no/where.csv"), "--csv no/where.csv: cannot"),
        (&format!("passkey {CHECKPOINT} --lm_cache none --without_retrieval"), "--without_retrieval is refused"),
    ];
    for (arguments, reason) in cases {
        let arguments = arguments.replace("--temperature -1", "--temperature=-1");
        let text = error(&arguments);
        assert!(text.contains(reason), "{arguments}: {text}");
    }
}

#[test]
fn the_demonstration_learns_reads_and_writes() {
    let folder = tempfile::tempdir().unwrap();
    let output = landmark(folder.path(), "demo --iterations 2", "");
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for part in
        ["1. Learning", "2/2", "2. Reading", "landmark cache: 3 blocks", "without retrieval", "3. Writing", "block "]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    // What it proposes to do next works as it stands.
    let next = shown.lines().find_map(|line| line.trim().split_once(" generate ")).unwrap().1;
    let next = landmark(folder.path(), &format!("generate {next} --max_new_tokens 3"), "");
    assert!(next.status.success(), "{}", String::from_utf8_lossy(&next.stderr));
}
