//! The passkey prompt: a number told once in a long text, and asked for at its end (Mohtashami and Jaggi, section 4.2); or several
//! numbers by name, of which one is asked for.

use crate::text_pieces::TextPieces;
use anyhow::bail;
use landmark_data::{TokenFile, Tokenizer};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::Path;

const TASK: &str = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. \
    I will quiz you about the important information there.\n";
const GARBAGE: &str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
/// Keys are below this, as the authors' are.
const KEYS: u64 = 50_000;

/// What keys are called where there are several.
const NAMES: [&str; 32] = [
    "silver key",
    "garden key",
    "kitchen key",
    "church key",
    "stable key",
    "library key",
    "cellar key",
    "tower key",
    "village key",
    "chapel key",
    "castle key",
    "winter key",
    "summer key",
    "golden key",
    "iron key",
    "copper key",
    "wooden key",
    "yellow key",
    "purple key",
    "crimson key",
    "river key",
    "forest key",
    "island key",
    "mountain key",
    "school key",
    "market key",
    "hotel key",
    "palace key",
    "prison key",
    "parlour key",
    "window key",
    "captain key",
];
/// The most keys that have a name.
pub const MOST_KEYS: usize = NAMES.len();

/// How a key is told.
pub fn told(name: &str, key: u64) -> String {
    format!("\nThe {name} is {key}. Remember it. {key} is the {name}.\n")
}

/// How it is asked for; the answer goes on from there.
pub fn question(name: &str) -> String {
    format!("\nWhat is the {name}? The {name} is")
}

/// What the keys are hidden in.
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

    /// A text, compressed or not, or prepared tokens. It is repeated where it is too short.
    pub fn open(path: &Path, tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        if path.extension().is_none_or(|ending| ending != "tokens") {
            return Self::text(&TextPieces::open(path)?.rest()?, tokenizer);
        }
        let file = TokenFile::open(path)?;
        file.check_tokenizer(tokenizer)?;
        file.verify()?;
        let end = tokenizer.end_of_text();
        // Documents follow each other as chapters do: an end of text would say that nothing before it matters.
        Self::of((0..file.len()).filter_map(|i| file.get(i)).filter(|id| Some(*id) != end).collect())
    }

    /// A text.
    pub fn text(text: &str, tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        Self::of(tokenizer.encode(text)?)
    }

    fn of(tokens: Vec<u32>) -> anyhow::Result<Self> {
        if tokens.is_empty() {
            bail!("the file is empty");
        }
        Ok(Self { tokens, is_garbage: false })
    }

    /// Its tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
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
    /// The first token of the sentence that tells it, and of the first that tells any.
    pub told_at: usize,
    pub keys_at: usize,
    /// The first token of the question, which is the rest.
    pub asked_at: usize,
}

/// What the prompts of a test have in common.
pub struct Prompts<'t> {
    /// The model's.
    pub tokenizer: &'t Tokenizer,
    /// The tokens that begin a text, of models that were trained with some: they count as others do.
    pub begin: &'t [u32],
    /// What the keys are hidden in.
    pub filler: &'t Filler,
    /// How many keys are told; with one it is *the pass key*.
    pub keys: usize,
    /// Decides them.
    pub seed: u64,
    /// Whether all begin at the same place in the filler.
    pub same_filler: bool,
}

impl Prompts<'_> {
    /// A prompt of `length` tokens. Its keys, and how far into the text they are told, are a function of the seed and `trial` alone, so
    /// all lengths ask the same questions.
    pub fn prompt(&self, length: usize, trial: u64) -> anyhow::Result<Prompt> {
        let &Self { tokenizer, begin, filler, keys: count, seed, same_filler } = self;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(trial);
        // (where it is told, its name, its number)
        let mut keys: Vec<(f64, &str, u64)> = Vec::with_capacity(count);
        while keys.len() < count {
            let key = 1 + rng.next_u64() % KEYS;
            let depth = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
            // Two equal keys would answer each other's questions.
            if keys.iter().all(|other| other.2 != key) {
                keys.push((depth, "pass key", key));
            }
        }
        let mut start = if filler.is_garbage { 0 } else { rng.next_u64() as usize % filler.tokens.len() };
        if same_filler {
            start = ChaCha8Rng::seed_from_u64(seed).next_u64() as usize % filler.tokens.len();
        }
        let mut asked = 0;
        if count > 1 {
            let mut names = NAMES;
            for (i, key) in keys.iter_mut().enumerate() {
                let drawn = i + rng.next_u64() as usize % (MOST_KEYS - i);
                names.swap(i, drawn);
                key.1 = names[i];
            }
            asked = rng.next_u64() as usize % count;
        }
        let (_, name, key) = keys[asked];
        keys.sort_by(|a, b| a.0.total_cmp(&b.0));

        let task = [begin, &tokenizer.encode(TASK)?].concat();
        let told =
            keys.iter().map(|(_, name, key)| tokenizer.encode(&told(name, *key))).collect::<Result<Vec<_>, _>>()?;
        let question = tokenizer.encode(&question(name))?;
        let fixed = task.len() + told.iter().map(Vec::len).sum::<usize>() + question.len();
        let Some(around) = length.checked_sub(fixed) else {
            let what = if count == 1 { "the key".into() } else { format!("{count} keys") };
            bail!("--lengths {length}: too short, the task, {what} and the question alone take {fixed} tokens");
        };
        let (mut tokens, mut told_at, mut done) = (task, 0, 0);
        let mut keys_at = None;
        // In the usual sentences each stretch begins anew; in a text a key lies between two neighbouring words.
        let from = |done| if filler.is_garbage { 0 } else { start + done };
        for ((depth, _, this), told) in keys.iter().zip(&told) {
            let before = (depth * (around + 1) as f64) as usize;
            tokens.extend(filler.from(from(done), before - done));
            done = before;
            keys_at.get_or_insert(tokens.len());
            if *this == key {
                told_at = tokens.len();
            }
            tokens.extend(told);
        }
        tokens.extend(filler.from(from(done), around - done));
        let asked_at = tokens.len();
        tokens.extend(question);
        let keys_at = keys_at.unwrap_or(asked_at);
        Ok(Prompt { tokens, key, told_at, keys_at, asked_at })
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
    use landmark_data::{TokenFileInfo, TokenWriter};

    fn text(filler: &Filler, keys: usize, length: usize, trial: u64) -> (String, Prompt) {
        let tokenizer = Tokenizer::bytes();
        let prompt = Prompts { tokenizer: &tokenizer, begin: &[], filler, keys, seed: 1, same_filler: false }
            .prompt(length, trial)
            .unwrap();
        assert_eq!(prompt.tokens.len(), length);
        (tokenizer.decode(&prompt.tokens).unwrap(), prompt)
    }

    #[test]
    fn the_key_is_told_once_and_asked_for_at_the_end() {
        let filler = Filler::garbage(&Tokenizer::bytes()).unwrap();
        let mut depths = Vec::new();
        for trial in 0..40 {
            let (text, prompt) = text(&filler, 1, 2000, trial);
            let key = prompt.key;
            assert!((1..=KEYS).contains(&key));
            assert!(text.starts_with(TASK) && text.ends_with("\nWhat is the pass key? The pass key is"), "{text}");
            let told = format!("\nThe pass key is {key}. Remember it. {key} is the pass key.\n");
            assert_eq!(text.find(&told), Some(prompt.told_at), "{text}");
            assert!(text[TASK.len()..].starts_with(" The grass is green.") || prompt.told_at < TASK.len() + 20);
            depths.push(prompt.told_at as f64 / 2000.);
        }
        assert!(depths.iter().any(|&depth| depth < 0.3) && depths.iter().any(|&depth| depth > 0.7), "{depths:?}");
    }

    #[test]
    fn of_several_keys_one_is_asked_for_by_its_name() {
        let filler = Filler::text("It was a dark and stormy night. ", &Tokenizer::bytes()).unwrap();
        let mut asked = std::collections::HashSet::new();
        for trial in 0..40 {
            let (text, prompt) = text(&filler, 5, 2000, trial);
            let (_, question) = text.rsplit_once("\nWhat is the ").unwrap();
            let name = question.split_once('?').unwrap().0;
            assert!(question == format!("{name}? The {name} is") && NAMES.contains(&name), "{question}");
            asked.insert(name.to_string());
            assert_eq!(text.find(&told(name, prompt.key)), Some(prompt.told_at), "{text}");
            let names: std::collections::HashSet<&str> =
                NAMES.into_iter().filter(|name| text.contains(&format!(" is the {name}.\n"))).collect();
            assert_eq!((names.len(), text.matches("Remember it.").count()), (5, 5), "{text}");
        }
        assert!(asked.len() > 10, "{asked:?}");
    }

    #[test]
    fn every_length_asks_the_same_and_every_trial_another() {
        let filler = Filler::text("It was a dark and stormy night. ", &Tokenizer::bytes()).unwrap();
        for keys in [1, 3] {
            let key = |length, trial| text(&filler, keys, length, trial).1.key;
            assert_eq!(key(600, 3), key(4000, 3));
            assert_ne!(key(600, 3), key(600, 4));
        }
    }

    #[test]
    fn a_prompt_begins_as_the_models_texts_do() {
        let tokenizer = Tokenizer::bytes();
        let filler = Filler::text("It was a dark and stormy night. ", &tokenizer).unwrap();
        let prompt = |begin| {
            Prompts { tokenizer: &tokenizer, begin, filler: &filler, keys: 1, seed: 1, same_filler: false }
                .prompt(600, 0)
                .unwrap()
        };
        let (bare, marked) = (prompt(&[]), prompt(&[256]));
        assert_eq!((marked.tokens[0], marked.tokens.len()), (256, 600));
        assert_eq!(marked.tokens[1..50], bare.tokens[..49]);
        assert_eq!(marked.key, bare.key);
    }

    #[test]
    fn a_text_goes_on_behind_the_key() {
        let words: String = (0..2000).map(|i| format!("w{i} ")).collect();
        let filler = Filler::text(&words, &Tokenizer::bytes()).unwrap();
        let (text, prompt) = text(&filler, 1, 3000, 0);
        let told = told("pass key", prompt.key);
        let body = text.strip_prefix(TASK).unwrap().strip_suffix(&question("pass key")).unwrap().replace(&told, "");
        assert!(words.repeat(2).contains(&body), "{body}");
    }

    #[test]
    fn prompts_in_the_same_filler_are_alike_up_to_their_keys() {
        let words: String = (0..2000).map(|i| format!("w{i} ")).collect();
        let (tokenizer, filler) = (Tokenizer::bytes(), Filler::text(&words, &Tokenizer::bytes()).unwrap());
        for keys in [1, 3] {
            let prompts =
                Prompts { tokenizer: &tokenizer, begin: &[], filler: &filler, keys, seed: 1, same_filler: true };
            let prompts: Vec<Prompt> = (0..9).map(|trial| prompts.prompt(3000, trial).unwrap()).collect();
            for prompt in &prompts {
                let alike = prompt.keys_at.min(prompts[0].keys_at);
                assert_eq!(prompt.tokens[..alike], prompts[0].tokens[..alike]);
                assert_eq!(tokenizer.decode(&prompt.tokens[prompt.keys_at..][..5]).unwrap(), "\nThe ");
            }
        }
    }

    /// Prepared tokens are the text, without the ends of its documents.
    #[test]
    fn tokens_fill_as_their_text_does() {
        let folder = tempfile::tempdir().unwrap();
        let (text, tokens) = (folder.path().join("a.txt"), folder.path().join("a.tokens"));
        std::fs::write(&text, "one two three").unwrap();
        let tokenizer = Tokenizer::bytes();
        let mut writer = TokenWriter::create(&tokens, &TokenFileInfo::of(&tokenizer)).unwrap();
        for document in ["one two", " three"] {
            writer.push(&tokenizer.encode(document).unwrap()).unwrap();
            writer.push(&[tokenizer.end_of_text().unwrap()]).unwrap();
            writer.end_document().unwrap();
        }
        writer.finish().unwrap();
        let of = |path: &Path| Filler::open(path, &tokenizer).unwrap().tokens;
        assert_eq!(of(&tokens), of(&text));
    }

    #[test]
    fn what_is_too_short_is_refused() {
        let tokenizer = Tokenizer::bytes();
        let filler = Filler::garbage(&tokenizer).unwrap();
        let error = |keys| {
            let prompts =
                Prompts { tokenizer: &tokenizer, begin: &[], filler: &filler, keys, seed: 1, same_filler: false };
            prompts.prompt(100, 0).err().unwrap().to_string()
        };
        assert!(error(1).starts_with("--lengths 100: too short, the task, the key"), "{}", error(1));
        assert!(error(3).starts_with("--lengths 100: too short, the task, 3 keys"), "{}", error(3));
        assert!(Filler::text("", &tokenizer).is_err());
    }

    #[test]
    fn the_first_number_of_an_answer_counts() {
        assert_eq!(number(" 1234. Remember it. 99"), Some(1234));
        assert_eq!(number("pass key is 7"), Some(7));
        assert_eq!(number("none"), None);
        assert_eq!(number(&"9".repeat(30)), None);
    }
}
