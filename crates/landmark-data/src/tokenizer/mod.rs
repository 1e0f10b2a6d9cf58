//! Text to token ids and back.
//!
//! Two kinds behind one type: plain bytes, which need no file and no training, and any Hugging Face `tokenizer.json`, GPT-2's
//! among them, which is built in. [`BpeTraining`] makes a new one from text.
//!
//! Text is always encoded as *ordinary* text: a corpus that spells out `<|endoftext|>` or `<landmark>` gets the tokens of
//! those characters, never the special ids, so no text can forge a document border or a landmark.
//! [`Tokenizer::encode_with_special`] is for templates that the program itself writes.

mod byte_level;
mod decoder;
mod train;
mod words;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::{DecoderWrapper, ModelWrapper, PreTokenizerWrapper};

pub use decoder::Decoder;
pub use train::BpeTraining;
use words::{Digits, WordCaches};

use crate::folder::TOKENIZER_FILE;
use crate::{Error, Result, output};

/// How a `tokenizer.json` spells the landmark token.
const LANDMARK_TOKEN: &str = "<landmark>";

/// How tokenizers spell end-of-text (the file itself does not say which token it is); the first one present counts.
const END_OF_TEXT_TOKENS: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"];

/// GPT-2's `tokenizer.json`; README.md beside it says where it is from.
const GPT2: &[u8] = include_bytes!("gpt2.tokenizer.json.zst");

/// Larger files are not the byte tokenizer, however they are formatted (its own is under 5 KB).
const BYTE_TOKENIZER_FILE_LIMIT: usize = 64 << 10;

/// The SHA-256 of a tokenizer's `tokenizer.json`: token files carry it, so that they are not read with another vocabulary.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Stands for a tokenizer that is not known.
    pub const UNKNOWN: Self = Self([0; 32]);
}

impl Fingerprint {
    /// All its hex digits.
    pub(crate) fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What [`Fingerprint::hex`] wrote.
    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        let byte = |i: usize| u8::from_str_radix(hex.get(2 * i..2 * i + 2)?, 16).ok();
        let mut bytes = [0; 32];
        for (i, to) in bytes.iter_mut().enumerate() {
            *to = byte(i)?;
        }
        (hex.len() == 64).then_some(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    /// The first 16 hex digits: enough to tell two files apart in a message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// A tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    kind: Kind,
    /// The exact bytes that [`Tokenizer::save`] writes and that the fingerprint is of.
    json: Arc<[u8]>,
    fingerprint: Fingerprint,
    /// Of the one that it was before it got a special token more.
    before: Option<Fingerprint>,
}

#[derive(Clone)]
enum Kind {
    Bytes,
    HuggingFace(Arc<HuggingFace>),
}

struct HuggingFace {
    /// Treats the text of special tokens as ordinary text.
    ordinary: tokenizers::Tokenizer,
    /// The same one, recognising special tokens; made when first asked for.
    special: OnceLock<tokenizers::Tokenizer>,
    vocab_size: u32,
    end_of_text: Option<u32>,
    landmark: Option<u32>,
    /// Whether a token is a run of bytes, independent of its neighbours.
    byte_level: bool,
    /// For a tokenizer that cuts a text into GPT-2's words, perhaps between single digits, and does nothing else to it.
    words: Option<WordCaches>,
}

impl Tokenizer {
    /// The byte tokenizer: ids 0..256 are the bytes of UTF-8, 256 is end-of-text, 257 the landmark.
    pub fn bytes() -> Self {
        Self::with_kind(Kind::Bytes, byte_level::TOKENIZER_JSON.as_bytes().to_vec())
    }

    /// GPT-2's tokenizer: 50,257 ids, of which 50256 is end-of-text; none is a landmark.
    pub fn gpt2() -> Result<Self> {
        let path = Path::new("<built in>");
        Self::parse(path, zstd::decode_all(GPT2).map_err(Error::io(path))?)
    }

    /// The tokenizer that a command line names: `bytes`, `gpt2`, or the path of a `tokenizer.json` or of the folder that it is in.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "bytes" => Ok(Self::bytes()),
            "gpt2" => Self::gpt2(),
            path if Path::new(path).is_dir() => Self::from_file(Path::new(path).join(crate::TOKENIZER_FILE)),
            path => Self::from_file(path),
        }
    }

    /// Loads a Hugging Face `tokenizer.json`; recognises the one that a byte tokenizer [saves](Self::save).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(path, std::fs::read(path).map_err(Error::io(path))?)
    }

    /// As [`Tokenizer::from_file`], from the file's contents.
    pub fn from_json(contents: &[u8]) -> Result<Self> {
        Self::parse(Path::new("<memory>"), contents.to_vec())
    }

    fn parse(path: &Path, json: Vec<u8>) -> Result<Self> {
        let unusable = |source| Error::TokenizerFile { path: path.to_path_buf(), source };
        // By value, so that a reformatted copy is recognised too.
        if json.len() < BYTE_TOKENIZER_FILE_LIMIT {
            let value: Value = serde_json::from_slice(&json).map_err(|e| unusable(e.into()))?;
            if serde_json::from_str::<Value>(byte_level::TOKENIZER_JSON).is_ok_and(|bytes| bytes == value) {
                return Ok(Self::bytes());
            }
        }
        let inner = guarded(|| HuggingFace::new(tokenizers::Tokenizer::from_bytes(&json)?)).map_err(unusable)?;
        Ok(Self::with_kind(Kind::HuggingFace(Arc::new(inner)), json))
    }

    fn with_kind(kind: Kind, json: Vec<u8>) -> Self {
        let fingerprint = Fingerprint(Sha256::digest(&json).into());
        Self { kind, json: json.into(), fingerprint, before: None }
    }

    /// The ids of `text`, taken as ordinary text; no special token is recognised or added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::HuggingFace(hf) => hf.encode(text),
        }
    }

    /// As [`Tokenizer::encode`], but special tokens that are spelled out in `text` become their ids. For chat templates
    /// and the like: never for text from outside.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        match &self.kind {
            Kind::Bytes => {
                let specials =
                    [(END_OF_TEXT_TOKENS[0], byte_level::END_OF_TEXT), (LANDMARK_TOKEN, byte_level::LANDMARK)];
                let mut ids = Vec::with_capacity(text.len());
                let mut rest = text;
                while let Some(c) = rest.chars().next() {
                    let width = match specials.iter().find(|(token, _)| rest.starts_with(token)) {
                        Some((token, id)) => {
                            ids.push(*id);
                            token.len()
                        }
                        None => {
                            ids.extend(rest.bytes().take(c.len_utf8()).map(u32::from));
                            c.len_utf8()
                        }
                    };
                    rest = &rest[width..];
                }
                Ok(ids)
            }
            Kind::HuggingFace(hf) => {
                let tokenizer = hf.special.get_or_init(|| {
                    let mut tokenizer = hf.ordinary.clone();
                    tokenizer.set_encode_special_tokens(false);
                    tokenizer
                });
                encode_one(tokenizer, text)
            }
        }
    }

    /// [`Tokenizer::encode`] of many texts, on all cores.
    pub fn encode_batch(&self, texts: &[String]) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text)).collect()
    }

    /// The text of `ids`. Special ids are left out; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        ids.iter().try_for_each(|&id| self.check(id))?;
        match &self.kind {
            Kind::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::HuggingFace(hf) => guarded(|| hf.ordinary.decode(ids, true)).map_err(failed("decode")),
        }
    }

    /// A decoder for ids that arrive one at a time.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder::new(self)
    }

    /// The number of ids: the largest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size_u32() as usize
    }

    fn vocab_size_u32(&self) -> u32 {
        match &self.kind {
            Kind::Bytes => byte_level::VOCAB_SIZE,
            Kind::HuggingFace(hf) => hf.vocab_size,
        }
    }

    /// The id that ends a document, if the vocabulary has one under a usual name.
    pub fn end_of_text(&self) -> Option<u32> {
        match &self.kind {
            Kind::Bytes => Some(byte_level::END_OF_TEXT),
            Kind::HuggingFace(hf) => hf.end_of_text,
        }
    }

    /// The id of the landmark token, if the vocabulary has a `<landmark>`. Otherwise the model has to reserve one.
    pub fn landmark_id(&self) -> Option<u32> {
        match &self.kind {
            Kind::Bytes => Some(byte_level::LANDMARK),
            Kind::HuggingFace(hf) => hf.landmark,
        }
    }

    /// What the file says comes before a text: the mark for the beginning, of models that were trained with one.
    pub fn beginning(&self) -> Vec<u32> {
        let Kind::HuggingFace(hf) = &self.kind else { return Vec::new() };
        let encode = |special| guarded(|| hf.ordinary.encode_fast("a", special));
        let ids = |special| encode(special).map(|encoding| encoding.get_ids().to_vec());
        let (Ok(with), Ok(without)) = (ids(true), ids(false)) else { return Vec::new() };
        let place = with.windows(without.len().max(1)).position(|window| window == without);
        with[..place.unwrap_or(0)].to_vec()
    }

    /// The same tokenizer with one more special token, which has the next id, and that id.
    pub fn with_special_token(&self, token: &str) -> Result<(Self, u32)> {
        if let Some(id) = self.token_id(token) {
            return Ok((self.clone(), id));
        }
        let path = Path::new("<memory>");
        let unusable = |source| Error::TokenizerFile { path: path.to_path_buf(), source };
        let mut json: Value = serde_json::from_slice(&self.json).map_err(|e| unusable(e.into()))?;
        let id = self.vocab_size_u32();
        let added = json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
        });
        match &mut json["added_tokens"] {
            Value::Array(list) => list.push(added),
            other => *other = json!([added]),
        }
        let new = Self::parse(path, json.to_string().into_bytes())?;
        // The library gives ids of its own to tokens whose ids do not follow on.
        match new.token_id(token) {
            Some(got) if got == id && new.vocab_size_u32() == id + 1 => Ok((new.after(self.fingerprint), id)),
            got => Err(unusable(format!("{token} would be {got:?}, expected {id}: its ids have holes").into())),
        }
    }

    /// The id of the token that is spelled exactly `token`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.kind {
            Kind::Bytes if token == END_OF_TEXT_TOKENS[0] => Some(byte_level::END_OF_TEXT),
            Kind::Bytes if token == LANDMARK_TOKEN => Some(byte_level::LANDMARK),
            Kind::Bytes => <[u8; 1]>::try_from(token.as_bytes()).ok().map(|[byte]| u32::from(byte)),
            Kind::HuggingFace(hf) => hf.ordinary.token_to_id(token),
        }
    }

    /// What tells this tokenizer from every other: the SHA-256 of its `tokenizer.json`.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The same, known to be the one with this fingerprint but for a special token.
    pub(crate) fn after(self, before: Fingerprint) -> Self {
        Self { before: Some(before), ..self }
    }

    /// The fingerprint of the one that it was before it got a special token more, if that is known.
    pub(crate) fn before(&self) -> Option<Fingerprint> {
        self.before
    }

    /// Whether it makes the same tokens of a text as the one with this fingerprint: it is that one, or has a special token more.
    pub fn encodes_as(&self, fingerprint: Fingerprint) -> bool {
        self.fingerprint == fingerprint || self.before == Some(fingerprint)
    }

    /// Writes `tokenizer.json` into the folder `dir`, byte for byte as it was loaded.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        output::write(&dir.as_ref().join(TOKENIZER_FILE), &self.json)
    }

    fn check(&self, id: u32) -> Result<()> {
        let vocab_size = self.vocab_size_u32();
        if id < vocab_size { Ok(()) } else { Err(Error::UnknownToken { id, vocab_size }) }
    }

    /// The bytes of one token (none for a special one), where a token is a run of bytes whatever its neighbours are.
    fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.kind {
            Kind::Bytes => u8::try_from(id).into_iter().collect(),
            Kind::HuggingFace(hf) => match hf.ordinary.id_to_token(id) {
                Some(token) if !hf.ordinary.get_added_vocabulary().is_special_token(&token) => {
                    byte_level::token_bytes(&token)
                }
                _ => Vec::new(),
            },
        }
    }

    /// The bytes that each id stands for within a text, by id; none for a special one.
    pub(crate) fn texts(&self) -> Vec<Vec<u8>> {
        let ids = 0..self.vocab_size_u32();
        if self.is_byte_level() {
            return ids.map(|id| self.token_bytes(id)).collect();
        }
        // Other decoders look at neighbours: what an id adds to a word is its text. An id that is not used has none.
        let decode = |ids: &[u32]| self.decode(ids).unwrap_or_default();
        let is_word =
            |id: &u32| matches!(decode(&[*id]), word if !word.is_empty() && word.chars().all(char::is_alphanumeric));
        let Some(word) = ids.clone().find(is_word) else {
            return ids.map(|id| decode(&[id]).into_bytes()).collect();
        };
        let before = decode(&[word]);
        let text = |id| decode(&[word, id]).strip_prefix(&before).unwrap_or_default().as_bytes().to_vec();
        ids.map(text).collect()
    }

    fn is_byte_level(&self) -> bool {
        match &self.kind {
            Kind::Bytes => true,
            Kind::HuggingFace(hf) => hf.byte_level,
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

impl HuggingFace {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.words {
            Some(words) => words.encode(text, |word| encode_one(&self.ordinary, word)),
            None => encode_one(&self.ordinary, text),
        }
    }

    fn new(mut inner: tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        // Files in the wild come with the settings of some training run. A corpus must not be cut or padded by them.
        inner.with_truncation(None)?.with_padding(None).set_encode_special_tokens(true);
        let largest = inner.get_vocab(true).into_values().max().ok_or("the vocabulary is empty")?;
        Ok(Self {
            vocab_size: largest.checked_add(1).ok_or("the vocabulary does not fit 32 bits")?,
            end_of_text: END_OF_TEXT_TOKENS.iter().find_map(|token| inner.token_to_id(token)),
            landmark: inner.token_to_id(LANDMARK_TOKEN),
            byte_level: matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))),
            words: cuts_into_words(&inner).map(WordCaches::new),
            ordinary: inner,
            special: OnceLock::new(),
        })
    }
}

/// Whether the ids of a text are those of its [words](words::Words), one after another, and what the words make of digits.
fn cuts_into_words(tokenizer: &tokenizers::Tokenizer) -> Option<Digits> {
    let gpt2 = |pattern: &PreTokenizerWrapper| match pattern {
        PreTokenizerWrapper::ByteLevel(level) => level.use_regex && !level.add_prefix_space,
        _ => false,
    };
    let digits = match tokenizer.get_pre_tokenizer()? {
        PreTokenizerWrapper::Sequence(steps) => match steps.as_ref() {
            [PreTokenizerWrapper::Digits(digits), words] if digits.individual_digits && gpt2(words) => Digits::Single,
            _ => return None,
        },
        words if gpt2(words) => Digits::Together,
        _ => return None,
    };
    let model = matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
    // Special tokens are ordinary text here, others are looked for in the text before it is cut.
    let special = tokenizer.get_added_tokens_decoder().values().all(|token| token.special);
    (model && special && tokenizer.get_normalizer().is_none()).then_some(digits)
}

fn encode_one(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
    Ok(guarded(|| tokenizer.encode_fast(text, false)).map_err(failed("encode"))?.get_ids().to_vec())
}

/// Calls the library, which panics on what some files ask for: a decoder that strips more characters than a token has. Calls change nothing of a
/// tokenizer but its caches, which are as good without an entry.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err("the file asks for what makes no sense".into()))
}

fn failed(operation: &'static str) -> impl Fn(tokenizers::Error) -> Error {
    move |source| Error::Tokenizer { operation, source }
}

#[cfg(test)]
mod tests;
