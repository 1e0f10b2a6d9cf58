//! `landmark eval` as a user runs it: its figures against direct computation and the authors' own, grids that are interrupted, bad
//! flags.

mod support;

use candle_core::{Device, Tensor};
use landmark_data::Tokenizer;
use landmark_models::gpt::{Gpt, GptConfig, Variant, WindowAttention};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::{error, landmark, succeed};

/// The report of an evaluation.
fn report(folder: &Path, arguments: &str) -> Value {
    succeed(folder, &format!("eval --json report.json {arguments}"));
    serde_json::from_slice(&fs::read(folder.join("report.json")).unwrap()).unwrap()
}

fn loss(folder: &Path, arguments: &str) -> f64 {
    report(folder, arguments)["loss"].as_f64().unwrap()
}

fn small(variant: Variant, mem_freq: Option<usize>, window: usize) -> Gpt {
    let config = GptConfig {
        model: variant,
        vocab_size: 258,
        landmark_id: 257,
        n_embd: 32,
        n_head: 2,
        n_layer: 2,
        sequence_length: window,
        mem_freq,
        ..GptConfig::default()
    };
    Gpt::init(&config, 3, candle_core::DType::F32, &Device::Cpu).unwrap()
}

/// A folder with data named `books`, whose validation part is `text`, and models `landmark` (window 512, blocks of 50) and `dense`.
fn folder(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for (part, text) in [("train", "Call me Ishmael. "), ("validation", text)] {
        fs::create_dir_all(path.join("text").join(part)).unwrap();
        fs::write(path.join("text").join(part).join("1.txt"), text).unwrap();
    }
    succeed(path, "prepare --dataset pg19 --data_dir text --tokenizer bytes --out data/books");
    for (name, model) in [
        ("landmark", small(Variant::Landmark, Some(50), 512)),
        ("dense", small(Variant::BaseRotary, None, 512)),
        ("narrow", small(Variant::BaseRotary, None, 256)),
    ] {
        model.save(path.join(name)).unwrap();
        Tokenizer::bytes().save(path.join(name)).unwrap();
    }
    folder
}

fn text(bytes: usize) -> String {
    let lines = (0..).map(|i| format!("{i}. In chapter {} of the whale, {} harpoons.\n", i * 7 % 31, i * i % 17));
    let mut text = String::new();
    lines
        .take_while(|line| {
            text += line;
            text.len() < bytes
        })
        .for_each(drop);
    text.truncate(bytes);
    text
}

/// The mean loss of windows of `length` tokens, computed here: landmarks put in by hand, one whole window at a time.
fn direct(model: &Gpt, tokens: &[u32], length: usize, end_of_text: u32) -> f64 {
    let (mut sum, mut count) = (0., 0);
    for start in (0..tokens.len() - length).step_by(length) {
        let (mut ids, mut targets) = (Vec::new(), Vec::new());
        for i in 0..length {
            ids.push(tokens[start + i]);
            let follows_end = tokens[start + i] == end_of_text;
            targets.push(if follows_end { u32::MAX } else { tokens[start + i + 1] });
            if model.config().mem_freq.is_some_and(|mem_freq| (i + 1).is_multiple_of(mem_freq)) {
                ids.push(model.config().landmark_id);
                targets.push(u32::MAX);
            }
        }
        let row = |ids: Vec<u32>| Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let (ids, targets) = (row(ids), row(targets));
        let mut attention = WindowAttention::new(model.config(), &ids, None).unwrap();
        let hidden = model.hidden(&ids, &mut attention, None).unwrap();
        for score in model.token_scores(&hidden, &targets).unwrap().into_iter().flatten() {
            sum += score.loss;
            count += 1;
        }
    }
    sum / count as f64
}

#[test]
fn without_a_cache_it_is_the_plain_window() {
    let text = text(3000);
    let folder = folder(&text);
    let path = folder.path();
    let mut tokens = Tokenizer::bytes().encode(&text).unwrap();
    tokens.push(256);
    for (name, length) in [("landmark", 400), ("dense", 512), ("dense", 360)] {
        let model = Gpt::load(path.join(name), &Device::Cpu).unwrap().detached();
        let expected = direct(&model, &tokens, length, 256);
        for batch_size in [1, 3] {
            let flags = format!(
                "--checkpoint {name} --dataset books --eval_seq_length {length} --mid_length {length} --batch_size {batch_size}"
            );
            let off = (loss(path, &flags) - expected).abs();
            assert!(off < 1e-5, "{name} {length}, {batch_size} rows: off by {off}");
        }
    }
    // Left out: what the window holds wherever landmarks fall, 500 tokens and their 10 or 11, or 512 tokens.
    assert_eq!(report(path, "--checkpoint landmark --dataset books")["setting"]["mid_length"], 500);
    assert_eq!(report(path, "--checkpoint dense --dataset books")["setting"]["eval_seq_length"], 512);
}

#[test]
fn a_cache_that_leaves_nothing_out_is_the_plain_window_too() {
    let folder = folder(&text(2500));
    let path = folder.path();
    let read = |flags: &str| loss(path, &format!("--dataset books --eval_seq_length 400 {flags}"));
    let landmark = read("--checkpoint landmark");
    // All eight blocks are within reach: 8 + 1 of 51 are less than the window.
    for chunk in [53, 30, 7] {
        let cached = read(&format!("--checkpoint landmark --use_cache --cache_topk 8 --mid_length {chunk}"));
        assert!((cached - landmark).abs() < 1e-5, "chunks of {chunk}: {cached}, not {landmark}");
    }
    let dense = read("--checkpoint dense");
    let cached = read("--checkpoint dense --lm_cache kv --mem_cache_size 400 --mid_length 60");
    assert!((cached - dense).abs() < 1e-5, "{cached}, not {dense}");
    // With less it is not.
    assert!((read("--checkpoint dense --lm_cache kv --mem_cache_size 30 --mid_length 60") - dense).abs() > 1e-5);
    // A chunk by itself sees nothing before it.
    assert!((read("--checkpoint dense --mid_length 60") - dense).abs() > 1e-5);
}

fn golden(case: &str) -> HashMap<String, Tensor> {
    let dir = std::env::var("LANDMARK_GOLDEN_DIR")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").to_string());
    candle_core::safetensors::load(Path::new(&dir).join(format!("{case}.safetensors")), &Device::Cpu).unwrap()
}

/// The authors' logits of whole texts give the loss that `eval` prints for their weights, texts and flags.
#[test]
fn the_loss_is_that_of_the_authors_logits() {
    let cases = [
        (
            "gpt_cache_top2_per_token_and_head_blocks40_chunk24",
            Variant::Landmark,
            "--lm_cache mem --mem_cache_size 40 --cache_topk 2 --cache_selection_method per_token_and_head --mid_length 24",
        ),
        (
            "gpt_cache_top4_per_token_and_head_blocks6_chunk40",
            Variant::Landmark,
            "--lm_cache mem --mem_cache_size 6 --cache_topk 4 --mid_length 40",
        ),
        (
            "gpt_cache_top2_max_over_heads_blocks40_chunk24",
            Variant::Landmark,
            "--lm_cache mem --mem_cache_size 40 --cache_topk 2 --cache_selection_method max_over_heads --mid_length 24",
        ),
        ("gpt_xl_cache64_chunk16", Variant::BaseRotary, "--lm_cache kv --mem_cache_size 64 --mid_length 16"),
    ];
    for (case, model, flags) in cases {
        let golden_case = golden(case);
        let config = GptConfig {
            model,
            vocab_size: 96,
            n_embd: 32,
            n_head: 2,
            n_layer: 3,
            sequence_length: 512,
            mem_freq: (model == Variant::Landmark).then_some(7),
            landmark_id: 90,
            ..GptConfig::default()
        };
        let weights = golden("gpt_landmark_forward").into_iter().filter_map(|(name, tensor)| {
            Some((name.strip_prefix("param.")?.to_string(), tensor.to_dtype(candle_core::DType::F64).unwrap()))
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        Gpt::from_tensors(&config, weights.collect()).unwrap().save(path.join("model")).unwrap();
        let ids = golden_case["input_ids"].to_dtype(candle_core::DType::U32).unwrap().to_vec2::<u32>().unwrap();
        let logits = golden_case["logits"].to_vec3::<f64>().unwrap();
        for (ids, logits) in ids.iter().zip(&logits) {
            let loss_of = |(logits, &target): (&Vec<f64>, &u32)| {
                let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max - logits[target as usize]
            };
            let expected = logits.iter().zip(&ids[1..]).map(loss_of).sum::<f64>() / (ids.len() - 1) as f64;
            // The authors' raw files: 16-bit ids without a header.
            fs::create_dir_all(path.join("data/raw")).unwrap();
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
            for file in ["train.bin", "val.bin"] {
                fs::write(path.join("data/raw").join(file), &bytes).unwrap();
            }
            let length = ids.len() - 1;
            let found = loss(path, &format!("--checkpoint model --dataset raw --eval_seq_length {length} {flags}"));
            assert!((found - expected).abs() < 1e-8, "{case}: {found}, expected {expected}");
        }
    }
}

#[test]
fn the_report_has_every_figure() {
    let folder = folder(&text(4000));
    let path = folder.path();
    let flags = "--checkpoint landmark --dataset books --use_cache --eval_seq_length 1500 --mid_length 200 --cache_topk 2 \
        --bins 5 --csv report.csv --plot report.svg --plot_distances distances.svg";
    let r = report(path, flags);
    assert_eq!((&r["sequences"], &r["tokens"], &r["split"]), (&2.into(), &3000.into(), &"validation".into()));
    let perplexity = r["perplexity"].as_f64().unwrap();
    assert!((r["loss"].as_f64().unwrap().exp() - perplexity).abs() < 1e-9 && perplexity > 100.);
    let bins = r["by_position"].as_array().unwrap();
    let edges: Vec<u64> = bins.iter().map(|bin| bin["from"].as_u64().unwrap()).collect();
    assert_eq!(edges, [0, 300, 600, 900, 1200]);
    let mean = bins.iter().map(|bin| bin["loss"].as_f64().unwrap()).sum::<f64>() / 5.;
    assert!((mean - r["loss"].as_f64().unwrap()).abs() < 1e-9);
    let shares = r["retrieved_by_distance"].as_array().unwrap();
    // 1500 tokens are 30 blocks, of which the first has none before it.
    assert_eq!((&shares[0]["from"], &shares.last().unwrap()["to"]), (&1.into(), &29.into()));
    assert!((shares.iter().map(|bin| bin["share"].as_f64().unwrap()).sum::<f64>() - 1.).abs() < 1e-9);
    for figure in ["seconds", "tok_per_s", "tok_per_s_first_tenth", "tok_per_s_last_tenth", "cache_bytes", "parameters"]
    {
        assert!(r[figure].as_f64().unwrap() > 0., "{figure}");
    }
    let setting = &r["setting"];
    assert_eq!(
        (&setting["mem_cache_freq"], &setting["cache_selection_method"]),
        (&50.into(), &"per_token_and_head".into())
    );
    let csv = fs::read_to_string(path.join("report.csv")).unwrap();
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!((lines.len(), lines[0].len()), (2, lines[1].len()));
    let column = lines[0].iter().position(|name| *name == "perplexity").unwrap();
    assert_eq!(lines[1][column].parse::<f64>().unwrap(), perplexity);
    let svg = fs::read_to_string(path.join("report.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("position in the sequence"));
    assert!(fs::read_to_string(path.join("distances.svg")).unwrap().contains("distance in blocks"));
    let (table, _) = succeed(path, "eval --checkpoint landmark --dataset books");
    for word in ["perplexity", "accuracy", "tok/s", "first tenth", "memory", "position in the sequence"] {
        assert!(table.contains(word), "{word}: {table}");
    }
}

#[test]
fn a_plain_text_is_one_sequence_unless_told_otherwise() {
    let folder = folder(&text(3000));
    let path = folder.path();
    fs::write(path.join("novel.txt"), text(2345)).unwrap();
    let whole = report(path, "--checkpoint landmark --file novel.txt --use_cache");
    assert_eq!((&whole["setting"]["eval_seq_length"], &whole["sequences"]), (&2344.into(), &1.into()));
    let cut = report(path, "--checkpoint landmark --file novel.txt --use_cache --eval_seq_length 1000");
    assert_eq!((&cut["tokens"], &cut["sequences"]), (&2000.into(), &2.into()));
    fs::write(path.join("empty.txt"), "").unwrap();
    for (flags, reason) in [
        (
            "--file novel.txt --eval_seq_length 2345",
            "--eval_seq_length 2345: novel.txt has 2345 tokens, enough for sequences of at most 2344",
        ),
        (
            "--dataset books --eval_seq_length 9000",
            "--eval_seq_length 9000: books (validation) has 3001 tokens, enough for sequences of at most 3000",
        ),
        ("--file empty.txt", "empty.txt: 0 tokens, expected at least 2"),
        ("--file missing.txt", "cannot read missing.txt"),
    ] {
        let text = error(path, &format!("eval --checkpoint landmark {flags}"));
        assert!(text.contains(reason), "{flags}: {text}");
    }
}

#[test]
fn the_references_command_lines_work_verbatim() {
    let folder = folder(&text(3000));
    let path = folder.path();
    // As eval_cmd_generator.py prints them, but for the folder and the length of our text.
    let accepted = "--distributed_backend None --mem_freq None --cache_selection_method per_token_and_head --no_compile \
        --batch_size 16 --positional_encoder rotary --pos_jump_on_mem 0 --dataset books";
    let landmark = format!(
        "--checkpoint landmark --lm_cache mem --mem_cache_size 40 --mem_cache_freq 50 --eval_seq_length 2048 --cache_topk 2 \
         --mid_length 250 --use_cache --eval_sample_size 4000000 {accepted}"
    );
    assert_eq!(report(path, &landmark)["tokens"], 2048);
    let dense = format!("--checkpoint dense --lm_cache none --eval_seq_length 360 --mid_length 360 {accepted}");
    assert_eq!(report(path, &dense)["sequences"], 8);
}

#[test]
fn bad_flags_are_named() {
    let folder = folder(&text(3000));
    let path = folder.path();
    // As the authors' code prepares data for training.
    let marked: Vec<u8> = (1..2000u16).flat_map(|i| (if i % 51 == 0 { 257 } else { i % 200 }).to_le_bytes()).collect();
    fs::create_dir_all(path.join("data/marked")).unwrap();
    for file in ["train.bin", "val.bin"] {
        fs::write(path.join("data/marked").join(file), &marked).unwrap();
    }
    let cases = [
        ("--checkpoint nowhere --dataset books", "--checkpoint nowhere: no such folder"),
        ("--checkpoint landmark", "name prepared data with --dataset, or a text with --file"),
        ("--checkpoint landmark --dataset books --dataset books", "one at a time"),
        ("--checkpoint landmark --dataset poems --data_dir nowhere", "--dataset poems: no usable data in nowhere"),
        ("--checkpoint landmark --dataset ../books", "--dataset ../books: expected the name of a folder"),
        ("--checkpoint landmark --dataset marked", "the text has landmarks already"),
        ("--checkpoint landmark --dataset books --split test", "has no test data"),
        ("--checkpoint landmark --dataset books --batch_size 0", "--batch_size 0"),
        ("--checkpoint landmark --dataset books --bins 0", "--bins 0"),
        ("--checkpoint landmark --dataset books --eval_seq_length 0", "--eval_seq_length 0"),
        ("--checkpoint landmark --dataset books --eval_sample_size 9", "--eval_sample_size 9: less than one sequence"),
        ("--checkpoint landmark --dataset books --mid_length 502", "--mid_length 502: expected 1 to 500"),
        ("--checkpoint landmark --dataset books --cache_topk 2", "--cache_topk is refused"),
        ("--checkpoint landmark --dataset books --mem_cache_size 9", "--mem_cache_size is refused"),
        ("--checkpoint landmark --dataset books --use_cache --cache_topk 10", "cache_topk is 10, expected at most 8"),
        ("--checkpoint landmark --dataset books --use_cache --mid_length 400", "--mid_length 400: expected 1 to 257"),
        ("--checkpoint landmark --dataset books --lm_cache kv", "--lm_cache kv is refused"),
        ("--checkpoint landmark --dataset books --lm_cache kv_train", "--lm_cache kv_train is refused"),
        ("--checkpoint dense --dataset books --lm_cache mem", "--lm_cache mem is refused"),
        ("--checkpoint dense --dataset books --use_cache --mem_cache_size 600", "--mem_cache_size 600"),
        ("--checkpoint landmark --dataset books --use_cache --rem_cutoff 0.1", "--rem_cutoff is refused"),
        ("--checkpoint landmark --dataset books --mem_freq 50", "--mem_freq 50 is refused"),
        ("--checkpoint landmark --dataset books --pos_jump_on_mem 9", "--pos_jump_on_mem 9 is refused"),
        ("--checkpoint landmark --dataset books --positional_encoder rotary_mem_jump", "--positional_encoder"),
        ("--checkpoint landmark --dataset books --distributed_backend nccl", "--distributed_backend nccl is refused"),
        ("--checkpoint landmark --dataset books --device cuda:0", "--device cuda:0"),
        (
            "--checkpoint landmark --dataset books --json missing/report.json",
            "--json missing/report.json: cannot write it",
        ),
        ("--checkpoint landmark --dataset books --plot_distances x.svg", "--plot_distances is refused"),
        ("--checkpoint landmark --dataset books --out x", "--out is refused: it belongs to --grid"),
        ("--checkpoint landmark --dataset books --xl_checkpoint x", "--xl_checkpoint is refused"),
        ("--grid table1 --landmark_checkpoint landmark", "name prepared data with --dataset"),
        ("--grid table1 --dataset books", "there is no model"),
        ("--grid table2 --dataset books --dense_checkpoint dense", "--dense_checkpoint is refused: table2 has no rows"),
        ("--grid table1 --dataset books --dense_checkpoint nowhere", "--dense_checkpoint"),
    ];
    for (flags, reason) in cases {
        let text = error(path, &format!("eval {flags}"));
        assert!(text.contains(reason), "{flags}: {text}");
    }
    for flags in [
        "--dataset books",
        "--grid table3 --dataset books",
        "--grid table1 --dataset books --checkpoint landmark",
        "--grid table1 --dataset books --cache_topk 4",
        "--grid table1 --dataset books --mem_cache_size 4",
        "--grid table1 --dataset books --json x.json",
        "--checkpoint landmark --dataset books --file x",
        "--checkpoint landmark --dataset books --split dev",
    ] {
        assert_eq!(landmark(path, &format!("eval {flags}")).status.code(), Some(2), "{flags}");
    }
    assert!(!path.join("exps").exists(), "a refused grid leaves nothing behind");
}

#[test]
fn a_context_miss_token_saves_retrievals() {
    let folder = folder(&text(3000));
    let path = folder.path();
    small(Variant::LandmarkWithCmt, Some(50), 512).save(path.join("cmt")).unwrap();
    Tokenizer::bytes().save(path.join("cmt")).unwrap();
    let read = |flags: &str| report(path, &format!("--checkpoint cmt --dataset books --eval_seq_length 1000 {flags}"));
    let all = read("--use_cache --cache_topk 2");
    assert_eq!((&all["setting"]["rem_cutoff"], &all["skipped_retrievals"]), (&Value::Null, &0.0.into()));
    let none = read("--use_cache --cache_topk 2 --rem_cutoff 1.0");
    assert_eq!((&none["setting"]["rem_cutoff"], &none["skipped_retrievals"]), (&1.0.into(), &1.0.into()));
    assert_eq!(none["retrieved_by_distance"], Value::Array(vec![]));
    assert_ne!(all["loss"], none["loss"]);
    // Without a cache nothing is retrieved, and nothing saved.
    assert_eq!(read("")["skipped_retrievals"], Value::Null);
}

/// Tokens of another tokenizer are refused, whatever their ids.
#[test]
fn tokens_of_another_tokenizer_are_refused() {
    let folder = folder(&text(3000));
    let path = folder.path();
    let other = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"whale": 0, "?": 1}, "unk_token": "?"}}"#;
    fs::write(path.join("landmark/tokenizer.json"), other).unwrap();
    let text = error(path, "eval --checkpoint landmark --dataset books");
    assert!(text.contains("books: its tokens are of another tokenizer"), "{text}");
}

fn cells(folder: &Path) -> HashMap<PathBuf, Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder.join("cells")) else { return HashMap::new() };
    let paths = entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
    paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// The columns that a second run must repeat: all but the speed.
fn figures(csv: &str) -> Vec<Vec<String>> {
    let speed = csv.lines().next().unwrap().split(',').position(|name| name == "tok_per_s").unwrap();
    let without =
        |line: &str| line.split(',').enumerate().filter(|(i, _)| *i != speed).map(|(_, x)| x.into()).collect();
    csv.lines().map(without).collect()
}

#[cfg(unix)]
#[test]
fn an_interrupted_grid_goes_on() {
    let folder = folder(&text(8300));
    let path = folder.path();
    let grid = |out: &str| {
        format!(
            "eval --grid table1 --dense_checkpoint narrow --landmark_checkpoint landmark --dataset books --out {out} \
             --eval_sample_size 8200"
        )
    };
    succeed(path, &grid("whole"));
    let csv = fs::read_to_string(path.join("whole/table1.csv")).unwrap();
    let markdown = fs::read_to_string(path.join("whole/table1.md")).unwrap();
    // A window of 256 cannot read 512 or 360 tokens at once; nobody gave a Transformer-XL.
    assert_eq!(csv.lines().filter(|line| line.contains(",refused,") && line.contains("--mid_length")).count(), 2);
    assert_eq!(csv.lines().filter(|line| line.contains(",no model,")).count(), 2);
    assert_eq!(csv.lines().filter(|line| line.contains(",done,")).count(), 12);
    assert!(
        markdown.contains("refused [1]") && markdown.contains("[1] --mid_length 512: expected 1 to 256"),
        "{markdown}"
    );
    assert!(fs::read_to_string(path.join("whole/table1-books.svg")).unwrap().starts_with("<svg"));
    assert_eq!(cells(&path.join("whole")).len(), 12);

    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(path).args(grid("half").split_whitespace()).stdin(Stdio::null());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while cells(&path.join("half")).len() < 3 {
        assert!(Instant::now() < deadline, "no cells are finished");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("The same command goes on."), "{stderr}");
    assert!(fs::read_to_string(path.join("half/table1.csv")).unwrap().contains(",pending,"));
    let mut before = cells(&path.join("half"));
    assert!((3..12).contains(&before.len()));
    // A damaged cell is evaluated again, a whole one is not.
    let damaged = before.keys().next().unwrap().clone();
    before.remove(&damaged);
    fs::write(&damaged, "{").unwrap();

    succeed(path, &grid("half"));
    let after = cells(&path.join("half"));
    assert_eq!(after.len(), 12);
    for (cell, bytes) in &before {
        // Its speed would be another one.
        assert!(&after[cell] == bytes, "{} was evaluated again", cell.display());
    }
    let again = fs::read_to_string(path.join("half/table1.csv")).unwrap();
    assert_eq!(figures(&again), figures(&csv));

    // Another model, sample or setting is another cell.
    small(Variant::BaseRotary, None, 512).save(path.join("narrow")).unwrap();
    succeed(path, &grid("half"));
    assert_eq!(cells(&path.join("half")).len(), 14);
    succeed(path, &grid("half").replace("8200", "4200"));
    assert!(cells(&path.join("half")).len() > 14);
}

#[test]
fn table2_compares_the_selections() {
    let folder = folder(&text(4200));
    let path = folder.path();
    let (table, _) = succeed(path, "eval --grid table2 --landmark_checkpoint landmark --dataset books --out t");
    for blocks in ["250 x 2 x 4", "250 x 4", "2 x 4"] {
        assert!(
            table.contains(&format!("| {blocks} ")) || table.contains(&format!(" {blocks} |")),
            "{blocks}: {table}"
        );
    }
    let csv = fs::read_to_string(path.join("t/table2.csv")).unwrap();
    for method in ["per_token_and_head", "max_over_heads", "max_over_tokens"] {
        assert_eq!(csv.lines().filter(|line| line.contains(method) && line.contains(",done,")).count(), 3, "{csv}");
    }
}
