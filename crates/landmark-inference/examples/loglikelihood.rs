//! How likely a model finds continuations, without a server between: lines of `{"context": [TOKEN, ..], "continuation": [TOKEN, ..]}` on standard input,
//! and for each `[LOGPROB, WHETHER_GREEDY]`. `benches/serve_lm_eval.py` asks it and `landmark serve` the same.
//!
//! usage: loglikelihood MODEL

use anyhow::{Context, bail};
use landmark_inference::{CacheFlags, DeviceFlags, ModelFlags, Opened, Reader};
use serde_json::{Value, json};
use std::io::{BufRead, stdin};

fn main() -> anyhow::Result<()> {
    let checkpoint = std::env::args_os().nth(1).context("usage: loglikelihood MODEL")?.into();
    let opened = Opened::open(&ModelFlags { checkpoint, adapter: None, tokenizer: None, device: DeviceFlags::CPU })?;
    let mut reader = Reader::of_pretrained(opened.model, &opened.pretrained, &CacheFlags::default())?;
    for line in stdin().lock().lines() {
        let line: Value = serde_json::from_str(&line?)?;
        let tokens = |name: &str| -> anyhow::Result<Vec<u32>> { Ok(serde_json::from_value(line[name].clone())?) };
        let (context, continuation) = (tokens("context")?, tokens("continuation")?);
        if context.is_empty() {
            bail!("a context is empty: the first token of a text has no probability");
        }
        reader.clear();
        let all = [&context[..], &continuation].concat();
        let mut logits = Vec::with_capacity(all.len());
        for chunk in all.chunks(reader.chunk()) {
            logits.extend(reader.read_with_logits(chunk)?);
        }
        let (mut sum, mut is_greedy) = (0., true);
        for (logits, &token) in logits.iter().flatten().skip(context.len() - 1).zip(&continuation) {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
            sum += f64::from(logits[token as usize] - largest) - total.ln();
            is_greedy &= logits[token as usize] == largest;
        }
        println!("{}", json!([sum, is_greedy]));
    }
    Ok(())
}
