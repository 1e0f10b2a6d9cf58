//! Answers questions about a LLaMA, one JSON object a line: this project's side of `benches/gguf_peer.py` and `benches/llama_hf.py`, which
//! put the same questions to llama.cpp and to transformers.
//!
//! `llama_peer MODEL`, a folder or a GGUF file; of each question the answer is one line:
//!
//! | question | answer |
//! | --- | --- |
//! | `{"encode": TEXT}` | `ids` |
//! | `{"logits": IDS}` | `logits` after the last token |
//! | `{"all_logits": IDS}` | `logits` after each |
//! | `{"greedy": IDS, "tokens": N}` | `ids`, and by how much each was ahead of the second |
//! | `{"perplexity": IDS, "window": N}` | `loss`, the sum over windows read one by one, and `count` |
//! | `{"save": DIR, "landmark": MEM_FREQ, "window": N}` | writes a model with landmarks in f32, as a folder |

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
use landmark_data::{Pretrained, Tokenizer};
use landmark_memory::XlCache;
use landmark_models::llama::{Gguf, LandmarkConfig, Llama};
use serde_json::{Value, json};

fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).context("usage: llama_peer MODEL < questions")?;
    let (model, tokenizer) = if Path::new(&path).is_dir() {
        (Llama::load_frozen(&path, DType::F32, &Device::Cpu)?, Pretrained::from_folder(&path).ok())
    } else {
        let gguf = Gguf::open(&path)?;
        let (json, settings) = gguf.tokenizer()?;
        let tokenizer = Pretrained::from_settings(Tokenizer::from_json(json.as_bytes())?, settings);
        (gguf.load(&Device::Cpu)?, Some(tokenizer))
    };
    let mut model = Some(model);
    for line in std::io::stdin().lock().lines() {
        let question: Value = serde_json::from_str(&line?)?;
        let answer = answer(&mut model, tokenizer.as_ref(), &question)?;
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn answer(model: &mut Option<Llama>, tokenizer: Option<&Pretrained>, question: &Value) -> anyhow::Result<Value> {
    let tokenizer = || tokenizer.context("the model has no tokenizer");
    let number = |name: &'static str| question[name].as_u64().map(|n| n as usize).context(name);
    if let Some(dir) = question["save"].as_str() {
        let (with, mem_id) = tokenizer()?.with_landmark()?;
        let landmarks = LandmarkConfig {
            mem_id,
            mem_freq: number("landmark")?,
            train_context_length: number("window")?,
            include_landmark_in_loss: true,
        };
        let known = tokenizer()?.tokenizer.vocab_size();
        let new = model.take().context("saved once")?.with_landmarks(landmarks, known)?;
        new.save(dir, DType::F32)?;
        with.save(dir)?;
        return Ok(json!({"mem_id": mem_id, "vocab_size": new.config().vocab_size}));
    }
    let model = model.as_ref().context("the model was saved")?;
    if let Some(text) = question["encode"].as_str() {
        return Ok(json!({"ids": tokenizer()?.tokenizer.encode(text)?}));
    }
    let ids = |name: &str| -> anyhow::Result<Option<Vec<u32>>> {
        Ok(question.get(name).map(|ids| serde_json::from_value(ids.clone())).transpose()?)
    };
    let row = |ids: &[u32]| Tensor::new(ids, &Device::Cpu)?.unsqueeze(0);
    let window = |ids: &[u32]| -> anyhow::Result<Tensor> {
        let ids = row(ids)?;
        Ok(model.hidden(&ids, &mut model.window_attention(&ids)?)?)
    };
    let numbers = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
    if let Some(ids) = ids("logits")? {
        let last = window(&ids)?.narrow(1, ids.len() - 1, 1)?;
        return Ok(json!({"logits": numbers(&model.logits(&last)?)?}));
    }
    if let Some(ids) = ids("all_logits")? {
        return Ok(json!({"logits": model.logits(&window(&ids)?)?.get(0)?.to_vec2::<f32>()?}));
    }
    if let Some(ids) = ids("greedy")? {
        let length = number("tokens")?;
        let config = model.config();
        let all = ids.len() + length;
        let mut cache = XlCache::new(config.num_hidden_layers, all, config.rope(all));
        let (mut next, mut drawn, mut ahead) = (ids, Vec::new(), Vec::new());
        for _ in 0..length {
            let hidden = model.hidden(&row(&next)?, &mut cache)?;
            let logits = numbers(&model.logits(&hidden.narrow(1, next.len() - 1, 1)?)?)?;
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.select_nth_unstable_by(1, |&a, &b| logits[b].total_cmp(&logits[a]));
            drawn.push(order[0] as u32);
            ahead.push(logits[order[0]] - logits[order[1]]);
            next = vec![order[0] as u32];
        }
        return Ok(json!({"ids": drawn, "ahead": ahead}));
    }
    if let Some(ids) = ids("perplexity")? {
        let (mut loss, mut count) = (0., 0);
        for ids in ids.chunks(number("window")?).filter(|ids| ids.len() > 1) {
            let hidden = window(&ids[..ids.len() - 1])?;
            let scores = model.token_scores(&hidden, &row(&ids[1..])?)?;
            loss += scores.iter().flatten().map(|score| score.loss).sum::<f64>();
            count += scores.len();
        }
        return Ok(json!({"loss": loss, "count": count}));
    }
    bail!("no question: {question}")
}
