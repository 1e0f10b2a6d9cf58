//! Training of a byte-level BPE.

use ahash::AHashMap;
use compact_str::CompactString;
use rayon::prelude::*;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, TokenizerBuilder};

use super::words::{Digits, Words};
use super::{END_OF_TEXT_TOKENS, LANDMARK_TOKEN, Tokenizer, byte_level};
use crate::{Error, Result};

/// The bytes, end-of-text and the landmark.
const LEAST_ENTRIES: usize = 256 + 2;
/// The most entries that a token file can say.
const MOST_ENTRIES: usize = 1 << 24;
/// Different words that are counted: with as many the trainer needs less than a gigabyte. Beyond them the rarest are forgotten.
const MAX_WORDS: usize = 1 << 20;
/// Longer words are no words, and would make tokens of no use.
const MAX_WORD: usize = 128;
/// The trainer counts pairs of symbols in 32 bits, and a text has no more of them than bytes.
const MAX_TEXT: usize = i32::MAX as usize;
/// What occurs once is not worth an entry.
const MIN_FREQUENCY: u64 = 2;

/// Trains a byte-level BPE with GPT-2's pattern, on request with each digit a token of its own, on the texts that it is given. The same texts in the same batches give the same
/// tokenizer, whatever the number of threads.
///
/// Ids are the 256 bytes (in the order of their letters), the merges, then end-of-text (`<|endoftext|>`) and `<landmark>`, which
/// are the last two.
#[derive(Debug)]
pub struct BpeTraining {
    entries: usize,
    digits: Digits,
    counts: AHashMap<CompactString, u64>,
    bytes: usize,
}

impl BpeTraining {
    /// A training for a vocabulary of `entries` ids, end-of-text and the landmark included.
    pub fn new(entries: usize) -> Result<Self> {
        if !(LEAST_ENTRIES..=MOST_ENTRIES).contains(&entries) {
            let expected = "at least 258 (the bytes, end-of-text and the landmark) and at most 16777216";
            return Err(Error::Param { name: "train_tokenizer", got: entries.to_string(), expected });
        }
        Ok(Self { entries, digits: Digits::Together, counts: AHashMap::new(), bytes: 0 })
    }

    /// Whether each digit is to be a token of its own, so that all numbers of so many digits have as many tokens.
    pub fn split_digits(self, split: bool) -> Self {
        Self { digits: if split { Digits::Single } else { Digits::Together }, ..self }
    }

    /// Learns from texts, on all cores. `false`: there were enough before, and these were not looked at.
    pub fn add<T: AsRef<str> + Sync>(&mut self, texts: &[T]) -> bool {
        let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
        if self.bytes.saturating_add(bytes) > MAX_TEXT {
            return false;
        }
        self.bytes += bytes;
        let digits = self.digits;
        let counted = texts.par_iter().fold(AHashMap::new, |mut counts: AHashMap<&str, u64>, text| {
            for word in Words::of(text.as_ref(), digits).filter(|word| word.len() <= MAX_WORD) {
                *counts.entry(word).or_default() += 1;
            }
            counts
        });
        for (word, count) in counted.collect::<Vec<_>>().into_iter().flatten() {
            match self.counts.get_mut(word) {
                Some(sum) => *sum += count,
                None => {
                    self.counts.insert(word.into(), count);
                }
            }
        }
        if self.counts.len() > 2 * MAX_WORDS {
            self.forget();
        }
        true
    }

    /// Forgets the rarest words. All of a frequency, so that no order of the map decides.
    fn forget(&mut self) {
        let mut frequencies: Vec<u64> = self.counts.values().copied().collect();
        if frequencies.len() > MAX_WORDS {
            let last = frequencies.len() - MAX_WORDS;
            let least = *frequencies.select_nth_unstable(last - 1).1;
            self.counts.retain(|_, count| *count > least);
        }
    }

    /// The tokenizer. It has fewer entries where the text has too little to merge.
    pub fn finish(mut self) -> Result<Tokenizer> {
        self.forget();
        let failed = |source| Error::Tokenizer { operation: "training", source };
        let trainer = BpeTrainer::builder()
            .vocab_size(self.entries - 2)
            .min_frequency(MIN_FREQUENCY)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let spelled = self.counts.drain().map(|(word, count)| (spelled(&word), count)).collect();
        let mut model = BPE::default();
        trainer.do_train(&spelled, &mut model).map_err(failed)?;
        drop(spelled);
        let words = ByteLevel::new(false, true, true);
        let pattern: PreTokenizerWrapper = match self.digits {
            Digits::Together => words.into(),
            Digits::Single => Sequence::new(vec![digits::Digits::new(true).into(), words.into()]).into(),
        };
        let mut tokenizer: tokenizers::Tokenizer = TokenizerBuilder::default()
            .with_model(model)
            .with_pre_tokenizer(Some(pattern))
            .with_normalizer(None::<tokenizers::NormalizerWrapper>)
            .with_post_processor(Some(ByteLevel::new(true, false, true)))
            .with_decoder(Some(ByteLevel::new(true, true, true)))
            .build()
            .map_err(failed)?
            .into();
        tokenizer
            .add_special_tokens([END_OF_TEXT_TOKENS[0], LANDMARK_TOKEN].map(|token| AddedToken::from(token, true)))
            .map_err(failed)?;
        Tokenizer::from_json(tokenizer.to_string(false).map_err(failed)?.as_bytes())
    }
}

/// A word in the byte-level alphabet.
fn spelled(word: &str) -> CompactString {
    word.bytes().map(byte_level::byte_to_char).collect()
}
