//! What a reader remembers of the text before the chunk that it reads.

use super::flags::{CacheFlags, LmCache};
use anyhow::Context;
use candle_core::{Device, Tensor};
use landmark_memory::{CacheConfig, ContextMiss, LandmarkCache, XlCache};
use landmark_models::gpt::{Gpt, GptConfig, Variant, WindowAttention};

/// The memory of some texts that are read side by side.
pub enum Memory {
    /// Blocks, of which each token fetches a few, and the ordinary tokens of a block.
    Landmarks(LandmarkCache, usize),
    /// Transformer-XL's cache of the last tokens, and how many tokens of each text there were.
    Keys(XlCache, usize),
    /// The last tokens themselves, and how many tokens of each text there were before them.
    Window(Vec<Vec<u32>>, usize),
}

impl Memory {
    /// The memory of `texts` texts that the flags ask for, and the tokens of a chunk.
    pub fn new(flags: &CacheFlags, model: &Gpt, texts: usize) -> anyhow::Result<(Self, usize)> {
        let config = model.config();
        let window = config.sequence_length;
        match flags.kind(config)? {
            LmCache::Mem => landmarks(flags, model, texts),
            LmCache::Kv => {
                let kept = flags.mem_cache_size.unwrap_or(window / 2);
                if kept > window {
                    anyhow::bail!(
                        "--mem_cache_size {kept}: the model knows no distances beyond its window of {window} tokens"
                    );
                }
                let usual = fitting(window.saturating_sub(kept).max(1), config);
                let chunk = flags.chunk(usual, fitting(window, config))?;
                Ok((Self::Keys(XlCache::new(config.n_layer, kept, config.rope()), 0), chunk))
            }
            LmCache::None | LmCache::KvTrain => {
                // Half a window at once: every token has at least the other half before it.
                let chunk = flags.chunk(fitting(window / 2, config), fitting(window, config))?;
                Ok((Self::Window(vec![Vec::new(); texts], 0), chunk))
            }
        }
    }

    /// Forgets the texts.
    pub fn clear(&mut self) {
        match self {
            Self::Landmarks(cache, _) => cache.clear(),
            Self::Keys(cache, read) => {
                cache.clear();
                *read = 0;
            }
            Self::Window(texts, before) => {
                texts.iter_mut().for_each(Vec::clear);
                *before = 0;
            }
        }
    }

    /// The hidden states `[texts, n, C]` of the next `n` tokens of each text.
    pub fn forward(&mut self, model: &Gpt, texts: &[&[u32]]) -> anyhow::Result<Tensor> {
        match self {
            Self::Landmarks(cache, _) => {
                let ids = Tensor::from_vec(texts.concat(), (texts.len(), texts[0].len()), &Device::Cpu)?;
                Ok(cache.forward(&ids, |ids, attention| Ok(model.hidden(ids, attention, None)?))?)
            }
            Self::Keys(cache, read) => {
                let (ids, places) = with_landmarks(texts, *read, model.config())?;
                let hidden = model.hidden(&ids, cache, None)?;
                *read += texts[0].len();
                Ok(hidden.index_select(&places, 1)?)
            }
            Self::Window(recent, before) => {
                recent.iter_mut().zip(texts).for_each(|(recent, next)| recent.extend_from_slice(next));
                let window = model.config().sequence_length;
                let end = *before + recent[0].len();
                let fits = |&from: &usize| positions(from, end, model.config()) <= window;
                let first = (*before..end).find(fits).unwrap_or(end);
                recent.iter_mut().for_each(|recent| drop(recent.drain(..first - *before)));
                *before = first;
                let rows: Vec<&[u32]> = recent.iter().map(Vec::as_slice).collect();
                let (ids, places) = with_landmarks(&rows, *before, model.config())?;
                let mut attention = WindowAttention::new(model.config(), &ids, None)?;
                let hidden = model.hidden(&ids, &mut attention, None)?;
                let next = texts[0].len();
                Ok(hidden.index_select(&places.narrow(0, recent[0].len() - next, next)?, 1)?)
            }
        }
    }
}

fn landmarks(flags: &CacheFlags, model: &Gpt, texts: usize) -> anyhow::Result<(Memory, usize)> {
    let config = model.config();
    let mem_freq = flags.mem_cache_freq.or(config.mem_freq);
    let mem_freq =
        mem_freq.context("--mem_cache_freq N is missing: the model was trained without landmarks in its data")?;
    if mem_freq == 0 || mem_freq >= config.sequence_length {
        anyhow::bail!("--mem_cache_freq {mem_freq}: expected 1 to {}, the window less 1", config.sequence_length - 1);
    }
    let top_k = flags.top_k(config.sequence_length, mem_freq + 1);
    let cutoff = flags.rem_cutoff.or(config.rem_cutoff);
    let cache = CacheConfig {
        layers: config.n_layer,
        batch: texts,
        kv_heads: config.n_head,
        mem_freq,
        landmark_id: config.landmark_id,
        top_k,
        selection: flags.selection(),
        max_blocks: flags.mem_cache_size,
        window: config.sequence_length,
        context_miss: (config.model == Variant::LandmarkWithCmt).then_some(ContextMiss { cutoff }),
    };
    let cache = LandmarkCache::new(cache, config.rope(), model.dtype(), &Device::Cpu)?;
    let chunk = flags.chunk(cache.max_chunk(), cache.max_chunk())?;
    Ok((Memory::Landmarks(cache, mem_freq), chunk))
}

/// The most ordinary tokens of `positions`, wherever in their block they begin.
pub fn fitting(positions: usize, config: &GptConfig) -> usize {
    let most = match config.mem_freq {
        None => positions,
        Some(mem_freq) => positions.saturating_sub(1) * mem_freq / (mem_freq + 1),
    };
    most.max(1)
}

/// Positions that tokens `from..end` of a text take with the landmarks after them.
fn positions(from: usize, end: usize, config: &GptConfig) -> usize {
    end - from + config.mem_freq.map_or(0, |mem_freq| end / mem_freq - from / mem_freq)
}

/// Tokens of texts from number `from` on with the landmarks of the training data, `[texts, time]`, and the places of the tokens. (A
/// base model may be trained on data with landmarks too; they are tokens like any other to it.)
fn with_landmarks(texts: &[&[u32]], from: usize, config: &GptConfig) -> candle_core::Result<(Tensor, Tensor)> {
    let (mut ids, mut places) = (Vec::new(), Vec::new());
    for text in texts {
        places.clear();
        let begin = ids.len();
        for (number, &token) in (from..).zip(*text) {
            places.push((ids.len() - begin) as u32);
            ids.push(token);
            if config.mem_freq.is_some_and(|mem_freq| (number + 1).is_multiple_of(mem_freq)) {
                ids.push(config.landmark_id);
            }
        }
    }
    let time = ids.len() / texts.len();
    Ok((Tensor::from_vec(ids, (texts.len(), time), &Device::Cpu)?, Tensor::new(places, &Device::Cpu)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    fn model(variant: Variant) -> Gpt {
        let config = GptConfig {
            model: variant,
            vocab_size: 60,
            landmark_id: 50,
            n_embd: 32,
            n_head: 2,
            n_layer: 2,
            sequence_length: 48,
            mem_freq: Some(5),
            ..GptConfig::default()
        };
        Gpt::init(&config, 1, DType::F32, &Device::Cpu).unwrap().detached()
    }

    fn read(model: &Gpt, flags: &CacheFlags, tokens: &[u32], chunk: usize) -> Tensor {
        let (mut memory, _) = Memory::new(flags, model, 1).unwrap();
        let hidden: Vec<Tensor> = tokens.chunks(chunk).map(|part| memory.forward(model, &[part]).unwrap()).collect();
        Tensor::cat(&hidden, 1).unwrap()
    }

    /// While everything fits the window, every memory is the plain model, whatever the chunks.
    #[test]
    fn in_the_window_all_memories_agree() {
        let tokens: Vec<u32> = (0..26).map(|i| i * i % 47).collect();
        for (variant, kinds) in
            [(Variant::Landmark, [LmCache::Mem, LmCache::None]), (Variant::BaseRotary, [LmCache::Kv, LmCache::None])]
        {
            let model = model(variant);
            let whole = read(&model, &CacheFlags { lm_cache: Some(LmCache::None), ..Default::default() }, &tokens, 26);
            for kind in kinds {
                // Blocks for the whole text: none is left out.
                let cache_topk = (kind == LmCache::Mem).then_some(6);
                let mem_cache_size = (kind == LmCache::Kv).then_some(48);
                let flags = CacheFlags { lm_cache: Some(kind), cache_topk, mem_cache_size, ..Default::default() };
                for chunk in [1, 3, 6] {
                    let hidden = read(&model, &flags, &tokens, chunk);
                    let off = (hidden - &whole).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                    assert!(off < 1e-4, "{variant:?} {kind:?} in chunks of {chunk}: off by {off}");
                }
            }
        }
    }

    #[test]
    fn a_window_moves_on() {
        let model = model(Variant::Landmark);
        let tokens: Vec<u32> = (0..200).map(|i| i * i % 47).collect();
        let flags = CacheFlags { lm_cache: Some(LmCache::None), ..Default::default() };
        let hidden = read(&model, &flags, &tokens, 20);
        assert_eq!(hidden.dims(), [1, 200, 32]);
        // The last token's window: the last 40 tokens and the 8 landmarks among them.
        let (ids, places) = with_landmarks(&[&tokens[160..]], 160, model.config()).unwrap();
        let mut attention = WindowAttention::new(model.config(), &ids, None).unwrap();
        let expected = model.hidden(&ids, &mut attention, None).unwrap().index_select(&places, 1).unwrap();
        let last = |x: &Tensor| x.narrow(1, x.dims()[1] - 1, 1).unwrap().flatten_all().unwrap();
        let off = (last(&hidden) - last(&expected)).unwrap().abs().unwrap().max_all().unwrap();
        assert!(off.to_scalar::<f32>().unwrap() < 1e-5);
    }

    /// Texts that are read side by side do not see each other.
    #[test]
    fn several_texts_are_read_as_one_by_one() {
        for (variant, kind) in
            [(Variant::Landmark, LmCache::Mem), (Variant::BaseRotary, LmCache::Kv), (Variant::Landmark, LmCache::None)]
        {
            let model = model(variant);
            let texts: Vec<Vec<u32>> = (0..3).map(|t| (0..90).map(|i| (i * i + 7 * t) % 47).collect()).collect();
            let flags = CacheFlags { lm_cache: Some(kind), ..Default::default() };
            let (mut memory, chunk) = Memory::new(&flags, &model, 3).unwrap();
            let parts = (0..90).step_by(chunk).map(|at| {
                let next: Vec<&[u32]> = texts.iter().map(|text| &text[at..90.min(at + chunk)]).collect();
                memory.forward(&model, &next).unwrap()
            });
            let together = Tensor::cat(&parts.collect::<Vec<_>>(), 1).unwrap();
            for (row, text) in texts.iter().enumerate() {
                let alone = read(&model, &flags, text, chunk);
                let off = (together.narrow(0, row, 1).unwrap() - alone).unwrap().abs().unwrap().max_all().unwrap();
                assert!(off.to_scalar::<f32>().unwrap() < 1e-5, "{kind:?}");
            }
        }
    }
}
