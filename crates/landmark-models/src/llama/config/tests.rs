//! Files as they are in the wild, and as they should not be.

use super::*;

fn minimal() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 6,
    })
}

fn with(changes: Value) -> Result<LlamaConfig> {
    let mut json = minimal();
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    LlamaConfig::from_json(&json.to_string())
}

#[test]
fn what_files_leave_out_is_what_their_classes_say() {
    let llama = with(json!({})).unwrap();
    assert_eq!((llama.num_key_value_heads, llama.head_dim, llama.max_position_embeddings), (6, 8, 2048));
    assert_eq!((llama.rms_norm_eps, llama.rope_theta, llama.window()), (1e-6, 10_000., 2048));
    let mistral = with(json!({"model_type": "mistral", "num_attention_heads": 8})).unwrap();
    assert_eq!((mistral.num_key_value_heads, mistral.window()), (8, 4096));
    let whole = with(json!({"model_type": "mistral", "sliding_window": null, "num_key_value_heads": null})).unwrap();
    assert_eq!((whole.num_key_value_heads, whole.window()), (6, 131_072));
    let qwen =
        with(json!({"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 100, "eos_token_id": [1, 2]}));
    let qwen = qwen.unwrap();
    assert_eq!((qwen.window(), qwen.attention_biases(), &*qwen.eos_token_id), (32_768, (true, false), &[1, 2][..]));
    let qwen3 = with(json!({"model_type": "qwen3", "num_key_value_heads": 2})).unwrap();
    assert_eq!((qwen3.head_dim, qwen3.qk_norm()), (128, true));
}

#[test]
fn rope_is_read_in_both_spellings() {
    let old = with(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})).unwrap();
    let new = with(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}})).unwrap();
    assert_eq!((old.rope_theta, old.rope_scaling), (5e5, RopeScaling::Linear { factor: 4. }));
    assert_eq!((new.rope_theta, new.rope_scaling), (old.rope_theta, old.rope_scaling));
    let yarn = with(json!({"rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768
    }}));
    let RopeScaling::Yarn { attention_factor, beta_fast, .. } = yarn.unwrap().rope_scaling else { panic!() };
    assert!((attention_factor - 1.1386294).abs() < 1e-6 && beta_fast == 32.);
}

#[test]
fn json_goes_round() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let landmarks = json!({
        "model_type": "llama_with_landmark", "mem_id": 127, "mem_freq": 63, "train_context_length": 512,
        "include_landmark_in_loss": false,
    });
    let yarn = json!({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.875, "truncate": false});
    for changes in [
        json!({"transformers_version": "4.28", "use_cache": true, "bos_token_id": 1, "eos_token_id": 2}),
        json!({"rope_scaling": llama3, "eos_token_id": [5, 6], "tie_word_embeddings": true}),
        json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "attention_bias": true, "mlp_bias": true}),
        json!({"rope_parameters": yarn}),
        json!({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": null}),
        json!({"model_type": "qwen2", "num_key_value_heads": 2, "mem_id": 3, "mem_freq": 50}),
        json!({"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}),
        landmarks,
    ] {
        let config = with(changes).unwrap();
        let again = LlamaConfig::from_json(&config.to_json()).unwrap();
        let written = |config: &LlamaConfig| LlamaConfig { other: Map::new(), ..config.clone() };
        assert_eq!(written(&again), written(&config));
        assert_eq!(config.other.get("use_cache"), again.other.get("use_cache"));
    }
    let json: Value = serde_json::from_str(&with(landmarks_of("llama")).unwrap().to_json()).unwrap();
    assert_eq!((&json["model_type"], &json["mem_freq"]), (&json!("llama_with_landmark"), &json!(63)));
}

fn landmarks_of(model_type: &str) -> Value {
    json!({"model_type": model_type, "mem_id": 127, "mem_freq": 63, "train_context_length": 512})
}

#[test]
fn errors_name_the_field() {
    let cases = [
        ("model_type", json!({"model_type": "gemma"})),
        ("model_type", json!({"model_type": null})),
        ("hidden_act", json!({"hidden_act": "gelu"})),
        ("quantization_config", json!({"quantization_config": {"bits": 4}})),
        ("vocab_size", json!({"vocab_size": "many"})),
        ("vocab_size", json!({"vocab_size": -1})),
        ("hidden_size", json!({"hidden_size": 1e300})),
        ("hidden_size", json!({"hidden_size": 1u64 << 40})),
        ("num_hidden_layers", json!({"num_hidden_layers": 1 << 20})),
        ("num_attention_heads", json!({"num_attention_heads": 0, "num_key_value_heads": 1})),
        ("num_key_value_heads", json!({"num_key_value_heads": 4})),
        ("head_dim", json!({"head_dim": 7})),
        ("rms_norm_eps", json!({"rms_norm_eps": 0.0})),
        ("rope_theta", json!({"rope_theta": 0})),
        ("rope_scaling", json!({"rope_scaling": "linear"})),
        ("rope_type", json!({"rope_scaling": {"rope_type": "longrope"}})),
        ("factor", json!({"rope_scaling": {"rope_type": "linear"}})),
        ("factor", json!({"rope_scaling": {"rope_type": "yarn", "factor": -1.0}})),
        (
            "high_freq_factor",
            json!({"rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0
            }}),
        ),
        ("partial_rotary_factor", json!({"partial_rotary_factor": 0.5})),
        ("sliding_window", json!({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 0})),
        ("eos_token_id", json!({"eos_token_id": ["a"]})),
        ("mem_id", json!({"model_type": "llama_with_landmark"})),
        ("mem_id", json!({"mem_id": 128, "mem_freq": 63})),
        ("mem_freq", json!({"mem_id": 127})),
        ("mem_freq", json!({"mem_id": 127, "mem_freq": 512})),
        ("train_context_length", json!({"mem_id": 127, "mem_freq": u64::MAX - 1, "train_context_length": u64::MAX})),
    ];
    for (expected, changes) in cases {
        let error = with(changes).unwrap_err();
        assert!(matches!(error, Error::Config { field, .. } if field == expected), "{expected}: {error}");
    }
    let mut missing = minimal();
    missing.as_object_mut().unwrap().remove("hidden_size");
    let error = LlamaConfig::from_json(&missing.to_string()).unwrap_err();
    assert!(matches!(error, Error::Config { field: "hidden_size", .. }), "{error}");
    for text in ["{", "[]", ""] {
        assert!(LlamaConfig::from_json(text).is_err());
    }
}
