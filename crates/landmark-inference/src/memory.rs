//! What a reader remembers of the text before the chunk that it reads.

use crate::{CacheFlags, LmCache, machine};
use anyhow::Context;
use candle_core::{Device, Tensor};
use landmark_data::{Placer, TOKENIZER_FILE, Tokenizer};
use landmark_memory::{CacheConfig, ContextMiss, LandmarkCache, Next, XlCache};
use landmark_models::gpt::Placement;
use landmark_models::{Model, Outline};

/// The memory of some texts that are read side by side.
pub struct Memory {
    /// One for all texts whose landmarks are at the same places: regular ones. At borders each text has a part of its own.
    parts: Vec<Part>,
    on_cpu: bool,
}

/// The memory of texts with the same places.
struct Part {
    texts: usize,
    kind: Kind,
    /// Puts the landmarks into the texts; `None` for a model that was trained without any in its data.
    placer: Option<Placer>,
}

enum Kind {
    /// Blocks, of which each token fetches a few.
    Landmarks(Box<LandmarkCache>),
    /// Transformer-XL's cache of the last tokens.
    Keys(XlCache),
    /// The last tokens themselves; the placer is at the first of them.
    Window(Vec<Vec<u32>>),
}

/// A place in a text, to go back to.
pub struct Mark {
    cache: landmark_memory::Mark,
    placer: Option<Placer>,
}

impl Memory {
    /// The memory of `texts` texts that the flags ask for, and the tokens of a chunk. Borders are found with the tokenizer.
    pub fn new(
        flags: &CacheFlags,
        model: &Model,
        tokenizer: Option<&Tokenizer>,
        texts: usize,
    ) -> anyhow::Result<(Self, usize)> {
        let outline = model.outline();
        let window = outline.window;
        let kind = flags.kind(&outline)?;
        let mem_freq = match kind {
            LmCache::Mem => Some(block_tokens(flags, &outline)?),
            _ => outline.mem_freq,
        };
        let placer = placer(outline.placement, tokenizer, mem_freq)?;
        let (parts, texts) = if outline.placement == Placement::Regular { (1, texts) } else { (texts, 1) };
        let mut chunk = 0;
        let mut part = || {
            let kind = match kind {
                LmCache::Mem => {
                    let config = cache_config(flags, &outline, texts)?;
                    let cache = LandmarkCache::new(config, outline.rope.clone(), model.activations(), model.device())?;
                    chunk = chunk_of(flags, &cache, outline.placement)?;
                    Kind::Landmarks(Box::new(cache))
                }
                LmCache::Kv => {
                    let kept = flags.mem_cache_size.unwrap_or(window / 2);
                    if kept > window {
                        anyhow::bail!(
                            "--mem_cache_size {kept}: the model knows no distances beyond its window of {window} tokens"
                        );
                    }
                    let usual = fitting(window.saturating_sub(kept).max(1), &outline);
                    chunk = flags.chunk(usual, fitting(window, &outline))?;
                    Kind::Keys(XlCache::new(outline.layers, kept, outline.rope.clone()))
                }
                LmCache::None | LmCache::KvTrain => {
                    // Half a window at once: every token has at least the other half before it.
                    chunk = flags.chunk(fitting(window / 2, &outline), fitting(window, &outline))?;
                    Kind::Window(vec![Vec::new(); texts])
                }
            };
            Ok(Part { texts, kind, placer: placer.clone() })
        };
        let parts = (0..parts).map(|_| part()).collect::<anyhow::Result<_>>()?;
        Ok((Self { parts, on_cpu: model.device().is_cpu() }, chunk))
    }

    /// The memory of one text that was read before, and whose blocks are in `cache`.
    pub fn of_text(
        flags: &CacheFlags,
        model: &Model,
        tokenizer: &Tokenizer,
        text: &[u32],
        cache: LandmarkCache,
    ) -> anyhow::Result<(Self, usize)> {
        let outline = model.outline();
        let mut placer = placer(outline.placement, Some(tokenizer), Some(cache.mem_freq()))?;
        follows(&mut placer, text);
        let chunk = chunk_of(flags, &cache, outline.placement)?;
        let part = Part { texts: 1, kind: Kind::Landmarks(Box::new(cache)), placer };
        Ok((Self { parts: vec![part], on_cpu: model.device().is_cpu() }, chunk))
    }

    /// The landmark caches, if there are any: one, or one for each text.
    pub fn caches(&self) -> impl Iterator<Item = &LandmarkCache> {
        self.parts.iter().filter_map(|part| match &part.kind {
            Kind::Landmarks(cache) => Some(&**cache),
            _ => None,
        })
    }

    /// The same, to be changed.
    pub fn caches_mut(&mut self) -> impl Iterator<Item = &mut LandmarkCache> {
        self.parts.iter_mut().filter_map(|part| match &mut part.kind {
            Kind::Landmarks(cache) => Some(&mut **cache),
            _ => None,
        })
    }

    /// Sets memory aside for texts of so many tokens each, as far as blocks of full length hold them.
    pub fn reserve(&mut self, tokens: usize) -> anyhow::Result<()> {
        let on_cpu = self.on_cpu;
        let mut more = 0;
        for cache in self.caches() {
            more += cache.bytes_of(tokens / cache.mem_freq() + 1).saturating_sub(cache.bytes());
        }
        // The system hands out memory that it does not have, and ends the process when it is used.
        if let Some(free) = machine::available_memory().filter(|&free| on_cpu && more as u64 > free) {
            anyhow::bail!(
                "the blocks of {tokens} tokens take {:.1} GB of memory, and {:.1} GB are free: read less at once, or keep fewer \
                 blocks with --mem_cache_size",
                more as f64 / 1e9,
                free as f64 / 1e9
            );
        }
        for cache in self.caches_mut() {
            cache.reserve(tokens / cache.mem_freq() + 1)?;
        }
        Ok(())
    }

    /// The place where the text is, if it is one text in blocks in memory.
    pub fn mark(&self) -> anyhow::Result<Option<Mark>> {
        let [Part { kind: Kind::Landmarks(cache), placer, .. }] = &self.parts[..] else { return Ok(None) };
        let mark = cache.mark()?;
        Ok(mark.map(|cache| Mark { cache, placer: placer.clone() }))
    }

    /// Goes back to a place in the same text.
    pub fn rewind(&mut self, mark: &Mark) -> anyhow::Result<()> {
        let [Part { kind: Kind::Landmarks(cache), placer, .. }] = &mut self.parts[..] else {
            anyhow::bail!("the place is not one of this text");
        };
        cache.rewind(&mark.cache)?;
        *placer = mark.placer.clone();
        Ok(())
    }

    /// Forgets the texts.
    pub fn clear(&mut self) {
        for part in &mut self.parts {
            part.placer.iter_mut().for_each(Placer::clear);
            match &mut part.kind {
                Kind::Landmarks(cache) => cache.clear(),
                Kind::Keys(cache) => cache.clear(),
                Kind::Window(texts) => texts.iter_mut().for_each(Vec::clear),
            }
        }
    }

    /// The hidden states `[texts, n, C]` of the next `n` tokens of each text.
    pub fn forward(&mut self, model: &Model, texts: &[&[u32]]) -> anyhow::Result<Tensor> {
        let (mut hidden, mut rest) = (Vec::with_capacity(self.parts.len()), texts);
        for part in &mut self.parts {
            let (texts, others) = rest.split_at(part.texts);
            hidden.push(part.forward(model, texts)?);
            rest = others;
        }
        if hidden.len() == 1 { Ok(hidden.remove(0)) } else { Ok(Tensor::cat(&hidden, 0)?) }
    }

    /// The hidden states `[1, n, C]` of the next tokens of several memories of one text each: in one pass of the model, if all are blocks of models
    /// without a context-miss token, which stands before a text that is alone.
    pub fn forward_together(model: &Model, texts: &mut [(&mut Self, &[u32])]) -> anyhow::Result<Vec<Tensor>> {
        if texts.len() == 1 || model.outline().has_miss_token || !texts.iter().all(|(memory, _)| memory.is_in_blocks())
        {
            return texts.iter_mut().map(|(memory, tokens)| memory.forward(model, &[tokens])).collect();
        }
        let (mut placers, mut inputs) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
        for (memory, tokens) in &mut *texts {
            let mut placer = memory.parts[0].placer.clone();
            let follows = follows(&mut placer, tokens);
            placers.push(placer);
            inputs.push((Tensor::new(*tokens, model.device())?.unsqueeze(0)?, follows));
        }
        let caches = texts.iter_mut().filter_map(|(memory, _)| memory.caches_mut().next());
        let next = |(cache, (tokens, follows))| Next { cache, tokens, follows };
        let mut next: Vec<Next> =
            caches.zip(inputs.iter().map(|(tokens, follows)| (tokens, &follows[..]))).map(next).collect();
        let hidden = landmark_memory::forward_together(&mut next, |ids, attention| Ok(model.hidden(ids, attention)?))?;
        for ((memory, _), placer) in texts.iter_mut().zip(placers) {
            memory.parts[0].placer = placer;
        }
        Ok(hidden)
    }

    /// Whether it is of one text, and by blocks.
    fn is_in_blocks(&self) -> bool {
        matches!(&self.parts[..], [Part { texts: 1, kind: Kind::Landmarks(_), .. }])
    }
}

impl Part {
    fn forward(&mut self, model: &Model, texts: &[&[u32]]) -> anyhow::Result<Tensor> {
        let outline = model.outline();
        // Of a model that has none, none is put in.
        let landmark = outline.landmark_id.unwrap_or(0);
        match &mut self.kind {
            Kind::Landmarks(cache) => {
                let ids = Tensor::from_vec(texts.concat(), (texts.len(), texts[0].len()), model.device())?;
                // If the cache fails, the text goes on as if the chunk had not been.
                let mut placer = self.placer.clone();
                let follows = follows(&mut placer, texts[0]);
                let hidden =
                    cache.forward_with_landmarks(&ids, &follows, |ids, attention| Ok(model.hidden(ids, attention)?))?;
                self.placer = placer;
                Ok(hidden)
            }
            Kind::Keys(cache) => {
                let follows = follows(&mut self.placer, texts[0]);
                let (ids, places) = with_landmarks(texts, &follows, landmark, model.device())?;
                Ok(model.hidden(&ids, cache)?.index_select(&places, 1)?)
            }
            Kind::Window(recent) => {
                recent.iter_mut().zip(texts).for_each(|(recent, next)| recent.extend_from_slice(next));
                let (window, next) = (outline.window, texts[0].len());
                let mut follows = follows(&mut self.placer.clone(), &recent[0]);
                // As many of the last tokens as fit with their landmarks.
                let mut positions = follows.len() + follows.iter().filter(|&&follows| follows).count();
                let fits = |follows: &bool| {
                    let fits = positions <= window;
                    positions -= 1 + usize::from(*follows);
                    fits
                };
                let surplus = follows.iter().position(fits).unwrap_or(follows.len());
                let dropped: Vec<u32> = recent[0].drain(..surplus).collect();
                recent.iter_mut().skip(1).for_each(|recent| drop(recent.drain(..surplus)));
                if let Some(placer) = &mut self.placer {
                    for token in dropped {
                        placer.push(token);
                    }
                }
                follows.drain(..surplus);
                let rows: Vec<&[u32]> = recent.iter().map(Vec::as_slice).collect();
                let (ids, places) = with_landmarks(&rows, &follows, landmark, model.device())?;
                let mut attention = model.window_attention(&ids)?;
                let hidden = model.hidden(&ids, &mut attention)?;
                Ok(hidden.index_select(&places.narrow(0, recent[0].len() - next, next)?, 1)?)
            }
        }
    }
}

/// The landmarks of a text as the model's training data had them.
fn placer(
    placement: Placement,
    tokenizer: Option<&Tokenizer>,
    mem_freq: Option<usize>,
) -> anyhow::Result<Option<Placer>> {
    let Some(mem_freq) = mem_freq else { return Ok(None) };
    if placement == Placement::Regular {
        return Ok(Some(Placer::every(u32::try_from(mem_freq)?)));
    }
    let tokenizer = tokenizer.with_context(|| {
        format!(
            "the model's landmarks are at borders of the text, and it has no {TOKENIZER_FILE}: name it with --tokenizer"
        )
    })?;
    Ok(landmark_train::border_rule(placement, tokenizer, mem_freq)?.map(Placer::at_borders))
}

/// Whether a landmark follows each of these tokens.
fn follows(placer: &mut Option<Placer>, tokens: &[u32]) -> Vec<bool> {
    tokens.iter().map(|&token| placer.as_mut().is_some_and(|placer| placer.push(token))).collect()
}

/// The most ordinary tokens of a block in the landmark cache.
fn block_tokens(flags: &CacheFlags, outline: &Outline) -> anyhow::Result<usize> {
    let mem_freq = flags.mem_cache_freq.or(outline.mem_freq);
    let mem_freq =
        mem_freq.context("--mem_cache_freq N is missing: the model was trained without landmarks in its data")?;
    if mem_freq == 0 || mem_freq >= outline.window {
        anyhow::bail!("--mem_cache_freq {mem_freq}: expected 1 to {}, the window less 1", outline.window - 1);
    }
    Ok(mem_freq)
}

/// The landmark cache that the flags ask for.
pub fn cache_config(flags: &CacheFlags, outline: &Outline, texts: usize) -> anyhow::Result<CacheConfig> {
    let mem_freq = block_tokens(flags, outline)?;
    let top_k = flags.top_k(outline.window, mem_freq + 1);
    let cutoff = flags.rem_cutoff.or(outline.rem_cutoff);
    Ok(CacheConfig {
        layers: outline.layers,
        batch: texts,
        kv_heads: outline.kv_heads,
        mem_freq,
        landmark_id: outline.landmark_id.context("the model has no landmark")?,
        top_k,
        selection: flags.selection(),
        max_blocks: flags.mem_cache_size,
        window: outline.window,
        context_miss: outline.has_miss_token.then_some(ContextMiss { cutoff }),
    })
}

/// The tokens of a chunk. Left out, whole blocks: then no position is beyond those that the model was trained on.
fn chunk_of(flags: &CacheFlags, cache: &LandmarkCache, placement: Placement) -> anyhow::Result<usize> {
    let blocks = cache.max_chunk() / (cache.mem_freq() + 1);
    let usual = match placement {
        Placement::Regular if blocks > 0 => blocks * cache.mem_freq(),
        _ => cache.max_chunk(),
    };
    flags.chunk(usual, cache.max_chunk())
}

/// The most ordinary tokens of `positions`, wherever in their block they begin. Borders may be anywhere: a text of nothing but ends of
/// text has a landmark after each.
pub fn fitting(positions: usize, outline: &Outline) -> usize {
    let most = match (outline.mem_freq, outline.placement) {
        (None, _) => positions,
        (Some(mem_freq), Placement::Regular) => positions.saturating_sub(1) * mem_freq / (mem_freq + 1),
        (Some(_), _) => positions / 2,
    };
    most.max(1)
}

/// Tokens of texts with their landmarks, `[texts, time]`, and the places of the tokens. (A base model may be trained on data with
/// landmarks too; they are tokens like any other to it.)
fn with_landmarks(
    texts: &[&[u32]],
    follows: &[bool],
    landmark: u32,
    device: &Device,
) -> candle_core::Result<(Tensor, Tensor)> {
    let (mut ids, mut places) = (Vec::new(), Vec::new());
    for text in texts {
        places.clear();
        let begin = ids.len();
        for (&token, &follows) in text.iter().zip(follows) {
            places.push((ids.len() - begin) as u32);
            ids.push(token);
            if follows {
                ids.push(landmark);
            }
        }
    }
    let time = ids.len() / texts.len();
    // Where models look at ids, and where what they make of them is.
    Ok((Tensor::from_vec(ids, (texts.len(), time), &Device::Cpu)?, Tensor::new(places, device)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use landmark_models::gpt::{Gpt, GptConfig, Variant};

    /// A model of bytes.
    fn model(variant: Variant, landmarks: Placement) -> Model {
        let config = GptConfig {
            model: variant,
            vocab_size: 258,
            landmark_id: 257,
            n_embd: 32,
            n_head: 2,
            n_layer: 2,
            sequence_length: 48,
            mem_freq: Some(5),
            landmarks,
            ..GptConfig::default()
        };
        Model::Gpt(Gpt::init(&config, 1, DType::F32, &Device::Cpu).unwrap().detached())
    }

    /// A text with an end of a sentence or of a document every few bytes.
    fn text(length: usize, seed: usize) -> Vec<u32> {
        let byte = |i: usize| match (i * i + seed) % 47 {
            n if n % 4 == 3 => u32::from(b'!'),
            7 => 256,
            n => n as u32 + 70,
        };
        (0..length).map(byte).collect()
    }

    fn read(model: &Model, flags: &CacheFlags, tokens: &[u32], chunk: usize) -> Tensor {
        let (mut memory, _) = Memory::new(flags, model, Some(&Tokenizer::bytes()), 1).unwrap();
        let hidden: Vec<Tensor> = tokens.chunks(chunk).map(|part| memory.forward(model, &[part]).unwrap()).collect();
        Tensor::cat(&hidden, 1).unwrap()
    }

    fn off(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
    }

    /// While everything fits the window, every memory is the plain model, whatever the chunks.
    #[test]
    fn in_the_window_all_memories_agree() {
        for landmarks in [Placement::Regular, Placement::Sentence] {
            for (variant, kinds) in [
                (Variant::Landmark, [LmCache::Mem, LmCache::None]),
                (Variant::BaseRotary, [LmCache::Kv, LmCache::None]),
            ] {
                let model = model(variant, landmarks);
                // The plain model on the text as training has it, as long as there are no more blocks than can be read.
                let mut placer = placer(model.outline().placement, Some(&Tokenizer::bytes()), Some(5)).unwrap();
                let (mut tokens, mut follows) = (text(26, 0), follows(&mut placer, &text(26, 0)));
                let seventh = follows.iter().enumerate().filter(|(_, follows)| **follows).nth(6);
                let length = seventh.map_or(26, |(place, _)| place);
                tokens.truncate(length);
                follows.truncate(length);
                let (ids, places) = with_landmarks(&[&tokens], &follows, 257, &Device::Cpu).unwrap();
                let mut attention = model.window_attention(&ids).unwrap();
                let whole = model.hidden(&ids, &mut attention).unwrap().index_select(&places, 1).unwrap();
                for kind in kinds {
                    // Blocks for the whole text, none is left out: more would not leave room for a chunk.
                    let cache_topk = (kind == LmCache::Mem).then_some(6);
                    let mem_cache_size = (kind == LmCache::Kv).then_some(48);
                    let flags = CacheFlags { lm_cache: Some(kind), cache_topk, mem_cache_size, ..Default::default() };
                    for chunk in [1, 3, 6] {
                        let off = off(&read(&model, &flags, &tokens, chunk), &whole);
                        assert!(off < 1e-4, "{variant:?} {landmarks:?} {kind:?} in chunks of {chunk}: off by {off}");
                    }
                }
            }
        }
    }

    /// The same of the LLaMA family, whose queries share keys, with stretched positions; farther texts are read on.
    #[test]
    fn a_llama_reads_through_the_cache() {
        use landmark_models::llama::{Llama, LlamaConfig};
        for scaling in [r#"{"rope_type": "linear", "factor": 2.0}"#, r#"{"rope_type": "yarn", "factor": 4.0}"#] {
            let json = format!(
                r#"{{"model_type": "llama_with_landmark", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": {scaling},
                "mem_id": 257, "mem_freq": 5, "train_context_length": 48}}"#
            );
            let config = LlamaConfig::from_json(&json).unwrap();
            let model = Llama::init(&config, 1, DType::F32, &Device::Cpu).unwrap();
            for var in model.parameters().values().filter(|var| var.rank() == 2) {
                var.set(&(var.as_tensor() * 10.).unwrap()).unwrap();
            }
            let model = Model::Llama(model.freeze().unwrap());
            let tokens = text(300, 3);
            let follows: Vec<bool> = (1..=34).map(|i| i % 5 == 0).collect();
            let (ids, places) = with_landmarks(&[&tokens[..34]], &follows, 257, &Device::Cpu).unwrap();
            let mut attention = model.window_attention(&ids).unwrap();
            let whole = model.hidden(&ids, &mut attention).unwrap().index_select(&places, 1).unwrap();
            let flags = CacheFlags { cache_topk: Some(6), ..Default::default() };
            for chunk in [1, 3, 6] {
                let off = off(&read(&model, &flags, &tokens[..34], chunk), &whole);
                assert!(off < 1e-4, "{scaling} in chunks of {chunk}: off by {off}");
            }
            let all = read(&model, &flags, &tokens, 5);
            assert_eq!(all.dims(), [1, 300, 32]);
            assert!(off(&all.narrow(1, 0, 34).unwrap(), &whole) < 1e-4);
        }
    }

    #[test]
    fn a_window_moves_on() {
        for (landmarks, from) in [(Placement::Regular, 160), (Placement::Sentence, 0)] {
            let model = model(Variant::Landmark, landmarks);
            let tokens = text(200, 0);
            let flags = CacheFlags { lm_cache: Some(LmCache::None), ..Default::default() };
            let hidden = read(&model, &flags, &tokens, 20);
            assert_eq!(hidden.dims(), [1, 200, 32]);
            // The last token's window: of the last tokens as many as fit with the landmarks among them.
            let mut placer = placer(model.outline().placement, Some(&Tokenizer::bytes()), Some(5)).unwrap();
            let follows = follows(&mut placer, &tokens);
            let positions = |from: usize| 200 - from + follows[from..].iter().filter(|&&follows| follows).count();
            let first = (0..200).find(|&first| positions(first) <= 48).unwrap();
            assert!(first == from || landmarks == Placement::Sentence, "{first}");
            let (ids, places) = with_landmarks(&[&tokens[first..]], &follows[first..], 257, &Device::Cpu).unwrap();
            let mut attention = model.window_attention(&ids).unwrap();
            let expected = model.hidden(&ids, &mut attention).unwrap().index_select(&places, 1).unwrap();
            let last = |x: &Tensor| x.narrow(1, x.dims()[1] - 1, 1).unwrap().flatten_all().unwrap();
            assert!(off(&last(&hidden), &last(&expected)) < 1e-5);
        }
    }

    /// After going back a text goes on as if nothing had come after that place, to the bit.
    #[test]
    fn a_text_goes_back_to_a_place() {
        for landmarks in [Placement::Regular, Placement::Sentence] {
            let model = model(Variant::Landmark, landmarks);
            let (tokens, other) = (text(200, 0), text(120, 5));
            let new = || Memory::new(&CacheFlags::default(), &model, Some(&Tokenizer::bytes()), 1).unwrap();
            let chunk = new().1;
            let read = |memory: &mut Memory, tokens: &[u32]| {
                let parts: Vec<Tensor> =
                    tokens.chunks(chunk).map(|part| memory.forward(&model, &[part]).unwrap()).collect();
                Tensor::cat(&parts, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            for place in [chunk, 2 * chunk, 53, 101] {
                let mut memory = new().0;
                read(&mut memory, &tokens[..place]);
                let mark = memory.mark().unwrap().unwrap();
                let expected = read(&mut memory, &tokens[place..]);
                for _ in 0..2 {
                    memory.rewind(&mark).unwrap();
                    read(&mut memory, &other);
                    memory.rewind(&mark).unwrap();
                    assert!(read(&mut memory, &tokens[place..]) == expected, "{landmarks:?}, back to {place}");
                }
                let mut fresh = new().0;
                assert!(fresh.rewind(&mark).is_err(), "a text that never came there");
            }
        }
        let model = model(Variant::BaseRotary, Placement::Regular);
        let (memory, _) = Memory::new(&CacheFlags::default(), &model, None, 1).unwrap();
        assert!(memory.mark().unwrap().is_none());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_does_not_fit_the_memory_is_refused() {
        let model = model(Variant::Landmark, Placement::Regular);
        let memory = |mem_cache_size| {
            let flags = CacheFlags { mem_cache_size, ..CacheFlags::default() };
            Memory::new(&flags, &model, None, 2).unwrap().0
        };
        let error = memory(None).reserve(1 << 40).unwrap_err().to_string();
        assert!(
            error.starts_with("the blocks of 1099511627776 tokens take ") && error.contains("--mem_cache_size"),
            "{error}"
        );
        memory(Some(100)).reserve(1 << 40).unwrap();
        let mut memory = memory(None);
        memory.reserve(1000).unwrap();
        // Six positions of a block, and its landmark's key: 2 texts, 2 layers, 32 channels of 4 bytes.
        assert_eq!(memory.caches().map(LandmarkCache::bytes).sum::<usize>(), 201 * (2 * 6 + 1) * 2 * 2 * 32 * 4);
    }

    /// Texts that are read side by side do not see each other, also where their landmarks are at different places.
    #[test]
    fn several_texts_are_read_as_one_by_one() {
        for (variant, kind) in
            [(Variant::Landmark, LmCache::Mem), (Variant::BaseRotary, LmCache::Kv), (Variant::Landmark, LmCache::None)]
        {
            for landmarks in [Placement::Regular, Placement::Sentence] {
                let model = model(variant, landmarks);
                let texts: Vec<Vec<u32>> = (0..3).map(|seed| text(90, 7 * seed)).collect();
                let flags = CacheFlags { lm_cache: Some(kind), ..Default::default() };
                let (mut memory, chunk) = Memory::new(&flags, &model, Some(&Tokenizer::bytes()), 3).unwrap();
                let parts = (0..90).step_by(chunk).map(|at| {
                    let next: Vec<&[u32]> = texts.iter().map(|text| &text[at..90.min(at + chunk)]).collect();
                    memory.forward(&model, &next).unwrap()
                });
                let together = Tensor::cat(&parts.collect::<Vec<_>>(), 1).unwrap();
                for (row, text) in texts.iter().enumerate() {
                    let alone = read(&model, &flags, text, chunk);
                    let off = off(&together.narrow(0, row, 1).unwrap(), &alone);
                    assert!(off < 1e-5, "{landmarks:?} {kind:?}: off by {off}");
                }
                memory.clear();
                let first: Vec<&[u32]> = texts.iter().map(|text| &text[..chunk]).collect();
                let again = memory.forward(&model, &first).unwrap();
                assert!(off(&again, &together.narrow(1, 0, chunk).unwrap()) < 1e-5);
            }
        }
    }
}
