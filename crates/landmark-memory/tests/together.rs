//! Several texts in one pass of a model: each is read as if it were alone.

use candle_core::{DType, Device, Tensor};
use landmark_attention::{Attend, Pairs, Rope};
use landmark_memory::{CacheConfig, ContextMiss, LandmarkCache, Next, Selection, forward_together};

const HEAD_DIM: usize = 8;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const MEM_FREQ: usize = 5;
const CPU: Device = Device::Cpu;

fn cache(batch: usize, context_miss: Option<ContextMiss>) -> LandmarkCache {
    let config = CacheConfig {
        layers: 1,
        batch,
        kv_heads: KV_HEADS,
        mem_freq: MEM_FREQ,
        landmark_id: 99,
        top_k: 2,
        selection: Selection::PerTokenAndHead,
        max_blocks: None,
        window: 60,
        context_miss,
    };
    LandmarkCache::new(config, Rope::new(HEAD_DIM, 10_000., Pairs::Halves), DType::F32, &CPU).unwrap()
}

/// Projections of a text with a landmark after every [`MEM_FREQ`] tokens, `[1, heads, time, head_dim]`, and the chunks in which it is read.
struct Text {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Vec<usize>,
}

impl Text {
    fn new(chunks: &[usize]) -> Self {
        let tokens: usize = chunks.iter().sum();
        let time = tokens + tokens / MEM_FREQ;
        let random = |heads| Tensor::randn(0f32, 1., (1, heads, time, HEAD_DIM), &CPU).unwrap();
        Self { q: random(HEADS), k: random(KV_HEADS), v: random(KV_HEADS), chunks: chunks.to_vec() }
    }

    /// Whether a landmark follows each token of a chunk, and where its rows begin.
    fn chunk(&self, step: usize) -> Option<(Vec<bool>, usize)> {
        let n = *self.chunks.get(step)?;
        let before: usize = self.chunks[..step].iter().sum();
        Some(((before + 1..=before + n).map(|i| i.is_multiple_of(MEM_FREQ)).collect(), before + before / MEM_FREQ))
    }
}

/// A model of one layer that is attention: the rows of these texts from there on.
fn model(parts: &[(&Text, usize, &[bool])], attention: &mut dyn Attend) -> candle_core::Result<Tensor> {
    let rows = |x: fn(&Text) -> &Tensor| {
        let part = |&(text, from, follows): &(&Text, usize, &[bool])| {
            x(text).narrow(2, from, follows.len() + follows.iter().filter(|&&landmark| landmark).count())
        };
        Tensor::cat(&parts.iter().map(part).collect::<candle_core::Result<Vec<_>>>()?, 2)
    };
    let out = attention.attend(0, &rows(|text| &text.q)?, &rows(|text| &text.k)?, &rows(|text| &text.v)?)?;
    out.transpose(1, 2)?.flatten(2, 3)
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Some decode while others are read, some end their blocks, some are done.
#[test]
fn texts_are_read_as_if_alone() {
    let texts = [
        Text::new(&[20, 13, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        Text::new(&[1; 9]),
        Text::new(&[7, 40, 33, 2, 9]),
        Text::new(&[5, 5, 5, 30, 30, 30, 1, 1, 1, 1, 1, 1, 1]),
    ];
    let (mut together, mut alone) = (Vec::new(), Vec::new());
    for _ in &texts {
        together.push(cache(1, None));
        alone.push(cache(1, None));
    }
    for step in 0.. {
        let chunks: Vec<_> = texts.iter().map(|text| text.chunk(step)).collect();
        let tokens: Vec<Tensor> = chunks
            .iter()
            .map(|chunk| {
                Tensor::zeros((1, chunk.as_ref().map_or(0, |(follows, _)| follows.len())), DType::U32, &CPU).unwrap()
            })
            .collect();
        let (mut next, mut parts) = (Vec::new(), Vec::new());
        for (i, cache) in together.iter_mut().enumerate() {
            if let Some((follows, from)) = &chunks[i] {
                next.push(Next { cache, tokens: &tokens[i], follows });
                parts.push((&texts[i], *from, &follows[..]));
            }
        }
        if parts.is_empty() {
            break;
        }
        let mut outs = forward_together(&mut next, |_, attention| model(&parts, attention)).unwrap().into_iter();
        for (i, cache) in alone.iter_mut().enumerate() {
            if let Some((follows, from)) = &chunks[i] {
                let part = [(&texts[i], *from, &follows[..])];
                let out =
                    cache.forward_with_landmarks(&tokens[i], follows, |_, attention| model(&part, attention)).unwrap();
                assert_eq!(bits(&outs.next().unwrap()), bits(&out), "text {i}, step {step}");
            }
        }
    }
    for (together, alone) in together.iter().zip(&alone) {
        assert_eq!(together.finished_blocks(), alone.finished_blocks());
        assert_eq!(together.retrievals(), alone.retrievals());
    }
}

/// A model that fails leaves all texts as they were; what cannot be read together is refused by name.
#[test]
fn errors_change_nothing() {
    let text = Text::new(&[12]);
    let (follows, _) = text.chunk(0).unwrap();
    let tokens = Tensor::zeros((1, 12), DType::U32, &CPU).unwrap();
    let (mut a, mut b) = (cache(1, None), cache(1, None));
    let mut next = [
        Next { cache: &mut a, tokens: &tokens, follows: &follows },
        Next { cache: &mut b, tokens: &tokens, follows: &follows },
    ];
    let failed = forward_together(&mut next, |_, attention| {
        let part = (&text, 0, &follows[..]);
        model(&[part, part], attention)?;
        candle_core::bail!("no more")
    });
    assert!(failed.is_err());
    assert_eq!((a.finished_blocks(), b.finished_blocks()), (0, 0));

    assert!(forward_together(&mut [], |_, _| unreachable!()).is_err());
    let mut miss = cache(1, Some(ContextMiss { cutoff: None }));
    let error =
        forward_together(&mut [Next { cache: &mut miss, tokens: &tokens, follows: &follows }], |_, _| unreachable!());
    assert!(error.unwrap_err().to_string().contains("context_miss"));
    let mut two = cache(2, None);
    let error =
        forward_together(&mut [Next { cache: &mut two, tokens: &tokens, follows: &follows }], |_, _| unreachable!());
    assert!(error.unwrap_err().to_string().contains("batch"));
}
