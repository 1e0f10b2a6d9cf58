//! `--sample_freq`: what the model writes while it trains.

use super::flags::Flags;
use anyhow::{Context, bail};
use candle_core::{DType, Device};
use landmark_data::Tokenizer;
use landmark_inference::{CacheFlags, Reader, Sampler};
use landmark_models::Model;
use landmark_models::gpt::{Gpt, GptConfig};
use landmark_train::Data;

/// Tokens of the validation data that are gone on with where no prompt is given.
const PROMPT: u64 = 64;

/// Writes samples.
pub struct Writer {
    tokenizer: Tokenizer,
    prompt: Vec<u32>,
    tokens: usize,
    temperature: f64,
    seed: u64,
}

impl Writer {
    /// The writer that the flags ask for. What would stop it in the middle of a run is an error now.
    pub fn new(flags: &Flags, data: &Data, config: &GptConfig) -> anyhow::Result<Self> {
        let Some(tokenizer) = data.tokenizer.clone() else {
            bail!("--sample_freq: the data have no tokenizer.json to write text with; name it with --tokenizer");
        };
        if flags.sample_freq == Some(0) || flags.sample_tokens == 0 {
            bail!("--sample_freq and --sample_tokens: expected at least 1");
        }
        let temperature = flags.sample_temperature;
        if !(temperature >= 0. && temperature.is_finite()) {
            bail!("--sample_temperature {temperature}: expected a number from 0");
        }
        let prompt = match &flags.sample_prompt {
            Some(text) => tokenizer.encode(text).context("--sample_prompt")?,
            None => {
                let stream = data.validation.as_ref().unwrap_or(&data.train).stream();
                let tokens = (0..stream.tokens().len()).filter_map(|index| stream.tokens().get(index));
                let is_text = |&token: &u32| token != config.landmark_id && Some(token) != tokenizer.end_of_text();
                tokens.filter(is_text).take(PROMPT as usize).collect()
            }
        };
        if prompt.is_empty() {
            bail!("--sample_prompt: expected at least one token to go on with");
        }
        let writer = Self { tokenizer, prompt, tokens: flags.sample_tokens, temperature, seed: flags.seed };
        let trial = Gpt::init(&GptConfig { n_layer: 1, ..config.clone() }, 0, DType::F32, &Device::Cpu)?;
        writer.reader(&trial).context("--sample_freq")?;
        Ok(writer)
    }

    fn reader(&self, model: &Gpt) -> anyhow::Result<Reader> {
        Reader::new(Model::Gpt(model.detached()), self.tokenizer.clone(), &CacheFlags::default())
    }

    /// How the model goes on with the prompt after an iteration: the same model gives the same text.
    pub fn write(&self, model: &Gpt, iteration: usize) -> anyhow::Result<String> {
        let mut reader = self.reader(model)?;
        reader.read(&self.prompt, |_| true)?;
        let mut sampler = Sampler::with(self.temperature, self.seed.wrapping_add(iteration as u64));
        let mut drawn = Vec::new();
        reader.generate(self.tokens, &mut sampler, |token| {
            drawn.push(token);
            Ok(true)
        })?;
        Ok(self.tokenizer.decode(&drawn)?)
    }
}
