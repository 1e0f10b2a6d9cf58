//! The text of an evaluation: which tokens, and which sequences of them.

use super::flags::{Split, TextFlags};
use crate::kept;
use crate::text_pieces::TextPieces;
use anyhow::{Context, bail};
use landmark_data::{DataFolder, Tokenizer, Tokens};
use landmark_models::Model;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::{Component, Path};

/// The end of a document in GPT-2's vocabulary, of which the reference's raw files are.
const GPT2_END_OF_TEXT: u32 = 50256;

/// Tokens to evaluate on.
pub struct Text {
    /// What it is called in results.
    pub name: String,
    /// The part of the data set, if it is of one.
    pub split: Option<Split>,
    tokens: Tokens,
    /// What made the tokens, where that is known.
    tokenizer: Option<Tokenizer>,
    end_of_text: Option<u32>,
}

impl Text {
    /// Opens a prepared data set.
    pub fn prepared(flags: &TextFlags, dataset: &str) -> anyhow::Result<Self> {
        let mut parts = Path::new(dataset).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            bail!("--dataset {dataset}: expected the name of a folder in --data_dir");
        }
        // The folder may hold several corpora by name, or be the corpus.
        let named = flags.data_dir.join(dataset);
        let folder = if named.is_dir() { named } else { flags.data_dir.clone() };
        let unusable = || format!("--dataset {dataset}: no usable data in {}", folder.display());
        let DataFolder { train, validation, test, tokenizer } = DataFolder::open(&folder).with_context(unusable)?;
        let file = match flags.split {
            Split::Train => train,
            Split::Validation => validation,
            Split::Test => test.with_context(|| {
                format!(
                    "--split test: {} has no test data (landmark prepare makes them of layouts with a test part)",
                    folder.display()
                )
            })?,
        };
        file.verify().with_context(unusable)?;
        let end_of_text = match (file.info(), &tokenizer) {
            (Some(info), _) => info.end_of_text,
            (None, Some(tokenizer)) => tokenizer.end_of_text(),
            (None, None) => Some(GPT2_END_OF_TEXT),
        };
        Ok(Self { name: dataset.into(), split: Some(flags.split), tokens: file.into(), tokenizer, end_of_text })
    }

    /// Reads a plain text.
    pub fn plain(path: &Path, tokenizer: Tokenizer) -> anyhow::Result<Self> {
        let mut pieces = TextPieces::open(path)?;
        let mut tokens = Vec::new();
        while let Some(piece) = pieces.next()? {
            tokens.extend(tokenizer.encode(&piece)?);
        }
        let end_of_text = tokenizer.end_of_text();
        let name = path.display().to_string();
        if tokens.len() < 2 {
            bail!("--file {name}: {} tokens, expected at least 2", tokens.len());
        }
        Ok(Self { name, split: None, tokens: tokens.into(), tokenizer: Some(tokenizer), end_of_text })
    }

    /// Tokens that have a target: the last one has none.
    pub fn targets(&self) -> usize {
        usize::try_from(self.tokens.len()).unwrap_or(usize::MAX).saturating_sub(1)
    }

    /// Refuses tokens that are not of the model's vocabulary.
    pub fn check_model(&self, model: &Model, tokenizer: Option<&Tokenizer>) -> anyhow::Result<()> {
        if let (Some(ours), Some(models)) = (&self.tokenizer, tokenizer)
            && !models.encodes_as(ours.fingerprint())
        {
            bail!(
                "{}: its tokens are of another tokenizer ({}) than the model's ({})",
                self.name,
                ours.fingerprint(),
                models.fingerprint()
            );
        }
        let vocab_size = model.outline().vocab_size;
        if let Some(own) = self.tokenizer.as_ref().map(Tokenizer::vocab_size).filter(|&own| own > vocab_size) {
            bail!("{}: its tokenizer has {own} tokens and the model {vocab_size}: it is another model's", self.name);
        }
        Ok(())
    }

    /// The sequences of `length` tokens, without overlap, of which a rest that fills none is left out, as the authors do; or a sample
    /// of them. A sample is drawn in passages of `passage` tokens, each cut into sequences: whatever the length, it is of the
    /// same text.
    pub fn sequences(
        &self,
        length: usize,
        passage: usize,
        sample: Option<usize>,
        seed: u64,
    ) -> anyhow::Result<Sequences<'_>> {
        let available = self.targets() / length;
        let name = &self.name;
        if available == 0 {
            bail!(
                "--eval_seq_length {length}: {name}{} has {} tokens, enough for sequences of at most {}",
                self.split.map_or(String::new(), |split| format!(" ({})", split.name())),
                self.tokens.len(),
                self.targets()
            );
        }
        let starts = match sample {
            None => (0..available).map(|number| number * length).collect(),
            Some(sample) if sample < length => {
                bail!("--eval_sample_size {sample}: less than one sequence of --eval_seq_length {length}")
            }
            Some(sample) => {
                // Passages that are too long for the text or the sample are no longer than a sequence.
                let passage = if passage > self.targets().min(sample) { length } else { passage.max(length) };
                let mut passages: Vec<usize> = (0..self.targets() / passage).map(|number| number * passage).collect();
                draw(&mut passages, sample / passage, seed);
                let cut = |start| (0..passage / length).map(move |number| start + number * length);
                passages.into_iter().flat_map(cut).collect()
            }
        };
        Ok(Sequences { text: self, length, starts })
    }
}

/// Leaves `wanted` of the numbers, drawn without replacement, in order; all of them if there are no more.
fn draw(numbers: &mut Vec<usize>, wanted: usize, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let wanted = wanted.min(numbers.len());
    for i in 0..wanted {
        // The bias of the multiplication is below 2^-32 for any number of sequences that there is.
        let below = (rng.next_u64() as u128 * (numbers.len() - i) as u128) >> 64;
        numbers.swap(i, i + below as usize);
    }
    numbers.truncate(wanted);
    numbers.sort_unstable();
}

/// Sequences of equal length.
pub struct Sequences<'t> {
    text: &'t Text,
    /// Tokens of each.
    pub length: usize,
    starts: Vec<usize>,
}

impl Sequences<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// The tokens of a sequence, and one more, the target of its last.
    pub fn read(&self, index: usize) -> anyhow::Result<Vec<u32>> {
        let start = self.starts[index] as u64;
        let tokens: Option<Vec<u32>> = (start..=start + self.length as u64).map(|i| self.text.tokens.get(i)).collect();
        tokens.context("a sequence beyond the end of the text")
    }

    /// The id after which there is no loss.
    pub fn end_of_text(&self) -> Option<u32> {
        self.text.end_of_text
    }

    /// SHA-256 of all the tokens, their sequences told apart by the length alone.
    pub fn fingerprint(&self) -> anyhow::Result<String> {
        kept::hash_of_tokens((0..self.len()).map(|index| self.read(index)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(tokens: u32) -> Text {
        let tokens = Tokens::Memory((0..tokens).collect());
        Text { name: "text".into(), split: None, tokens, tokenizer: None, end_of_text: None }
    }

    #[test]
    fn sequences_cover_the_text_once() {
        let text = text(101);
        let sequences = text.sequences(25, 25, None, 0).unwrap();
        assert_eq!(sequences.len(), 4);
        assert_eq!(sequences.read(3).unwrap(), (75..=100).collect::<Vec<u32>>());
        // The whole text is one sequence, the last token being a target only.
        assert_eq!(text.sequences(100, 100, None, 0).unwrap().len(), 1);
        let error = text.sequences(101, 101, None, 0).err().unwrap().to_string();
        assert_eq!(error, "--eval_seq_length 101: text has 101 tokens, enough for sequences of at most 100");
    }

    #[test]
    fn a_sample_is_of_different_sequences_and_its_seed_decides() {
        let text = text(1001);
        let starts = |sample, seed| text.sequences(10, 10, sample, seed).unwrap().starts;
        let sample = starts(Some(309), 1);
        assert_eq!(sample.len(), 30);
        assert!(sample.windows(2).all(|pair| pair[0] < pair[1]) && sample[29] <= 990);
        assert!(sample.iter().all(|start| start % 10 == 0));
        assert_eq!(sample, starts(Some(309), 1));
        assert_ne!(sample, starts(Some(309), 2));
        assert_eq!(starts(Some(5000), 1), starts(None, 1));
        assert!(text.sequences(10, 10, Some(9), 1).is_err());
    }

    #[test]
    fn samples_of_the_same_passages_are_of_the_same_text() {
        let text = text(1001);
        let tokens = |length, passage, sample| -> Vec<u32> {
            let sequences = text.sequences(length, passage, Some(sample), 1).unwrap();
            (0..sequences.len()).flat_map(|i| sequences.read(i).unwrap()[..length].to_vec()).collect()
        };
        let long = tokens(100, 100, 300);
        assert_eq!(long.len(), 300);
        assert_eq!(tokens(50, 100, 300), long);
        // A rest that fills no sequence is left out of each passage.
        assert_eq!(tokens(30, 100, 300).len(), 270);
        // Passages that do not fit are as long as the sequences.
        assert_eq!(tokens(50, 400, 300), tokens(50, 50, 300));
    }

    #[test]
    fn fingerprints_tell_texts_and_samples_apart() {
        let of = |tokens, sample| text(tokens).sequences(10, 10, sample, 1).unwrap().fingerprint().unwrap();
        assert_eq!(of(101, None), of(102, None));
        assert_ne!(of(101, None), of(111, None));
        assert_ne!(of(101, None), of(101, Some(50)));
    }
}
