//! Retrieval exercises for training: rows of a batch into which facts and, later, questions about them are planted.
//!
//! Text alone hardly ever asks for a number that stands five blocks back, so a small model learns to retrieve late or never. An
//! exercise asks. Its row is running text of the corpus; somewhere in it statements tell numbers ("The pass key is 48213. Remember
//! it.", "Anna's number is 907."), and later questions in other words ask for them:
//!
//! ```text
//! text  statement  text  statement  text  question answer  text  question answer  text
//! ```
//!
//! What makes a small model learn it, each by its share of the rows ([`ExerciseOptions`] has those that are chosen):
//!
//! - *asked again*: a fact is asked for two to five times, or each of several once, the first time nearly at once, then ever farther
//!   away. A single far question teaches nothing until copying a near one is learnt;
//! - *several facts*, often of one kind, so that only the name tells which is asked for;
//! - filler that repeats itself, which is what attention could be led astray by; a description of the task in front.
//!
//! Digits that are told for the first time cannot be guessed: they have no loss. Those of an answer, and what ends it, weigh more.
//!
//! A row is a pure function of the seed, the number of the batch and the number of the row. The blocks of all rows, exercises or
//! not, are counted from the row's first token ([`Batches::whole_blocks`]), as they are when a text is read.

mod fact;
mod row;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::batches::{Batch, Batches, Blocks, below};
use crate::{Error, Result, Tokenizer};
use fact::Words;

/// Which share of the rows gets an exercise, and what they are like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExerciseOptions {
    /// The share of a batch's rows that have an exercise, above 0 and at most 1.
    pub exercise_rows: f64,
    /// The weight of an answer's tokens in the loss; other tokens weigh 1. Above 0.
    pub answer_weight: f64,
    /// The share of exercises that tell two to five facts, not one.
    pub several_facts: f64,
    /// The share of exercises that ask two to five times, first near, then ever farther away.
    pub asked_again: f64,
}

impl Default for ExerciseOptions {
    fn default() -> Self {
        Self { exercise_rows: 0.5, answer_weight: 5., several_facts: 0.4, asked_again: 0.5 }
    }
}

impl ExerciseOptions {
    /// The number of rows with an exercise in a batch of `batch_size`.
    pub fn rows(&self, batch_size: usize) -> usize {
        (self.exercise_rows * batch_size as f64).round() as usize
    }

    fn check(&self, batch_size: usize) -> Result<()> {
        let wrong = |name, got: f64, expected| Err(Error::Param { name, got: got.to_string(), expected });
        if !(self.exercise_rows > 0. && self.exercise_rows <= 1.) {
            return wrong("exercise_rows", self.exercise_rows, "a share above 0 and at most 1");
        }
        if self.rows(batch_size) == 0 {
            return wrong("exercise_rows", self.exercise_rows, "a share that is at least half a row of a batch");
        }
        if !(self.answer_weight > 0. && self.answer_weight.is_finite()) {
            return wrong("answer_weight", self.answer_weight, "a number above 0");
        }
        for (name, share) in [("several_facts", self.several_facts), ("asked_again", self.asked_again)] {
            if !(0. ..=1.).contains(&share) {
                return wrong(name, share, "a share from 0 to 1");
            }
        }
        Ok(())
    }
}

/// Batches of which the first rows are exercises and the others plain text.
#[derive(Clone, Debug)]
pub struct Exercises {
    plain: Batches,
    blocks: Blocks,
    tokenizer: Tokenizer,
    words: Words,
    options: ExerciseOptions,
}

impl Exercises {
    /// Exercises among the rows of `plain`, which must have [whole blocks](Batches::whole_blocks); `tokenizer` made its tokens.
    pub fn new(plain: Batches, tokenizer: Tokenizer, options: ExerciseOptions) -> Result<Self> {
        options.check(plain.batch_size())?;
        let Some(blocks) = plain.blocks().copied() else {
            let (got, expected) = ("windows that begin anywhere".into(), "windows of whole blocks");
            return Err(Error::Param { name: "exercise_rows", got, expected });
        };
        let words = Words::of(&tokenizer);
        let exercises = Self { plain, blocks, tokenizer, words, options };
        let (tokens, needed) = (exercises.blocks.tokens() + 1, row::longest(&exercises)?);
        if tokens < needed {
            return Err(Error::ShortWindow { got: tokens, expected: needed });
        }
        Ok(exercises)
    }

    /// What the exercises are like.
    pub fn options(&self) -> &ExerciseOptions {
        &self.options
    }

    /// Batch number `index` of the run with this `seed`: a pure function of the two. The first [`Batch::exercises`] rows are exercises.
    pub fn batch(&self, seed: u64, index: u64) -> Result<Batch> {
        let planted = self.options.rows(self.plain.batch_size());
        let rows: Vec<row::Row> =
            (0..planted as u64).into_par_iter().map(|row| self.row(seed, index, row)).collect::<Result<_>>()?;
        let mut batch = self.plain.empty();
        batch.weights = Some(Vec::with_capacity(self.plain.batch_size() * batch.sequence_length));
        for row in &rows {
            self.blocks.lay(&row.ids, Some(&row.weights), &mut batch);
        }
        batch.exercises = planted;
        self.plain.fill(&mut batch, seed, index);
        Ok(batch)
    }

    fn row(&self, seed: u64, index: u64, row: u64) -> Result<row::Row> {
        let mut key = *b"landmark-exercise               ";
        key[17..24].copy_from_slice(&row.to_le_bytes()[..7]);
        key[24..].copy_from_slice(&seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(index);
        row::Row::draw(self, &mut Draw(rng))
    }
}

/// Random choices.
struct Draw(ChaCha8Rng);

impl Draw {
    /// A number below `bound`, which is at least 1.
    fn below(&mut self, bound: usize) -> usize {
        below(&mut self.0, bound as u64) as usize
    }

    /// A number from 0 up to and without 1.
    fn fraction(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn chance(&mut self, probability: f64) -> bool {
        self.fraction() < probability
    }

    fn of(&mut self, choices: &[&'static str]) -> &'static str {
        choices[self.below(choices.len())]
    }

    /// `n` different numbers below `bound`, in any order.
    fn order(&mut self, bound: usize, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..bound).collect();
        for i in 0..n {
            order.swap(i, i + self.below(bound - i));
        }
        order.truncate(n);
        order
    }

    /// `n` numbers below `bound + 1`, ascending.
    fn cuts(&mut self, n: usize, bound: usize) -> Vec<usize> {
        let mut cuts: Vec<usize> = (0..n).map(|_| self.below(bound + 1)).collect();
        cuts.sort_unstable();
        cuts
    }
}

#[cfg(test)]
mod tests;
