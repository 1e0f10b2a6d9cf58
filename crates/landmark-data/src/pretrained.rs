//! A tokenizer as a Hugging Face folder has it: with what begins and ends a text, and how a conversation is written.
//!
//! | file | what is read of it |
//! | --- | --- |
//! | `tokenizer.json` | the tokenizer |
//! | `tokenizer_config.json` | `bos_token`, `eos_token`, `add_bos_token`, `chat_template` |
//! | `chat_template.jinja` | the chat template, where it has a file of its own |
//! | `generation_config.json` | `eos_token_id`: what ends a reply; `temperature`, `top_p`, `top_k`, `do_sample`: how to draw one |
//!
//! The rest of these files, and the others that the tools of Hugging Face look for, are kept and written again as they were.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{Error, Fingerprint, Result, TOKENIZER_FILE, Tokenizer, output};

const SETTINGS: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const GENERATION: &str = "generation_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const SENTENCE_PIECE: &str = "tokenizer.model";
const ADDED_TOKENS: &str = "added_tokens.json";

/// How the landmark token is spelled.
const LANDMARK: &str = "<landmark>";

/// The setting that says which tokenizer it was before it got the landmark: texts that were prepared with that one are its too.
const BEFORE: &str = "landmark_tokenizer_before";

/// A tokenizer and the conventions of the model that it belongs to.
#[derive(Clone, Debug)]
pub struct Pretrained {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The tokens that begin a text: none, or the model's mark for it.
    pub begin: Vec<u32>,
    /// The tokens that end a text or a reply.
    pub end: Vec<u32>,
    /// How those marks are spelled, for chat templates.
    pub bos_token: Option<String>,
    /// The same of the end.
    pub eos_token: Option<String>,
    /// How a conversation is written (Jinja), if the model was trained on some.
    pub chat_template: Option<String>,
    /// How its makers draw tokens, as far as they say.
    pub sampling: Sampling,
    settings: Map<String, Value>,
    /// Other files, as they were.
    files: BTreeMap<&'static str, Vec<u8>>,
}

/// How tokens are drawn, where somebody says so.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// What divides the logits; 0 where the likeliest token is always taken.
    pub temperature: Option<f64>,
    /// The probability that the likeliest tokens have together.
    pub top_p: Option<f64>,
    /// The number of the likeliest tokens; 0: all.
    pub top_k: Option<usize>,
}

impl Sampling {
    fn of(generation: &Map<String, Value>) -> Self {
        let number = |name: &str| generation.get(name).and_then(Value::as_f64);
        let is_greedy = generation.get("do_sample") == Some(&Value::Bool(false));
        Self {
            temperature: if is_greedy { Some(0.) } else { number("temperature") },
            top_p: number("top_p"),
            top_k: generation.get("top_k").and_then(Value::as_u64).and_then(|k| usize::try_from(k).ok()),
        }
    }
}

impl Pretrained {
    /// Reads the tokenizer of the model in a folder.
    ///
    /// # Errors
    /// There is no `tokenizer.json`, or one of the files is not what it should be.
    pub fn from_folder(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join(TOKENIZER_FILE);
        if !path.exists() && dir.join(SENTENCE_PIECE).exists() {
            return Err(Error::Layout {
                path: dir.join(SENTENCE_PIECE),
                expected: "expected a tokenizer.json beside it: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` of \
                           transformers writes it",
            });
        }
        let tokenizer = Tokenizer::from_file(&path)?;
        let mut files = BTreeMap::new();
        for name in [SETTINGS, TEMPLATE, GENERATION, SPECIAL_TOKENS, SENTENCE_PIECE, ADDED_TOKENS] {
            let path = dir.join(name);
            match fs::read(&path) {
                Ok(contents) => _ = files.insert(name, contents),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io(&path)(error)),
            }
        }
        let object = |contents: Option<&Vec<u8>>, name: &str| match contents {
            None => Ok(Map::new()),
            Some(contents) => serde_json::from_slice(contents)
                .map_err(|source| Error::TokenizerFile { path: dir.join(name), source: source.into() }),
        };
        let settings: Map<String, Value> = object(files.remove(SETTINGS).as_ref(), SETTINGS)?;
        let generation: Map<String, Value> = object(files.get(GENERATION), GENERATION)?;
        let template = match files.get(TEMPLATE) {
            None => None,
            Some(contents) => Some(
                String::from_utf8(contents.clone())
                    .map_err(|source| Error::TokenizerFile { path: dir.join(TEMPLATE), source: source.into() })?,
            ),
        };
        Ok(Self::new(tokenizer, settings, &generation, template, files))
    }

    /// The same from elsewhere: `settings` are those of a `tokenizer_config.json`.
    pub fn from_settings(tokenizer: Tokenizer, settings: Map<String, Value>) -> Self {
        Self::new(tokenizer, settings, &Map::new(), None, BTreeMap::new())
    }

    fn new(
        tokenizer: Tokenizer,
        settings: Map<String, Value>,
        generation: &Map<String, Value>,
        template: Option<String>,
        files: BTreeMap<&'static str, Vec<u8>>,
    ) -> Self {
        let before = settings.get(BEFORE).and_then(Value::as_str).and_then(Fingerprint::from_hex);
        let tokenizer = before.map_or(tokenizer.clone(), |before| tokenizer.after(before));
        // A token, or an object that spells it.
        let token = |name: &str| {
            let value = settings.get(name)?;
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
        };
        let (bos_token, eos_token) = (token("bos_token"), token("eos_token"));
        let id = |token: &Option<String>| token.as_ref().and_then(|token| tokenizer.token_id(token));
        let begin = match settings.get("add_bos_token").and_then(Value::as_bool) {
            Some(true) => id(&bos_token).into_iter().collect(),
            Some(false) => Vec::new(),
            None => tokenizer.beginning(),
        };
        let mut end: Vec<u32> = match generation.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(as_id).collect(),
            Some(one) => as_id(one).into_iter().collect(),
            None => Vec::new(),
        };
        end.extend(id(&eos_token).or(tokenizer.end_of_text()).filter(|id| !end.contains(id)));
        let chat_template = template.or_else(|| match settings.get("chat_template")? {
            Value::String(template) => Some(template.clone()),
            // Several under names.
            Value::Array(several) => {
                let default = several.iter().find(|template| template["name"] == "default")?;
                default["template"].as_str().map(str::to_string)
            }
            _ => None,
        });
        let sampling = Sampling::of(generation);
        Self { tokenizer, begin, end, bos_token, eos_token, chat_template, sampling, settings, files }
    }

    /// The same with a landmark token, which is the next id; and that id. What has one already stays as it is.
    pub fn with_landmark(&self) -> Result<(Self, u32)> {
        if let Some(id) = self.tokenizer.landmark_id() {
            return Ok((self.clone(), id));
        }
        let (tokenizer, id) = self.tokenizer.with_special_token(LANDMARK)?;
        let mut new = Self { tokenizer, ..self.clone() };
        add_to_list(&mut new.settings, LANDMARK);
        if let Some(before) = new.tokenizer.before() {
            new.settings.insert(BEFORE.into(), before.hex().into());
        }
        if let Some(Value::Object(decoder)) = new.settings.get_mut("added_tokens_decoder") {
            let token = json!({
                "content": LANDMARK, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true,
            });
            decoder.insert(id.to_string(), token);
        }
        if let Some(contents) = new.files.get_mut(SPECIAL_TOKENS)
            && let Ok(Value::Object(mut map)) = serde_json::from_slice(contents)
        {
            add_to_list(&mut map, LANDMARK);
            *contents = pretty(map);
        }
        // What the slow tokenizers of `transformers`, which read the SentencePiece model, know it from.
        if new.files.contains_key(SENTENCE_PIECE) {
            let contents = new.files.entry(ADDED_TOKENS).or_insert_with(|| b"{}".to_vec());
            if let Ok(Value::Object(mut map)) = serde_json::from_slice(contents) {
                map.insert(LANDMARK.into(), id.into());
                *contents = pretty(map);
            }
        }
        Ok((new, id))
    }

    /// Writes the files into the folder `dir`, which exists.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        self.tokenizer.save(dir)?;
        let mut settings = self.settings.clone();
        // Any tokenizer.json is read by it.
        settings.entry("tokenizer_class").or_insert("PreTrainedTokenizerFast".into());
        output::write(&dir.join(SETTINGS), &pretty(settings))?;
        self.files.iter().try_for_each(|(name, contents)| output::write(&dir.join(name), contents))
    }
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn pretty(map: Map<String, Value>) -> Vec<u8> {
    let mut contents = serde_json::to_vec_pretty(&Value::Object(map)).expect("a map of strings to JSON is JSON");
    contents.push(b'\n');
    contents
}

/// Adds a token to the list of special tokens that have no role.
fn add_to_list(map: &mut Map<String, Value>, token: &str) {
    // The newer name where it is in use.
    let name =
        if map.contains_key("extra_special_tokens") { "extra_special_tokens" } else { "additional_special_tokens" };
    match map.entry(name).or_insert_with(|| json!([])) {
        Value::Array(list) => list.push(token.into()),
        // Under names, in files of some models.
        Value::Object(named) => _ = named.insert("landmark_token".into(), token.into()),
        other => *other = json!([token]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        Tokenizer::gpt2().unwrap().save(dir.path()).unwrap();
        for (name, contents) in files {
            let text = contents.as_str().map_or_else(|| contents.to_string(), str::to_string);
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn conventions_are_read() {
        let bare = Pretrained::from_folder(folder(&[])).unwrap();
        assert_eq!((bare.begin, bare.end, bare.chat_template), (vec![], vec![50_256], None));
        let dir = folder(&[
            (
                SETTINGS,
                json!({
                    "bos_token": {"content": "A", "lstrip": false}, "eos_token": "B", "add_bos_token": true,
                    "chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}],
                }),
            ),
            (GENERATION, json!({"eos_token_id": [5, 6], "temperature": 0.6, "top_k": 20})),
        ]);
        let read = Pretrained::from_folder(dir.path()).unwrap();
        let id = |token: &str| read.tokenizer.token_id(token).unwrap();
        assert_eq!((&read.begin, &read.end), (&vec![id("A")], &vec![5, 6, id("B")]));
        assert_eq!(read.sampling, Sampling { temperature: Some(0.6), top_p: None, top_k: Some(20) });
        assert_eq!((read.bos_token.as_deref(), read.chat_template.as_deref()), (Some("A"), Some("d")));
        let jinja = folder(&[(SETTINGS, json!({"chat_template": "old"})), (TEMPLATE, json!("new"))]);
        assert_eq!(Pretrained::from_folder(jinja.path()).unwrap().chat_template.as_deref(), Some("new"));
    }

    #[test]
    fn the_landmark_is_the_next_id_and_stays() {
        let dir = folder(&[
            (
                SETTINGS,
                json!({"model_max_length": 512, "added_tokens_decoder": {"50256": {"content": "<|endoftext|>"}}}),
            ),
            (SPECIAL_TOKENS, json!({"additional_special_tokens": ["<x>"]})),
            (SENTENCE_PIECE, json!("not read")),
            (GENERATION, json!({"temperature": 0.5})),
        ]);
        let read = Pretrained::from_folder(dir.path()).unwrap();
        assert_eq!(read.tokenizer.landmark_id(), None);
        let (with, id) = read.with_landmark().unwrap();
        assert_eq!((id, with.tokenizer.landmark_id(), with.tokenizer.vocab_size()), (50_257, Some(50_257), 50_258));
        let to = tempfile::tempdir().unwrap();
        with.save(to.path()).unwrap();
        let again = Pretrained::from_folder(to.path()).unwrap();
        assert_eq!(again.tokenizer.fingerprint(), with.tokenizer.fingerprint());
        assert_eq!((again.settings.clone(), &again.files), (again.settings.clone(), &with.files));
        assert_eq!(again.settings["model_max_length"], 512);
        assert_eq!(again.settings["added_tokens_decoder"]["50257"]["content"], LANDMARK);
        let json = |name: &str| serde_json::from_slice::<Value>(&again.files[name]).unwrap();
        assert_eq!(json(SPECIAL_TOKENS)["additional_special_tokens"], json!(["<x>", LANDMARK]));
        assert_eq!(json(ADDED_TOKENS)[LANDMARK], 50_257);
        assert_eq!(json(GENERATION), json!({"temperature": 0.5}));
        assert!(
            again.tokenizer.encodes_as(read.tokenizer.fingerprint())
                && !read.tokenizer.encodes_as(with.tokenizer.fingerprint())
        );
        // Texts are what they were, and one that spells it out is no landmark.
        let text = "It was <landmark> a dark night.";
        assert_eq!(again.tokenizer.encode(text).unwrap(), read.tokenizer.encode(text).unwrap());
        let (same, id) = again.with_landmark().unwrap();
        assert_eq!((id, same.tokenizer.fingerprint()), (50_257, again.tokenizer.fingerprint()));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let empty = tempfile::tempdir().unwrap();
        let error = |dir: &Path| Pretrained::from_folder(dir).unwrap_err().to_string();
        assert!(error(empty.path()).contains(TOKENIZER_FILE));
        fs::write(empty.path().join(SENTENCE_PIECE), "x").unwrap();
        assert!(error(empty.path()).contains("save_pretrained"));
        for name in [SETTINGS, GENERATION] {
            let dir = folder(&[(name, json!("{\"half\":"))]);
            assert!(error(dir.path()).contains(name));
        }
    }
}
