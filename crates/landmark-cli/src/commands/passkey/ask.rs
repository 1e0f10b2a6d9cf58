//! Prompts of equal length, read side by side and answered.

use candle_core::{DType, Tensor};
use landmark_data::Tokenizer;
use landmark_inference::{Memory, Sampler, drawable};
use landmark_models::Model;
use std::time::{Duration, Instant};

/// Tokens of an answer: a number of five digits, with a space, in tokens as short as bytes, and what shows that it has ended.
pub const ANSWER: usize = 8;

/// The answers to prompts, which are read `chunk` tokens at a time, and how long they were read. `progress` is told how many tokens
/// are read and says whether to go on; nothing comes back if it does not.
pub fn answers(
    model: &Model,
    tokenizer: &Tokenizer,
    memory: &mut Memory,
    chunk: usize,
    prompts: &[&[u32]],
    mut progress: impl FnMut(usize) -> bool,
) -> anyhow::Result<Option<(Vec<String>, Duration)>> {
    let length = prompts[0].len();
    let mut read = |part: &[&[u32]]| -> anyhow::Result<Tensor> {
        let hidden = memory.forward(model, part)?;
        // A copy: a part would keep the whole chunk in memory.
        Ok(hidden.narrow(1, part[0].len() - 1, 1)?.force_contiguous()?)
    };
    let begun = Instant::now();
    let mut last = None;
    for from in (0..length).step_by(chunk) {
        let to = length.min(from + chunk);
        let part: Vec<&[u32]> = prompts.iter().map(|prompt| &prompt[from..to]).collect();
        last = Some(read(&part)?);
        if !progress(prompts.len() * to) {
            return Ok(None);
        }
    }
    let mut logits = logits(model, last.as_ref())?;
    let time = begun.elapsed();

    let (allowed, mut sampler) = (drawable(model, tokenizer), Sampler::greedy());
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut has_ended = vec![false; prompts.len()];
    for left in (0..ANSWER).rev() {
        let mut next = Vec::with_capacity(prompts.len());
        for ((logits, answer), has_ended) in logits.iter().zip(&mut answers).zip(&mut has_ended) {
            let token = sampler.sample(logits, &allowed)?;
            *has_ended |= Some(token) == tokenizer.end_of_text();
            if !*has_ended {
                answer.push(token);
            }
            next.push([token]);
        }
        if left == 0 || has_ended.iter().all(|ended| *ended) {
            break;
        }
        let next: Vec<&[u32]> = next.iter().map(|token| &token[..]).collect();
        logits = self::logits(model, Some(&read(&next)?))?;
    }
    let texts = answers.iter().map(|answer| tokenizer.decode(answer)).collect::<Result<_, _>>()?;
    Ok(Some((texts, time)))
}

/// The logits of each row's last token.
fn logits(model: &Model, last: Option<&Tensor>) -> anyhow::Result<Vec<Vec<f32>>> {
    let Some(last) = last else { return Ok(Vec::new()) };
    Ok(model.logits(last)?.squeeze(1)?.to_dtype(DType::F32)?.to_vec2()?)
}
