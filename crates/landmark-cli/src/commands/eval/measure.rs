//! The evaluation itself: every sequence read chunk by chunk, every target scored.

use super::text::Sequences;
use candle_core::{Device, Tensor};
use landmark_inference::{Memory, Reading, Setting};
use landmark_memory::LandmarkCache;
use landmark_models::{Attention, IGNORE, Model};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// What came out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// How the sequences were read.
    pub setting: Setting,
    /// Sequences.
    pub sequences: usize,
    /// Targets that were scored.
    pub tokens: usize,
    /// Their mean cross entropy, in nats.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Share of targets that had the largest logit.
    pub accuracy: f64,
    /// The same for each part of the sequences.
    pub by_position: Vec<PositionBin>,
    /// How far the blocks were that were read.
    pub retrieved_by_distance: Vec<DistanceBin>,
    /// Share of retrievals that the context-miss token saved; with such a token only.
    pub skipped_retrievals: Option<f64>,
    /// Time of reading and scoring.
    pub seconds: f64,
    /// Tokens read a second: over all, over the first and over the last tenth of them.
    pub tok_per_s: f64,
    /// See above.
    pub tok_per_s_first_tenth: f64,
    /// See above.
    pub tok_per_s_last_tenth: f64,
    /// Bytes set aside for blocks, at most.
    pub cache_bytes: usize,
}

/// Targets of positions `from..to` of the sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PositionBin {
    /// The first position.
    pub from: usize,
    /// One past the last.
    pub to: usize,
    /// Targets.
    pub tokens: usize,
    /// Mean loss; `None` without targets.
    pub loss: Option<f64>,
    /// Its exponential.
    pub perplexity: Option<f64>,
    /// Share of targets that had the largest logit.
    pub accuracy: Option<f64>,
}

/// Blocks that were read at distances `from..=to`, in blocks: 1 is the block before the token's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistanceBin {
    /// The nearest.
    pub from: usize,
    /// The farthest.
    pub to: usize,
    /// Share of all blocks that were read.
    pub share: f64,
}

/// Sums over targets.
#[derive(Clone, Copy, Default)]
struct Sum {
    tokens: usize,
    loss: f64,
    correct: usize,
}

impl Sum {
    fn mean(self, value: f64) -> Option<f64> {
        (self.tokens > 0).then(|| value / self.tokens as f64)
    }
}

/// Evaluates, `batch_size` sequences at a time. `progress` is told how many tokens are read and says whether to go on; `None` if it does
/// not.
pub fn evaluate(
    model: &Model,
    reading: &Reading,
    sequences: &Sequences,
    batch_size: usize,
    bins: usize,
    mut progress: impl FnMut(usize) -> bool,
) -> anyhow::Result<Option<Measured>> {
    let Setting { mid_length: chunk, .. } = reading.setting;
    let length = sequences.length;
    let alone = reading.setting.lm_cache == "none";
    // No more bins than positions.
    let bins = bins.clamp(1, length);
    let mut sums = vec![Sum::default(); bins];
    let mut pace = Pace::new(sequences.len() * length);
    let mut retrieved = Retrieved::default();
    let mut memory: Option<(Memory, usize)> = None;
    let outline = model.outline();
    let has_miss_token = outline.has_miss_token;
    let landmark = outline.landmark_id.filter(|_| outline.attention != Attention::Dense);
    for first in (0..sequences.len()).step_by(batch_size) {
        let rows: Vec<Vec<u32>> =
            (first..sequences.len().min(first + batch_size)).map(|i| sequences.read(i)).collect::<Result<_, _>>()?;
        if rows.iter().flatten().any(|&token| Some(token) == landmark) {
            anyhow::bail!("the text has landmarks already: evaluate on one without, reading puts them in");
        }
        let (mut here, texts) = match memory.take() {
            Some((memory, texts)) if texts == rows.len() => (memory, texts),
            // The first batch, or the last one, which may be smaller.
            _ => (Memory::new(&reading.flags, model, reading.tokenizer.as_ref(), rows.len())?.0, rows.len()),
        };
        here.clear();
        here.caches_mut().for_each(LandmarkCache::trace_distances);
        for from in (0..length).step_by(chunk) {
            let to = length.min(from + chunk);
            if alone {
                here.clear();
            }
            let inputs: Vec<&[u32]> = rows.iter().map(|row| &row[from..to]).collect();
            let hidden = here.forward(model, &inputs)?;
            let target = |row: &[u32], i: usize| match Some(row[i]) == sequences.end_of_text() {
                true => IGNORE,
                false => row[i + 1],
            };
            let targets: Vec<u32> = rows.iter().flat_map(|row| (from..to).map(|i| target(row, i))).collect();
            let targets = Tensor::from_vec(targets, (rows.len(), to - from), &Device::Cpu)?;
            // Scores of a few positions at a time: the logits are never all in memory.
            let scores = model.token_scores(&hidden, &targets)?;
            for (i, score) in scores.into_iter().enumerate() {
                if let Some(score) = score {
                    let sum = &mut sums[(from + i % (to - from)) * bins / length];
                    sum.tokens += 1;
                    sum.loss += score.loss;
                    sum.correct += usize::from(score.correct);
                }
            }
            pace.add(rows.len() * (to - from));
            if !progress(pace.tokens) {
                return Ok(None);
            }
        }
        retrieved.add(&here);
        memory = Some((here, texts));
    }
    let all = sums.iter().fold(Sum::default(), |a, b| Sum {
        tokens: a.tokens + b.tokens,
        loss: a.loss + b.loss,
        correct: a.correct + b.correct,
    });
    let Some(loss) = all.mean(all.loss) else { anyhow::bail!("the text has no token with a target") };
    let edge = |i: usize| (i * length).div_ceil(bins);
    let by_position = sums.iter().enumerate().map(|(i, sum)| PositionBin {
        from: edge(i),
        to: edge(i + 1),
        tokens: sum.tokens,
        loss: sum.mean(sum.loss),
        perplexity: sum.mean(sum.loss).map(f64::exp),
        accuracy: sum.mean(sum.correct as f64),
    });
    Ok(Some(Measured {
        setting: reading.setting.clone(),
        sequences: sequences.len(),
        tokens: all.tokens,
        loss,
        perplexity: loss.exp(),
        accuracy: all.correct as f64 / all.tokens as f64,
        by_position: by_position.collect(),
        retrieved_by_distance: by_distance(&retrieved.distances),
        skipped_retrievals: (has_miss_token && retrieved.done + retrieved.skipped > 0)
            .then(|| retrieved.skipped as f64 / (retrieved.done + retrieved.skipped) as f64),
        seconds: pace.seconds(),
        tok_per_s: pace.rate(0., 1.),
        tok_per_s_first_tenth: pace.rate(0., 0.1),
        tok_per_s_last_tenth: pace.rate(0.9, 1.),
        cache_bytes: retrieved.bytes,
    }))
}

/// What the caches tell about retrieval.
#[derive(Default)]
struct Retrieved {
    distances: Vec<u64>,
    bytes: usize,
    done: usize,
    skipped: usize,
}

impl Retrieved {
    /// Adds what the caches have counted in their sequences, which are read.
    fn add(&mut self, memory: &Memory) {
        self.bytes = self.bytes.max(memory.caches().map(LandmarkCache::bytes).sum());
        for cache in memory.caches() {
            let counts = cache.distances();
            self.distances.resize(self.distances.len().max(counts.len()), 0);
            self.distances.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            self.done += cache.retrievals().done;
            self.skipped += cache.retrievals().skipped;
        }
    }
}

/// Bins that double: 1, 2-3, 4-7 and so on.
fn by_distance(counts: &[u64]) -> Vec<DistanceBin> {
    let all = counts.iter().sum::<u64>() as f64;
    let mut bins = Vec::new();
    let mut from = 1;
    while from < counts.len() {
        let to = (2 * from - 1).min(counts.len() - 1);
        let sum: u64 = counts[from..=to].iter().sum();
        bins.push(DistanceBin { from, to, share: sum as f64 / all });
        from *= 2;
    }
    bins
}

/// How fast the tokens went by.
struct Pace {
    begun: Instant,
    total: usize,
    tokens: usize,
    /// Tokens read, and when.
    steps: Vec<(usize, Duration)>,
}

impl Pace {
    fn new(total: usize) -> Self {
        Self { begun: Instant::now(), total, tokens: 0, steps: vec![(0, Duration::ZERO)] }
    }

    fn add(&mut self, tokens: usize) {
        self.tokens += tokens;
        self.steps.push((self.tokens, self.begun.elapsed()));
    }

    fn seconds(&self) -> f64 {
        self.steps.last().map_or(0., |(_, time)| time.as_secs_f64())
    }

    /// Tokens a second between two shares of all tokens, widened to whole steps.
    fn rate(&self, from: f64, to: f64) -> f64 {
        let at = |share: f64| share * self.total as f64;
        let begin = self.steps.iter().rev().find(|(tokens, _)| *tokens as f64 <= at(from));
        let end = self.steps.iter().find(|(tokens, _)| *tokens as f64 >= at(to)).or(self.steps.last());
        let (Some((first, begin)), Some((last, end))) = (begin, end) else { return 0. };
        (last - first) as f64 / (*end - *begin).as_secs_f64().max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_go_into_doubling_bins() {
        let bins = by_distance(&[0, 4, 2, 0, 1, 1]);
        let expected = [(1, 1, 0.5), (2, 3, 0.25), (4, 5, 0.25)];
        assert_eq!(bins.iter().map(|bin| (bin.from, bin.to, bin.share)).collect::<Vec<_>>(), expected);
        assert!(by_distance(&[]).is_empty());
    }

    #[test]
    fn the_pace_of_a_tenth_is_that_of_its_steps() {
        let second = Duration::from_secs;
        // Ten tokens in a second, but for the last two steps, of five seconds each.
        let mut steps: Vec<(usize, Duration)> = (0..=8).map(|i| (i * 10, second(i as u64))).collect();
        steps.extend([(90, second(13)), (100, second(18))]);
        let pace = Pace { begun: Instant::now(), total: 100, tokens: 100, steps };
        assert_eq!((pace.rate(0., 0.1), pace.rate(0.9, 1.)), (10., 2.));
        assert_eq!(pace.seconds(), 18.);
    }
}
