//! Answers questions about a LLaMA, one JSON object a line: this project's side of `benches/gguf_peer.py`, `benches/gguf_speed.py` and
//! `benches/llama_hf.py`, which put the same questions to llama.cpp and to transformers.
//!
//! `llama_peer MODEL`, a folder or a GGUF file; of each question the answer is one line:
//!
//! | question | answer |
//! | --- | --- |
//! | `{"encode": TEXT}` | `ids` |
//! | `{"logits": IDS}` | `logits` after the last token |
//! | `{"all_logits": IDS}` | `logits` after each |
//! | `{"greedy": IDS, "tokens": N}` | `ids`, and by how much each was ahead of the second |
//! | `{"speed": IDS, "landmark": MEM_FREQ, "window": N, "top_k": K, "tokens": N}` | reads them through the landmark cache, then goes on token by token: `read`, seconds, and those of each of the `tokens` |
//! | `{"perplexity": IDS, "window": N}` | `loss`, the sum over windows read one by one, and `count` |
//! | `{"save": DIR, "landmark": MEM_FREQ, "window": N}` | writes a model with landmarks in f32, as a folder |

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
use landmark_data::{Pretrained, Tokenizer};
use landmark_memory::{CacheConfig, LandmarkCache, Selection, XlCache};
use landmark_models::llama::{Gguf, LandmarkConfig, Llama};
use serde_json::{Value, json};

/// As in the `landmark` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
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
    if let Some(ids) = question.get("speed") {
        let ids: Vec<u32> = serde_json::from_value(ids.clone())?;
        let (mem_freq, window) = (number("landmark")?, number("window")?);
        return speed(model, &ids, mem_freq, window, number("top_k")?, number("tokens")?);
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

/// How long reading takes, and each token after it: the logits, the likeliest token, and its way through the model. The landmark is put into
/// a model that has none: what a model learnt changes nothing of its speed.
fn speed(
    model: &mut Option<Llama>,
    ids: &[u32],
    mem_freq: usize,
    window: usize,
    top_k: usize,
    tokens: usize,
) -> anyhow::Result<Value> {
    let loaded = model.take().context("the model was saved")?;
    let known = loaded.config().vocab_size;
    let landmarks = loaded.config().landmarks.unwrap_or(LandmarkConfig {
        mem_id: known as u32,
        mem_freq,
        train_context_length: window,
        include_landmark_in_loss: false,
    });
    let model = model.insert(loaded.with_landmarks(landmarks, known)?);
    let config = model.config();
    let cache = CacheConfig {
        layers: config.num_hidden_layers,
        batch: 1,
        kv_heads: config.num_key_value_heads,
        mem_freq,
        landmark_id: landmarks.mem_id,
        top_k,
        selection: Selection::PerTokenAndHead,
        max_blocks: None,
        window,
        context_miss: None,
    };
    let mut cache = LandmarkCache::new(cache, config.rope(window), DType::F32, &Device::Cpu)?;
    cache.reserve((ids.len() + tokens) / mem_freq + 1)?;
    let chunk = cache.max_chunk() / (mem_freq + 1) * mem_freq;
    let mut last = None;
    let mut read = |ids: &[u32]| -> anyhow::Result<Tensor> {
        let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        let hidden = cache.forward(&ids, |ids, attention| Ok(model.hidden(ids, attention)?))?;
        Ok(hidden.narrow(1, hidden.dim(1)? - 1, 1)?.force_contiguous()?)
    };
    let begin = Instant::now();
    for ids in ids.chunks(chunk) {
        last = Some(read(ids)?);
    }
    let reading = begin.elapsed().as_secs_f64();
    let mut seconds = Vec::with_capacity(tokens);
    for _ in 0..tokens {
        let begin = Instant::now();
        let hidden = last.context("no ids")?;
        let logits = model.logits(&hidden)?.flatten_all()?.to_vec1::<f32>()?;
        let best = (0..known).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).context("no logits")?;
        last = Some(read(&[best as u32])?);
        seconds.push(begin.elapsed().as_secs_f64());
    }
    Ok(json!({"read": reading, "tokens": seconds}))
}
