//! The commands that read, with models of the LLaMA family: small ones of random weights, of bytes.

mod support;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use candle_core::{DType, Device};
use landmark_data::{Pretrained, Tokenizer};
use landmark_models::llama::{LandmarkConfig, Llama, LlamaConfig};
use support::{error, succeed};

/// A folder with the models `base` and `landmarks`, as Hugging Face has them, and the text `book.txt`.
fn models() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let json = r#"{"model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256}"#;
    let config = LlamaConfig::from_json(json).unwrap();
    let base = || Llama::init(&config, 1, DType::F32, &Device::Cpu).unwrap();
    let landmarks =
        LandmarkConfig { mem_id: 257, mem_freq: 7, train_context_length: 64, include_landmark_in_loss: true };
    let pretrained = Pretrained::from_settings(Tokenizer::bytes(), serde_json::Map::new());
    for (name, model) in [("base", base()), ("landmarks", base().with_landmarks(landmarks, 257).unwrap())] {
        let to = folder.path().join(name);
        model.save(&to, DType::F32).unwrap();
        pretrained.save(&to).unwrap();
    }
    let text: String = (0..60).map(|i| format!("Chapter {i}. It was a dark and stormy night. ")).collect();
    fs::write(folder.path().join("book.txt"), text).unwrap();
    let template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:";
    fs::write(folder.path().join("template.jinja"), template).unwrap();
    folder
}

fn chat(folder: &Path, arguments: &str, input: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmark"));
    command.current_dir(folder).args(arguments.split_whitespace());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn models_of_the_llama_family_are_read_with() {
    let models = models();
    let folder = models.path();
    // Through the landmark cache, and with the last tokens' keys.
    let generate = "generate --file book.txt --max_new_tokens 12 --temperature 0 --checkpoint";
    let of = |arguments: &str| succeed(folder, arguments).0;
    let through_blocks = of(&format!("{generate} landmarks --show_blocks"));
    assert!(through_blocks.contains("Chapter"), "{through_blocks}");
    of(&format!("{generate} base"));
    // The seed's word for it.
    let again = "generate --file book.txt --max_new_tokens 12 --temperature 0 --model_name_or_path landmarks";
    assert_eq!(of(again), of(&format!("{generate} landmarks")));
    let eval = of("eval --file book.txt --checkpoint landmarks --use_cache --eval_seq_length 500");
    assert!(eval.contains("llama_with_landmark") && eval.contains("perplexity"), "{eval}");
    let eval = of("eval --file book.txt --checkpoint base --eval_seq_length 64");
    assert!(eval.contains("(llama, "), "{eval}");
    of("passkey --checkpoint landmarks --lengths 300 --trials 2 --out exps");

    assert!(error(folder, &format!("{generate} base --lm_cache mem")).contains("no landmarks"));
    assert!(error(folder, "generate --prompt It --checkpoint some-org/some-model").contains("hf download"));
    let json = fs::read_to_string(folder.join("base/config.json")).unwrap();
    fs::write(folder.join("base/config.json"), json.replace("\"llama\"", "\"gpt_neox\"")).unwrap();
    let unknown = error(folder, "generate --prompt It --checkpoint base");
    assert!(unknown.contains("model_type") && unknown.contains("gpt_neox"), "{unknown}");
    fs::write(folder.join("half.gguf"), b"GGUF\x03\0\0\0\xff").unwrap();
    assert!(error(folder, "generate --prompt It --checkpoint half.gguf").contains("half.gguf"));
}

#[test]
fn chat_answers_line_by_line() {
    let models = models();
    let folder = models.path();
    let flags = "chat --checkpoint landmarks --chat_template template.jinja --temperature 0 --max_new_tokens 9";
    let one = chat(folder, flags, "Hello\n");
    assert!(one.ends_with('\n') && one.len() >= 10, "{one:?}");
    // The second reply depends on what was said before; empty lines are nothing.
    let two = chat(folder, flags, "Hello\n\nBye\n");
    assert!(two.starts_with(&one) && two.len() > one.len(), "{two:?}");
    let about = chat(folder, &format!("{flags} --file book.txt --system Answer"), "Who?\n");
    assert_ne!(about, chat(folder, flags, "Who?\n"));
    assert!(error(folder, "chat --checkpoint landmarks").contains("--chat_template"));
}
