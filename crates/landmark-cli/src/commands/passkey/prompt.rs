//! The passkey prompt: a number told once in a long text, and asked for at its end (Mohtashami and Jaggi, section 4.2).

use anyhow::bail;
use landmark_data::Tokenizer;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

const TASK: &str = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. \
    I will quiz you about the important information there.\n";
const GARBAGE: &str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
const QUESTION: &str = "\nWhat is the pass key? The pass key is";
/// Keys are below this, as the authors' are.
const KEYS: u64 = 50_000;

/// What the key is hidden in.
pub struct Filler {
    tokens: Vec<u32>,
    /// The usual sentences: always from their beginning.
    is_garbage: bool,
}

impl Filler {
    /// The usual sentences.
    pub fn garbage(tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        // Each repetition begins with a space, which tokenizers take with the word after it.
        Ok(Self { tokens: tokenizer.encode(&format!(" {GARBAGE}"))?, is_garbage: true })
    }

    /// A text; it is repeated where it is too short.
    pub fn text(text: &str, tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        let tokens = tokenizer.encode(text)?;
        if tokens.is_empty() {
            bail!("the file is empty");
        }
        Ok(Self { tokens, is_garbage: false })
    }

    fn from(&self, start: usize, length: usize) -> impl Iterator<Item = u32> {
        self.tokens.iter().copied().cycle().skip(start % self.tokens.len()).take(length)
    }
}

/// A prompt.
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The number that answers it.
    pub key: u64,
    /// The first token of the sentence that tells it.
    pub told_at: usize,
}

impl Prompt {
    /// A prompt of `length` tokens. Its key, and how far into the text it is told, are a function of `seed` and `trial` alone, so all
    /// lengths ask the same questions.
    pub fn new(tokenizer: &Tokenizer, filler: &Filler, length: usize, seed: u64, trial: u64) -> anyhow::Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(trial);
        let key = 1 + rng.next_u64() % KEYS;
        let depth = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let start = if filler.is_garbage { 0 } else { rng.next_u64() as usize % filler.tokens.len() };

        let task = tokenizer.encode(TASK)?;
        let told = tokenizer.encode(&format!("\nThe pass key is {key}. Remember it. {key} is the pass key.\n"))?;
        let question = tokenizer.encode(QUESTION)?;
        let fixed = task.len() + told.len() + question.len();
        let Some(around) = length.checked_sub(fixed) else {
            bail!("--lengths {length}: too short, the task, the key and the question alone take {fixed} tokens");
        };
        let before = (depth * (around + 1) as f64) as usize;
        // In the usual sentences each side begins anew; in a text the key lies between two neighbouring words.
        let after_from = if filler.is_garbage { 0 } else { start + before };
        let mut tokens = task;
        tokens.extend(filler.from(start, before));
        let told_at = tokens.len();
        tokens.extend(told);
        tokens.extend(filler.from(after_from, around - before));
        tokens.extend(question);
        Ok(Self { tokens, key, told_at })
    }
}

/// The first number in an answer.
pub fn number(answer: &str) -> Option<u64> {
    let rest = &answer[answer.find(|c: char| c.is_ascii_digit())?..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(filler: &Filler, length: usize, trial: u64) -> (String, Prompt) {
        let tokenizer = Tokenizer::bytes();
        let prompt = Prompt::new(&tokenizer, filler, length, 1, trial).unwrap();
        assert_eq!(prompt.tokens.len(), length);
        (tokenizer.decode(&prompt.tokens).unwrap(), prompt)
    }

    #[test]
    fn the_key_is_told_once_and_asked_for_at_the_end() {
        let filler = Filler::garbage(&Tokenizer::bytes()).unwrap();
        let mut depths = Vec::new();
        for trial in 0..40 {
            let (text, prompt) = text(&filler, 2000, trial);
            let key = prompt.key;
            assert!((1..=KEYS).contains(&key));
            assert!(text.starts_with(TASK) && text.ends_with(QUESTION), "{text}");
            let told = format!("\nThe pass key is {key}. Remember it. {key} is the pass key.\n");
            assert_eq!(text.find(&told), Some(prompt.told_at), "{text}");
            assert!(text[TASK.len()..].starts_with(" The grass is green.") || prompt.told_at < TASK.len() + 20);
            depths.push(prompt.told_at as f64 / 2000.);
        }
        assert!(depths.iter().any(|&depth| depth < 0.3) && depths.iter().any(|&depth| depth > 0.7), "{depths:?}");
    }

    #[test]
    fn every_length_asks_the_same_and_every_trial_another() {
        let filler = Filler::text("It was a dark and stormy night. ", &Tokenizer::bytes()).unwrap();
        let key = |length, trial| text(&filler, length, trial).1.key;
        assert_eq!(key(400, 3), key(4000, 3));
        assert_ne!(key(400, 3), key(400, 4));
    }

    #[test]
    fn a_text_goes_on_behind_the_key() {
        let words: String = (0..2000).map(|i| format!("w{i} ")).collect();
        let filler = Filler::text(&words, &Tokenizer::bytes()).unwrap();
        let (text, prompt) = text(&filler, 3000, 0);
        let told = format!("\nThe pass key is {key}. Remember it. {key} is the pass key.\n", key = prompt.key);
        let body = text.strip_prefix(TASK).unwrap().strip_suffix(QUESTION).unwrap().replace(&told, "");
        assert!(words.repeat(2).contains(&body), "{body}");
    }

    #[test]
    fn what_is_too_short_is_refused() {
        let filler = Filler::garbage(&Tokenizer::bytes()).unwrap();
        let error = Prompt::new(&Tokenizer::bytes(), &filler, 100, 1, 0).err().unwrap().to_string();
        assert!(error.starts_with("--lengths 100: too short"), "{error}");
        assert!(Filler::text("", &Tokenizer::bytes()).is_err());
    }

    #[test]
    fn the_first_number_of_an_answer_counts() {
        assert_eq!(number(" 1234. Remember it. 99"), Some(1234));
        assert_eq!(number("pass key is 7"), Some(7));
        assert_eq!(number("none"), None);
        assert_eq!(number(&"9".repeat(30)), None);
    }
}
