//! `landmark finetune` and `landmark merge` as a user runs them.

mod support;

use candle_core::{DType, Device, Tensor};
use landmark_data::{Pretrained, Tokenizer};
use landmark_models::llama::{Llama, LlamaConfig};
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;
use support::succeed;

/// The authors' command line, less the launcher's own words.
const SEED: &[&str] = &[
    "finetune",
    "--model_name_or_path",
    "base",
    "--bf16",
    "True",
    "--output_dir",
    "out",
    "--cache_dir",
    "cache",
    "--num_train_epochs",
    "1",
    "--per_device_train_batch_size",
    "2",
    "--per_device_eval_batch_size",
    "2",
    "--gradient_accumulation_steps",
    "8",
    "--evaluation_strategy",
    "no",
    "--save_strategy",
    "steps",
    "--save_steps",
    "2000",
    "--save_total_limit",
    "2",
    "--learning_rate",
    "2e-5",
    "--weight_decay",
    "0.1",
    "--warmup_ratio",
    "0.03",
    "--lr_scheduler_type",
    "cosine",
    "--logging_steps",
    "1",
    "--fsdp",
    "full_shard auto_wrap",
    "--fsdp_transformer_layer_cls_to_wrap",
    "LlamaDecoderLayer",
    "--tf32",
    "True",
    "--max_steps",
    "15000",
];

/// Of two values of a flag the last one counts.
const SMALL: &str = "--device cpu --model_max_length 40 --mem_freq 9 --gradient_accumulation_steps 2 --max_steps 6 --save_steps 2 \
    --learning_rate 1e-2";

/// A folder with a tiny model `base`, and data made with its tokenizer.
fn prepared() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": true,
    });
    let config = LlamaConfig::from_json(&config.to_string()).unwrap();
    let model = Llama::init(&config, 5, DType::F32, &Device::Cpu).unwrap();
    let base = folder.path().join("base");
    model.save(&base, DType::F32).unwrap();
    Tokenizer::bytes().save(&base).unwrap();
    let text: String = (0..400).map(|i| format!("Chapter {i}. Call me Ishmael. ")).collect();
    fs::write(folder.path().join("text.txt"), text).unwrap();
    succeed(folder.path(), "prepare --dataset text --data_dir text.txt --tokenizer base --out data/redpajama");
    folder
}

/// Runs the seed's command with more flags: exit code, output, errors.
fn finetune(folder: &Path, more: &str) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(folder).args(SEED).args(SMALL.split_whitespace()).args(more.split_whitespace());
    let output = command.env_remove("WORLD_SIZE").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn file(folder: &Path, path: &str) -> Vec<u8> {
    fs::read(folder.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_seeds_command_fine_tunes_and_resumes_bit_for_bit() {
    let folder = prepared();
    let folder = folder.path();
    let (code, out, log) = finetune(folder, "");
    assert_eq!(code, Some(0), "{log}");
    assert!(out.starts_with("Finished after 6 steps: out"), "{out}");
    for note in
        ["--bf16: on the CPU", "--fsdp: there is one process", "rows of 40 tokens, 44 with a landmark (token 257)"]
    {
        assert!(log.contains(note), "{note}: {log}");
    }
    let checkpoint = |step: usize| folder.join(format!("out/checkpoint-{step}"));
    assert!(!checkpoint(2).exists() && checkpoint(4).is_dir() && checkpoint(6).is_dir());
    assert_eq!(String::from_utf8(file(folder, "out/metrics.jsonl")).unwrap().lines().count(), 6);
    let model = Llama::load(folder.join("out"), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(model.config().landmarks.unwrap().mem_freq, 9);
    assert!(String::from_utf8(file(folder, "out/config.json")).unwrap().contains("llama_with_landmark"));
    assert_eq!(Pretrained::from_folder(folder.join("out")).unwrap().tokenizer.landmark_id(), Some(257));
    assert!(finetune(folder, "").1.contains("out is finished"));

    let parts = "--output_dir parts --gradient_checkpointing";
    assert!(finetune(folder, &format!("{parts} --time_limit 0")).1.contains("Stopped at step 1 of 6"));
    let (code, _, error) = finetune(folder, parts);
    assert!(code == Some(1) && error.contains("--resume_from_checkpoint True"), "{error}");
    assert_eq!(finetune(folder, &format!("{parts} --resume_from_checkpoint True")).0, Some(0));
    assert!(file(folder, "out/model.safetensors") == file(folder, "parts/model.safetensors"));
    let (code, _, log) = finetune(folder, &format!("{parts} --resume_from_checkpoint parts/checkpoint-4"));
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn adapters_are_trained_resumed_and_merged() {
    let folder = prepared();
    let folder = folder.path();
    let lora = "--lora_r 4 --lora_alpha 8 --lora_dropout 0.1 --lora_target_modules q_proj,v_proj down_proj \
        --evaluation_strategy steps --eval_steps 3";
    assert_eq!(finetune(folder, &format!("{lora} --output_dir whole")).0, Some(0));
    assert!(String::from_utf8(file(folder, "whole/metrics.jsonl")).unwrap().contains("val_loss"));
    let parts = format!("{lora} --output_dir parts");
    assert!(finetune(folder, &format!("{parts} --time_limit 0")).1.contains("Stopped at step 1 of 6"));
    assert_eq!(finetune(folder, &format!("{parts} --resume_from_checkpoint")).0, Some(0));
    assert!(file(folder, "whole/adapter_model.safetensors") == file(folder, "parts/adapter_model.safetensors"));
    assert!(!folder.join("whole/model.safetensors").exists());

    let merge = "merge --model_name_or_path base --adapter whole --out merged --dtype float32";
    succeed(folder, merge);
    let model = Llama::load(folder.join("merged"), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(model.config().landmarks.unwrap().train_context_length, 44);
    assert_eq!(Pretrained::from_folder(folder.join("merged")).unwrap().tokenizer.landmark_id(), Some(257));
    let error = support::error(folder, "merge --model_name_or_path base --adapter base --out merged");
    assert!(error.contains("--adapter base") && error.contains("landmarks"), "{error}");
    peft_reads(folder, &model);

    // Read beside the base, it is the merged model; rounded it is half as large.
    let eval = "eval --dataset redpajama --split validation --eval_seq_length 44 --use_cache --device cpu --json";
    succeed(folder, &format!("{eval} merged.json --checkpoint merged"));
    succeed(folder, &format!("{eval} beside.json --checkpoint base --adapter whole"));
    let loss = |name: &str| {
        serde_json::from_slice::<serde_json::Value>(&file(folder, name)).unwrap()["loss"].as_f64().unwrap()
    };
    assert_eq!(loss("merged.json"), loss("beside.json"));
    succeed(folder, "export --checkpoint whole --out rounded");
    let bytes = |name: &str| file(folder, &format!("{name}/adapter_model.safetensors")).len();
    assert!(bytes("rounded") < bytes("whole") * 3 / 4);
    succeed(folder, &format!("{eval} rounded.json --checkpoint base --adapter rounded"));
    assert!((loss("rounded.json") - loss("beside.json")).abs() < 1e-2);
    // In a session too, which knows the adapter again.
    fs::write(folder.join("told.txt"), "Chapter 7. Call me Ishmael. ".repeat(20)).unwrap();
    let answer = |create: &str, session: &str| {
        let on = format!("{session} --device cpu");
        succeed(folder, &format!("session create {session} --checkpoint {create} --device cpu"));
        succeed(folder, &format!("session append {on} --file told.txt"));
        succeed(folder, &format!("session ask {on} --prompt Call --temperature 0 --max_new_tokens 12")).0
    };
    assert_eq!(answer("base --adapter whole", "told"), answer("merged", "told-merged"));
    fs::rename(folder.join("whole"), folder.join("moved")).unwrap();
    let ask = "session ask told --prompt Call --device cpu --max_new_tokens 2";
    assert!(support::error(folder, ask).contains("the session's adapter is not at"));
    succeed(folder, &format!("{ask} --adapter moved"));
    assert!(support::error(folder, &format!("{ask} --adapter rounded")).contains("is not the one that read"));
    let error = support::error(folder, "session ask told-merged --prompt Call --adapter moved");
    assert!(error.contains("the session's model has none"), "{error}");
    let error = support::error(folder, &format!("{eval} other.json --checkpoint base --adapter base"));
    assert!(error.contains("--adapter base") && error.contains("landmarks"), "{error}");
}

/// A Python with `peft`, if this machine has one. `LANDMARK_PYTHON` names another than `python3`.
fn python() -> Option<OsString> {
    let python = std::env::var_os("LANDMARK_PYTHON").unwrap_or("python3".into());
    let has = Command::new(&python).args(["-c", "import peft, torch, transformers"]).output();
    if has.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    println!("skipped: {} has no peft and transformers (LANDMARK_PYTHON names another one)", python.display());
    None
}

/// The adapter beside the base in `peft`, the merged model in `transformers` and ours: the same logits.
fn peft_reads(folder: &Path, merged: &Llama) {
    let Some(python) = python() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft_logits.py");
    let output = Command::new(&python).current_dir(folder).arg(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let theirs = candle_core::safetensors::load(folder.join("logits.safetensors"), &Device::Cpu).unwrap();
    let ids = theirs["ids"].to_dtype(DType::U32).unwrap();
    // Without landmarks in the text, and so without what only this program computes.
    let hidden = merged.hidden(&ids, &mut merged.window_attention(&ids).unwrap()).unwrap();
    let ours = merged.logits(&hidden).unwrap();
    for name in ["adapter", "merged"] {
        let off = (&ours - &theirs[name]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(off < 1e-4, "{name}: {off}");
    }
    let embedding: Tensor = theirs["landmark"].clone();
    let row = merged.weights().find(|(name, _)| *name == "model.embed_tokens.weight").unwrap().1.dense().unwrap();
    let off =
        (row.get(257).unwrap() - embedding).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(off, 0.);
}

#[test]
fn what_cannot_work_is_refused_by_name() {
    let folder = prepared();
    let folder = folder.path();
    for (flags, expected) in [
        ("--fp16 True", "--fp16 is refused"),
        ("--use_flash False", "--use_flash False is refused"),
        ("--deepspeed x.json", "--deepspeed is refused: one process"),
        ("--local_rank 1", "--local_rank is refused: one process"),
        ("--load_in_4bit", "--load_in_4bit is refused: quantized weights come from GGUF"),
        ("--overwrite_output_dir", "--overwrite_output_dir is refused"),
        ("--adam_epsilon 1e-6", "--adam_epsilon is refused"),
        ("--eval_steps 4", "--eval_steps is refused: it needs"),
        ("--save_strategy epoch", "--save_strategy epoch is refused"),
        ("--answer_weight 3", "--answer_weight is refused"),
        ("--negative_share 0.3", "--negative_share is refused"),
        ("--negative_rows 2", "negative_rows"),
        ("--negative_rows 1 --negative_top_k 9", "negative_top_k"),
        ("--max_steps 0", "--max_steps 0"),
        ("--mem_freq 0", "--mem_freq"),
        ("--learning_rate 0", "--learning_rate: 0"),
        ("--warmup_ratio 2", "--warmup_ratio 2"),
        ("--model_max_length 600", "--model_max_length"),
        ("--lora_r 2 --lora_target_modules wte", "lora_target_modules"),
        ("--dataset other --data_dir none", "--dataset other: no usable data"),
        ("--model_name_or_path nobody/nothing", "--model_name_or_path: "),
        ("--resume_from_checkpoint out/checkpoint-3", "checkpoint-3"),
    ] {
        let (code, _, error) = finetune(folder, flags);
        assert!(code == Some(1) && error.contains(expected), "{flags}: {error}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    let output = command.current_dir(folder).args(SEED).env("WORLD_SIZE", "8").output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("WORLD_SIZE=8: one process"));
}

/// A tuned model and back, to a rounding; and a damaged difference is told by the sum.
#[test]
fn weight_diffs_are_made_and_recovered() {
    let folder = prepared();
    let folder = folder.path();
    assert_eq!(finetune(folder, "--max_steps 3").0, Some(0));
    succeed(folder, "weight_diff make --path_raw base --path_tuned out --path_diff diff");
    let recover = "weight_diff recover --path_raw base --path_diff diff --path_tuned again";
    let (said, _) = succeed(folder, recover);
    assert!(said.contains("as they should"), "{said}");
    let load = |name: &str| Llama::load(folder.join(name), DType::F32, &Device::Cpu).unwrap();
    let (out, again, diff) = (load("out"), load("again"), load("diff"));
    assert_eq!(out.config().landmarks, again.config().landmarks);
    let mut changed = 0;
    for (((name, a), (_, b)), (_, d)) in out.weights().zip(again.weights()).zip(diff.weights()) {
        let most = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let off = most(&(a.dense().unwrap() - b.dense().unwrap()).unwrap());
        assert!(off < 1e-6, "{name}: {off}");
        changed += usize::from(most(&d.dense().unwrap()) > 1e-4);
    }
    assert!(changed > 15, "{changed}");
    assert_eq!(Pretrained::from_folder(folder.join("again")).unwrap().tokenizer.landmark_id(), Some(257));
    fs::write(folder.join("diff/checksum_psum.txt"), "12.5").unwrap();
    assert!(support::error(folder, recover).contains("expected 12.5"));
    let error = support::error(folder, "weight_diff make --path_raw base --path_tuned base --path_diff diff");
    assert!(error.contains("landmarks"), "{error}");
}

/// Exercises need longer rows than plain text. Beside them, rows that lend their landmarks.
#[test]
fn exercises_are_planted() {
    let folder = prepared();
    let flags = "--model_max_length 300 --mem_freq 25 --exercise_rows 0.25 --negative_rows 1 \
        --per_device_train_batch_size 4 --max_steps 2 --output_dir exercised";
    let (code, _, log) = finetune(folder.path(), flags);
    assert_eq!(code, Some(0), "{log}");
}
