//! The tokenizer in a GGUF file, as a `tokenizer.json`.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value as Gguf;
use serde_json::{Map, Value, json};

use super::{Gguf as File, as_id};
use crate::Result;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";

/// llama.cpp's kinds of tokens.
const NORMAL: u32 = 1;
const UNKNOWN: u32 = 2;
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// How texts are cut into words before the merges, by llama.cpp's names for it.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl File {
    /// The file's tokenizer: a `tokenizer.json`, and what a `tokenizer_config.json` beside it would say, the chat template among it.
    ///
    /// # Errors
    /// A key by its name: missing, of another type, or a kind of tokenizer that is not known here.
    pub fn tokenizer(&self) -> Result<(String, Map<String, Value>)> {
        let kind = self.required(MODEL, string)?;
        let tokens = self.required(TOKENS, |value| list(value, string))?;
        let types = self.optional(TYPES, |value| list(value, as_id))?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        if types.len() != tokens.len() {
            return self
                .wrong(TYPES, &format!("a list of {}, expected {}, as there are tokens", types.len(), tokens.len()));
        }
        let (mut json, usually_begins) = match kind.as_str() {
            "gpt2" => self.byte_level(&tokens)?,
            "llama" => (self.sentence_piece(&tokens, &types)?, true),
            _ => return self.wrong(MODEL, &format!("{kind}, expected gpt2 or llama")),
        };
        let added = (0..)
            .zip(tokens.iter().zip(&types))
            .filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED));
        let added = added.map(|(id, (token, &kind)): (u32, _)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": kind != USER_DEFINED,
            })
        });
        json["added_tokens"] = added.collect();
        json["version"] = "1.0".into();
        let mut settings = Map::new();
        for (name, key) in
            [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")]
        {
            let key = format!("tokenizer.ggml.{key}_token_id");
            if let Some(id) = self.optional(&key, as_id)? {
                let Some(token) = tokens.get(id as usize) else {
                    return self.wrong(&key, &format!("{id}, and there are {} tokens", tokens.len()));
                };
                settings.insert(name.into(), token.as_str().into());
            }
        }
        let begins = self.optional("tokenizer.ggml.add_bos_token", |value| value.to_bool().ok())?;
        settings.insert("add_bos_token".into(), begins.unwrap_or(usually_begins).into());
        if let Some(template) = self.string("tokenizer.chat_template")? {
            settings.insert("chat_template".into(), template.into());
        }
        Ok((json.to_string(), settings))
    }

    /// Merges of bytes, as GPT-2 has them; and whether such a model's texts begin with a mark.
    fn byte_level(&self, tokens: &[String]) -> Result<(Value, bool)> {
        let merges = self.required(MERGES, |value| list(value, string))?;
        let pre = self.required(PRE, string)?;
        let level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |regex: &str| {
            let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, level(false)]})
        };
        let nfc = json!({"type": "NFC"});
        let (cut, normalizer, is_llama_3) = match pre.as_str() {
            "gpt-2" => (level(true), Value::Null, false),
            "smollm" | "starcoder" | "refact" | "command-r" => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                (json!({"type": "Sequence", "pretokenizers": [digits, level(true)]}), Value::Null, false)
            }
            "llama-bpe" | "llama3" | "llama-v3" => (split(LLAMA_3), Value::Null, true),
            "qwen2" | "deepseek-r1-qwen" => (split(QWEN_2), nfc, false),
            _ => {
                return self.wrong(
                    PRE,
                    &format!("{pre}, expected gpt-2, smollm, starcoder, refact, command-r, llama-bpe or qwen2"),
                );
            }
        };
        let vocab: Map<String, Value> = tokens.iter().cloned().zip((0u32..).map(Value::from)).collect();
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": is_llama_3, "vocab": vocab, "merges": merges,
        });
        let json = json!({"normalizer": normalizer, "pre_tokenizer": cut, "decoder": level(true), "model": model});
        Ok((json, is_llama_3))
    }

    /// Pieces with scores: of the pairs side by side, the one that makes the piece of the highest score is merged first. Which is what
    /// a list of merges says, one for each way to cut each piece in two.
    fn sentence_piece(&self, tokens: &[String], types: &[u32]) -> Result<Value> {
        let scores = self.required(SCORES, |value| list(value, |value| value.to_f32().ok()))?;
        if scores.len() != tokens.len() {
            let how = format!("a list of {}, expected {}, as there are tokens", scores.len(), tokens.len());
            return self.wrong(SCORES, &how);
        }
        let pieces: HashMap<&str, u32> = tokens
            .iter()
            .zip(0..)
            .filter(|(_, id)| types[*id as usize] == NORMAL)
            .map(|(t, id)| (t.as_str(), id))
            .collect();
        let mut merges: Vec<(u32, u32, u32)> = Vec::new();
        for (&piece, &id) in &pieces {
            for (cut, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(cut);
                if let (Some(&left), Some(&right)) = (pieces.get(left), pieces.get(right)) {
                    merges.push((id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| scores[b.0 as usize].total_cmp(&scores[a.0 as usize]).then(a.cmp(b)));
        let merges: Vec<[&str; 2]> =
            merges.iter().map(|&(_, left, right)| [tokens[left as usize].as_str(), &tokens[right as usize]]).collect();
        let unknown = types.iter().position(|&kind| kind == UNKNOWN).map(|id| tokens[id].as_str());
        let has_prefix =
            self.optional("tokenizer.ggml.add_space_prefix", |value| value.to_bool().ok())?.unwrap_or(true);
        let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let normalizers =
            if has_prefix { json!([{"type": "Prepend", "prepend": "▁"}, spaces]) } else { json!([spaces]) };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if has_prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let vocab: Map<String, Value> = tokens.iter().cloned().zip((0u32..).map(Value::from)).collect();
        Ok(json!({
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        }))
    }
}

fn string(value: &Gguf) -> Option<String> {
    value.to_string().ok().cloned()
}

fn list<T>(value: &Gguf, read: impl Fn(&Gguf) -> Option<T>) -> Option<Vec<T>> {
    value.to_vec().ok()?.iter().map(read).collect()
}
