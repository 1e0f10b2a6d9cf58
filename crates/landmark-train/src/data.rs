//! What a run is trained on: prepared tokens, their vocabulary, and the batches drawn from them.

use crate::error::{Error, Result};
use crate::gpt::border;
use crate::model::{Recipe, Rows};
use crate::settings::Settings;
use landmark_data::{Batch, Batches, BorderRule, DataFolder, Exercises, Landmarks, Stream, Tokenizer, Tokens};
use landmark_models::gpt::Placement;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The reference's vocabulary: GPT-2's 50257 tokens, a landmark, and rows up to a multiple of 64.
const GPT2: Vocabulary = Vocabulary { size: 50304, landmark_id: 50260, end_of_text: Some(50256) };
/// The ids that GPT-2's tokenizer uses.
const GPT2_TOKENS: usize = 50257;

/// Tokens to train on and to evaluate on.
pub struct Corpus {
    /// To train on.
    pub train: Tokens,
    /// To evaluate on; may be empty.
    pub validation: Tokens,
    /// What made them. The reference's raw files may lack it; they are GPT-2's then.
    pub tokenizer: Option<Tokenizer>,
}

/// The numbers of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// Rows of the embedding.
    pub size: usize,
    /// The id of the landmark token.
    pub landmark_id: u32,
    /// The id that ends a document.
    pub end_of_text: Option<u32>,
}

/// The batches of a run.
pub struct Data {
    /// To train on.
    pub train: Batches,
    /// The same with exercises among the rows, if the run has some.
    pub exercises: Option<Exercises>,
    /// To evaluate on.
    pub validation: Option<Batches>,
    /// What made the tokens, to be kept with the model.
    pub tokenizer: Option<Tokenizer>,
}

/// What tells one corpus from another, kept in checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub train_tokens: u64,
    pub validation_tokens: u64,
    pub tokenizer: Option<String>,
}

impl Corpus {
    /// Opens a folder of prepared data and checks all of it. `tokenizer` stands in where the folder lacks one.
    pub fn open(folder: &Path, tokenizer: Option<Tokenizer>) -> Result<Self> {
        let DataFolder { train, validation, tokenizer: own, .. } = DataFolder::open(folder)?;
        train.verify()?;
        validation.verify()?;
        let tokenizer = match (own, tokenizer) {
            (Some(own), Some(given)) if !given.encodes_as(own.fingerprint()) => {
                let message = format!("{} was made with another tokenizer, which lies in it", folder.display());
                return Err(Error::setting("tokenizer", message));
            }
            (own, given) => own.or(given),
        };
        Ok(Self { train: train.into(), validation: validation.into(), tokenizer })
    }

    /// The vocabulary of a model for this corpus, of `size` rows if that is given.
    pub fn vocabulary(&self, size: Option<usize>) -> Result<Vocabulary> {
        let natural = match &self.tokenizer {
            None => GPT2,
            Some(tokenizer) => match tokenizer.landmark_id() {
                Some(id) => {
                    Vocabulary { size: tokenizer.vocab_size(), landmark_id: id, end_of_text: tokenizer.end_of_text() }
                }
                None if tokenizer.vocab_size() == GPT2_TOKENS => GPT2,
                // A tokenizer that knows no landmark: the first id that it does not use is the landmark's.
                None => Vocabulary {
                    size: tokenizer.vocab_size() + 1,
                    landmark_id: tokenizer.vocab_size() as u32,
                    end_of_text: tokenizer.end_of_text(),
                },
            },
        };
        let Some(size) = size else { return Ok(natural) };
        let tokens = self.tokenizer.as_ref().map_or(GPT2_TOKENS, Tokenizer::vocab_size);
        let needed = tokens.max(natural.landmark_id as usize + 1);
        if size < needed {
            let message = format!("{size} is too small for this data, whose ids and landmark need {needed}");
            return Err(Error::setting("vocab_size", message));
        }
        Ok(Vocabulary { size, ..natural })
    }

    /// The batches of this corpus for a run whose model has this corpus's [`Corpus::vocabulary`].
    pub fn batches<C: Recipe>(self, settings: &Settings<C>) -> Result<Data> {
        let Rows { length, flag, mem_freq, landmark_id, vocab_size, border, texts_apart } = C::rows(settings);
        let end_of_text = self.vocabulary(vocab_size)?.end_of_text.filter(|_| texts_apart);
        let rule = match (border, mem_freq, &self.tokenizer) {
            (None, ..) | (_, None, _) => None,
            (Some(border), Some(mem_freq), Some(tokenizer)) => {
                Some(BorderRule::new(border, tokenizer, narrow(mem_freq)?)?)
            }
            (_, Some(_), None) => {
                let message =
                    "borders are found in text, and the data have no tokenizer.json: name it with --tokenizer";
                return Err(Error::setting("landmarks", message));
            }
        };
        let batches = |name: &str, tokens: Tokens, batch_size: usize| -> Result<Batches> {
            let landmarks = landmarks(name, &tokens, landmark_id, mem_freq, rule.clone())?;
            let stream = Stream::new(tokens, landmarks)?;
            let batches = Batches::new(stream, batch_size, length, end_of_text);
            let whole = |batches: Batches| if settings.whole_blocks { batches.whole_blocks() } else { Ok(batches) };
            batches.and_then(whole).map_err(|error| match error {
                error @ landmark_data::Error::TooShort { .. } => {
                    Error::setting(flag, format!("{length} is too long for the {name} data: {error}"))
                }
                other => named(other),
            })
        };
        let validation = match self.validation.is_empty() {
            true => None,
            false => {
                let batch_size = settings.eval_batch_size.unwrap_or(settings.batch_size);
                Some(batches("validation", self.validation, batch_size)?)
            }
        };
        let train = batches("training", self.train, settings.batch_size)?;
        let exercises = match (settings.exercises, &self.tokenizer) {
            (None, _) => None,
            (Some(options), Some(tokenizer)) => {
                Some(Exercises::new(train.clone(), tokenizer.clone(), options).map_err(named)?)
            }
            (Some(_), None) => {
                let message = "exercises are text, and the data have no tokenizer.json: name it with --tokenizer";
                return Err(Error::setting("exercise_rows", message));
            }
        };
        Ok(Data { train, exercises, validation, tokenizer: self.tokenizer })
    }
}

/// The borders that the landmarks of a model with this configuration are put at, with at most `mem_freq` tokens in a block; `None` if they are
/// at regular places.
pub fn border_rule(landmarks: Placement, tokenizer: &Tokenizer, mem_freq: usize) -> Result<Option<BorderRule>> {
    border(landmarks).map(|border| Ok(BorderRule::new(border, tokenizer, narrow(mem_freq)?)?)).transpose()
}

fn narrow(mem_freq: usize) -> Result<u32> {
    u32::try_from(mem_freq).map_err(|_| Error::setting("mem_freq", "does not fit 32 bits"))
}

/// Where landmarks come from: the reference's own training files have them already.
fn landmarks(
    name: &str,
    tokens: &Tokens,
    id: u32,
    mem_freq: Option<usize>,
    rule: Option<BorderRule>,
) -> Result<Landmarks> {
    // No other block of theirs is longer than this.
    const FIRST: u64 = 1 << 16;
    let first = (0..FIRST.min(tokens.len())).position(|index| tokens.get(index) == Some(id));
    match (first, rule, mem_freq) {
        (None, Some(rule), _) => Ok(Landmarks::AtBorders { id, rule }),
        (None, None, None) => Ok(Landmarks::None),
        (None, None, Some(mem_freq)) => Ok(Landmarks::Insert { id, mem_freq: narrow(mem_freq)? }),
        (Some(first), None, Some(mem_freq)) if first == mem_freq => Ok(Landmarks::Present { id }),
        (Some(first), rule, _) => Err(Error::setting(
            if rule.is_some() { "landmarks" } else { "mem_freq" },
            format!("the {name} data has landmarks already, the first after {first} tokens"),
        )),
    }
}

/// An error about a parameter, by the name of its flag.
fn named(error: landmark_data::Error) -> Error {
    match error {
        landmark_data::Error::Param { name, got, expected } => {
            Error::setting(name, format!("{got}, expected {expected}"))
        }
        error @ landmark_data::Error::ShortWindow { .. } => Error::setting("sequence_length", error),
        other => other.into(),
    }
}

impl Data {
    /// Batch number `index` to train on: a pure function of it and the seed.
    pub fn batch(&self, seed: u64, index: u64) -> Result<Batch> {
        match &self.exercises {
            Some(exercises) => Ok(exercises.batch(seed, index)?),
            None => Ok(self.train.batch(seed, index)),
        }
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity {
            train_tokens: self.train.stream().len(),
            validation_tokens: self.validation.as_ref().map_or(0, |batches| batches.stream().len()),
            tokenizer: self.tokenizer.as_ref().map(|tokenizer| tokenizer.fingerprint().to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmark_models::gpt::GptConfig;

    fn corpus(train: Vec<u32>, tokenizer: Option<Tokenizer>) -> Corpus {
        Corpus { train: train.into(), validation: Tokens::Memory(Vec::new()), tokenizer }
    }

    #[test]
    fn vocabularies_come_from_the_tokenizer() {
        assert_eq!(corpus(vec![], None).vocabulary(None).unwrap(), GPT2);
        let bytes = || corpus(vec![], Some(Tokenizer::bytes()));
        let expected = Vocabulary { size: 258, landmark_id: 257, end_of_text: Some(256) };
        assert_eq!(bytes().vocabulary(None).unwrap(), expected);
        assert_eq!(bytes().vocabulary(Some(320)).unwrap(), Vocabulary { size: 320, ..expected });
        let error = bytes().vocabulary(Some(257)).unwrap_err().to_string();
        assert!(error.starts_with("--vocab_size: 257 is too small") && error.ends_with("258"), "{error}");
        assert!(corpus(vec![], None).vocabulary(Some(50260)).is_err());
    }

    fn batches_of(corpus: Corpus, mem_freq: Option<usize>, landmarks: Placement) -> Result<Data> {
        let sizes = GptConfig { vocab_size: 258, landmark_id: 257, sequence_length: 8, ..GptConfig::default() };
        let model = GptConfig { mem_freq, landmarks, ..sizes };
        corpus.batches(&Settings { batch_size: 1, ..Settings::of(model) })
    }

    #[test]
    fn landmarks_that_are_there_are_not_inserted_again() {
        let tokens: Vec<u32> = (0..50).map(|i| if i % 5 == 4 { 257 } else { 7 }).collect();
        let batches = |tokens: &[u32], mem_freq| {
            batches_of(corpus(tokens.to_vec(), Some(Tokenizer::bytes())), mem_freq, Placement::Regular)
        };
        let landmarks =
            |tokens: &[u32], mem_freq| batches(tokens, mem_freq).unwrap().train.stream().landmarks().clone();
        assert_eq!(landmarks(&tokens, Some(4)), Landmarks::Present { id: 257 });
        assert_eq!(landmarks(&[7; 50], None), Landmarks::None);
        assert_eq!(landmarks(&[7; 50], Some(4)), Landmarks::Insert { id: 257, mem_freq: 4 });
        assert!(batches(&tokens, Some(5)).is_err_and(|error| error.to_string().contains("--mem_freq")));
        assert!(batches(&tokens, None).is_err());
        let short = batches(&[7; 5], None).err().unwrap().to_string();
        assert!(short.starts_with("--sequence_length: 8 is too long for the training data"), "{short}");
    }

    #[test]
    fn landmarks_at_borders_need_the_text() {
        let text = "A line.\nAnother one.\n".repeat(9);
        let tokens = Tokenizer::bytes().encode(&text).unwrap();
        let data = batches_of(corpus(tokens.clone(), Some(Tokenizer::bytes())), Some(20), Placement::Line).unwrap();
        let stream = data.train.stream();
        assert_eq!(stream.len(), text.len() as u64 + 18);
        assert_eq!((stream.get(8), stream.get(22)), (Some(257), Some(257)));
        let twice = corpus([&[257], &tokens[..]].concat(), Some(Tokenizer::bytes()));
        let twice = batches_of(twice, Some(20), Placement::Line).err().unwrap().to_string();
        assert!(twice.starts_with("--landmarks: the training data has landmarks already"), "{twice}");
        let model = GptConfig { landmarks: Placement::Line, sequence_length: 8, ..GptConfig::default() };
        let unknown = corpus(tokens, None).batches(&Settings { batch_size: 1, ..Settings::of(model) });
        let unknown = unknown.err().unwrap().to_string();
        assert!(unknown.starts_with("--landmarks: borders are found in text"), "{unknown}");
    }
}
