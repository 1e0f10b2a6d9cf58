//! The command line of the real binary.

mod support;

use std::fs;
use std::process::Command;
use support::{SEED, error, landmark, prepared};

fn small_seed() -> String {
    let smaller = [
        ("--n_embd 1024", "--n_embd 32"),
        ("--n_layer 12", "--n_layer 1"),
        ("--batch_size 16", "--batch_size 2"),
        ("--acc_steps 8", "--acc_steps 2"),
        ("--iterations 240000", "--iterations 6"),
        ("--save_checkpoint_freq 20000", "--save_checkpoint_freq 2"),
    ];
    smaller.into_iter().fold(SEED.to_string(), |line, (from, to)| {
        assert!(line.contains(from));
        line.replace(from, to)
    })
}

#[test]
fn the_seeds_command_line_is_understood() {
    let folder = prepared();
    let output = landmark(folder.path(), &small_seed());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("--dtype torch.bfloat16: on the CPU training runs in float32"), "{log}");
    assert!(log.contains("6/6 loss=") && log.contains("tok/s ETA 0:00:00") && log.contains("6 [val] loss="), "{log}");
    let experiment = "exps/pg19/landmark/landmark_lr0.002_memfreq50_bs2x2_seqlen512/\
        iterations=6_save_checkpoint_freq=2_dataset=pg19_n_layer=1_n_embd=32_seed=2";
    let experiment = folder.path().join(experiment);
    for file in ["metrics.jsonl", "summary.json", "ckpt_2/SHA256SUMS", "ckpt_6/tokenizer.json", "ckpt_6/state.json"] {
        assert!(experiment.join(file).is_file(), "{file}");
    }
    let again = landmark(folder.path(), &small_seed());
    assert!(again.status.success() && String::from_utf8_lossy(&again.stdout).starts_with("Already found experiment"));
}

#[test]
fn transformer_xl_trains_as_the_reference_spells_it() {
    let folder = prepared();
    let line = "train --config_format rotary --model base_rotary --n_embd 32 --n_head 2 --n_layer 2 --batch_size 2 --acc_steps 2 \
        --sequence_length 64 --mem_freq None --dataset pg19 --iterations 8 --optimization_process transformer_xl \
        --total_sequence_length 256 --lm_cache kv_train --mem_cache_size 64 --allow_cache_during_training \
        --postpone_lm_cache --exp_name e --eval_freq 4";
    let stopped = landmark(folder.path(), &format!("{line} --time_limit 0"));
    assert!(stopped.status.success(), "{}", String::from_utf8_lossy(&stopped.stderr));
    let output = landmark(folder.path(), &format!("{line} --resume"));
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && log.contains("--postpone_lm_cache: caches are made"), "{log}");
    let metrics = fs::read_to_string(folder.path().join("exps/pg19/base_rotary/e/metrics.jsonl")).unwrap();
    let of = |name: &str| -> Vec<f64> {
        let lines = metrics.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line[name].as_f64()).collect()
    };
    let losses = of("loss");
    assert!(losses.len() == 8 && losses[7] < losses[0], "{losses:?}");
    // A loss is per token, however many windows a row has: bytes and a model that knows nothing begin at ln 258.
    assert!((losses[0] - 258f64.ln()).abs() < 0.3 && of("val_loss").iter().all(|loss| *loss < 5.6), "{metrics}");
    for (flags, reason) in [
        ("--total_sequence_length 32", "--total_sequence_length: 32 is less than --sequence_length"),
        ("--total_sequence_length 90000", "--total_sequence_length: 90000 is too long for the"),
        ("--mem_cache_size 0", "--mem_cache_size: 0 is too small"),
        ("--model landmark --mem_freq 50", "--optimization_process: transformer_xl has a plain softmax"),
    ] {
        // Of two values of a flag the last one counts.
        let text = error(folder.path(), &format!("{line} --exp_name other {flags}"));
        assert!(text.contains(reason), "{flags}: {text}");
    }
}

/// Optimizers, schedules, models and what is random in training, each learning a little.
#[test]
fn what_the_reference_offers_trains() {
    let folder = prepared();
    let choices = [
        "--opt sgd --scheduler linear --lr 0.02",
        "--opt adafactor --scheduler none --lr 0.01",
        "--model landmark_with_cmt --enable_rem_score --under_rem_score_prob 0.3",
        "--model landmark --group_dropout 0.2 --dropout 0.1",
        "--model landmark --positional_encoder rotary_mem_jump --pos_jump_on_mem 10",
        "--positional_encoder rotary_mem_jump --pos_jump_on_mem 10",
        "--model landmark --softmax_func nomem --bias True",
        "--model landmark --softmax_func ignore_mem --mem_freq 20",
    ];
    for (number, choice) in choices.into_iter().enumerate() {
        let name = format!("run{number}");
        let output = landmark(
            folder.path(),
            &format!(
                "train --n_embd 32 --n_head 2 --n_layer 2 --batch_size 2 --acc_steps 1 --sequence_length 64 --mem_freq 7 --dataset pg19 \
                 --iterations 12 --lr 0.01 --exp_name {name} --results_base_folder runs {choice}"
            ),
        );
        assert!(output.status.success(), "{choice}: {}", String::from_utf8_lossy(&output.stderr));
        let model = choice.strip_prefix("--model ").map_or("base_rotary", |rest| rest.split(' ').next().unwrap());
        let metrics = folder.path().join("runs/pg19").join(model).join(name).join("metrics.jsonl");
        let metrics = fs::read_to_string(metrics).unwrap();
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
        let losses: Vec<f64> = metrics.lines().filter_map(line).collect();
        assert!(losses.len() == 12 && losses[11] < losses[0] - 0.1, "{choice}: {losses:?}");
    }
}

#[test]
fn a_time_limit_stops_and_resume_goes_on() {
    let folder = prepared();
    let line = small_seed().replace("--iterations 6", "--iterations 20 --exp_name e");
    let output = landmark(folder.path(), &format!("{line} --time_limit 0"));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.starts_with("Stopped at iteration 1 of 20") && text.contains("--resume"),
        "{text}"
    );
    let refused = landmark(folder.path(), &line);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && text.contains("holds an unfinished run at iteration 1: pass --resume"),
        "{text}"
    );
    assert!(landmark(folder.path(), &format!("{line} --resume")).status.success());
    assert!(folder.path().join("exps/pg19/landmark/e/ckpt_20/model.safetensors").is_file());
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_says_how_to_go_on() {
    let folder = prepared();
    let line = small_seed().replace("--iterations 6", "--iterations 100000 --exp_name e");
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(folder.path()).args(line.split_whitespace());
    let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let experiment = folder.path().join("exps/pg19/landmark/e");
    while !experiment.join("ckpt_2").exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(130), "{text}");
    let iteration = text.strip_prefix("Stopped at iteration ").and_then(|rest| rest.split(' ').next()).unwrap();
    assert!(experiment.join(format!("ckpt_{iteration}/model.safetensors")).is_file(), "{text}");
    assert!(text.contains("--resume"), "{text}");
}

#[test]
fn refused_flags_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let xl = "--optimization_process transformer_xl";
    let cases = [
        ("--distributed_backend nccl", "distributed_backend nccl is refused: this build trains on one device"),
        ("--opt sgd --beta1 0.5", "beta1 is refused: it belongs to --opt adamw"),
        ("--group_dropout 0.1", "group_dropout is refused: --model base_rotary has no blocks"),
        ("--softmax_func nomem", "softmax_func is refused: --model base_rotary"),
        ("--total_sequence_length 2048", "total_sequence_length is refused: it belongs to --optimization_process"),
        (
            "--allow_cache_during_training",
            "allow_cache_during_training is refused: it belongs to --optimization_process",
        ),
        (&format!("{xl} --lm_cache mem"), "lm_cache mem is refused: transformer_xl trains with --lm_cache kv_train"),
        (xl, "transformer_xl needs --total_sequence_length N"),
        (&format!("{xl} --total_sequence_length 1024"), "transformer_xl needs --lm_cache kv_train"),
        (&format!("{xl} --total_sequence_length 1024 --lm_cache kv"), "transformer_xl needs --mem_cache_size N"),
        (
            &format!("{xl} --total_sequence_length 1024 --lm_cache kv --mem_cache_size 256"),
            "transformer_xl needs --allow_cache_during_training",
        ),
        ("--enable_rem_score", "enable_rem_score is refused: only --model landmark_with_cmt"),
        ("--under_rem_score_prob 0.5", "under_rem_score_prob is refused: only --model landmark_with_cmt"),
        ("--rem_cutoff 0.1", "rem_cutoff is refused: the reference does not train with it"),
        ("--pos_jump_on_mem 9", "pos_jump_on_mem is refused: it needs --positional_encoder rotary_mem_jump"),
        ("--answer_weight 2", "answer_weight is refused: it needs --exercise_rows SHARE"),
        ("--several_facts 0.1", "several_facts is refused: it needs --exercise_rows SHARE"),
        ("--asked_again 0.1", "asked_again is refused: it needs --exercise_rows SHARE"),
        ("--negative_share 0.1", "negative_share is refused: it needs --negative_rows N"),
        ("--negative_top_k 2", "negative_top_k is refused: it needs --negative_rows N"),
        ("--use_cache", "use_cache is refused: training reads no cache"),
        ("--lm_cache mem", "lm_cache is refused: training reads no cache"),
        ("--mem_cache_size 40", "mem_cache_size is refused: training reads no cache"),
        ("--mem_cache_freq 50", "mem_cache_freq is refused: training reads no cache"),
        ("--cache_topk 4", "cache_topk is refused: training reads no cache"),
        ("--cache_selection_method max_over_heads", "cache_selection_method is refused: training reads no cache"),
        ("--eval_seq_length 2048", "eval_seq_length is refused: training reads no cache"),
        ("--eval_sample_size 4", "eval_sample_size is refused: training reads no cache"),
        ("--mid_length 200", "mid_length is refused: training reads no cache"),
        ("--device cuda:99", "--device cuda:99: "),
        ("--dataset pg19 --data_dir nowhere", "dataset pg19: no usable data in nowhere"),
        ("", "dataset NAME is missing"),
        ("--dataset ../x", "dataset ../x: expected the name of a folder"),
        ("--dataset x --exp_name ../y", "exp_name ../y: expected a name"),
        ("--time_limit -1", "time_limit"),
    ];
    for (flags, reason) in cases {
        let flags = if flags.starts_with("--time_limit") { "--time_limit=-1" } else { flags };
        let text = error(folder.path(), &format!("train {flags}"));
        assert!(text.contains(reason), "{flags}: {text}");
    }
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "a refused command leaves nothing behind");
}

#[test]
fn bad_values_name_the_flag() {
    let folder = prepared();
    let cases = [
        ("--vocab_size 257", "--vocab_size: 257 is too small for this data, whose ids and landmark need 258"),
        ("--sequence_length 100000", "--sequence_length: 100000 is too long for the validation data"),
        ("--n_head 7", "n_embd"),
        ("--lr 0", "--lr: 0 is outside its range"),
        ("--dropout 1", "dropout"),
        ("--mem_freq 0", "mem_freq"),
        ("--grad_clip 0", "--grad_clip: 0 is outside its range"),
        ("--tokenizer missing.json", "--tokenizer"),
        ("--exercise_rows 0.5", "--exercise_rows: exercises need --whole_blocks"),
        ("--exercise_rows 1.5 --whole_blocks", "--exercise_rows: 1.5, expected a share above 0"),
        ("--exercise_rows 0.5 --whole_blocks --answer_weight 0", "--answer_weight: 0, expected a number above 0"),
        ("--whole_blocks --mem_freq None", "--whole_blocks: other landmarks, or none, expected landmarks"),
        ("--negative_rows 2", "--negative_rows: only --model landmark"),
        ("--model landmark --negative_rows 50", "negative_rows"),
        ("--model landmark --negative_rows 2 --negative_top_k 9", "negative_top_k"),
    ];
    for (flags, reason) in cases {
        let text = error(folder.path(), &format!("train --dataset pg19 {flags}"));
        assert!(text.contains(reason), "{flags}: {text}");
    }
}

#[test]
fn unknown_flags_and_values_fail() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        "train --iteration 5",
        "train --iterations many",
        "train --mem_freq none",
        "train --bias",
        "train --bias maybe",
        "train --scheduler cosine",
        "train --model gpt2",
        "train --device tpu",
        "train --config_format base",
        "prepare --dataset other --data_dir x --out y",
        "prepare --dataset text --out y",
        "unknown",
    ] {
        let output = landmark(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
    }
}

#[test]
fn help_and_completions_are_printed() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, expected) in [
        ("train --help", "--save_checkpoint_freq"),
        ("prepare --help", "--val_fraction"),
        ("--help", "completions"),
        ("completions bash", "complete -F"),
        ("completions zsh", "#compdef landmark"),
        ("completions fish", "complete -c landmark"),
    ] {
        let output = landmark(folder.path(), arguments);
        assert!(output.status.success(), "{arguments}");
        assert!(String::from_utf8(output.stdout).unwrap().contains(expected), "{arguments}");
    }
}
