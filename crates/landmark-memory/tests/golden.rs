//! The authors' numbers for inference over a long text: all cases of the landmark cache, and the Transformer-XL cache.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use landmark_attention::{Pairs, Rope};
use landmark_memory::{BlockType, CacheConfig, LandmarkCache, PoolTier, Scoring, Selection, Tiers, XlCache};
use landmark_models::gpt::{Gpt, GptConfig, SoftmaxFunc, Variant};

fn golden(case: &str) -> HashMap<String, Tensor> {
    let dir = std::env::var("LANDMARK_GOLDEN_DIR")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").to_string());
    let file = std::path::Path::new(&dir).join(format!("{case}.safetensors"));
    candle_core::safetensors::load(&file, &Device::Cpu).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

/// The GPU, in a build for GPUs on a machine that has one.
fn gpu() -> Option<Device> {
    if cfg!(feature = "cuda") { Device::new_cuda(0).ok() } else { None }
}

/// What the cases run on, in f64 and f32; a GPU has no f64.
fn runs() -> Vec<(Device, DType)> {
    let cpu = [DType::F64, DType::F32].map(|dtype| (Device::Cpu, dtype));
    cpu.into_iter().chain(gpu().map(|gpu| (gpu, DType::F32))).collect()
}

/// The model whose weights all cases share.
fn model(variant: Variant, dtype: DType, device: &Device) -> Gpt {
    let config = GptConfig {
        model: variant,
        vocab_size: 96,
        n_embd: 32,
        n_head: 2,
        n_layer: 3,
        sequence_length: 512,
        mem_freq: Some(7),
        landmark_id: 90,
        softmax_func: SoftmaxFunc::MemOpt,
        ..GptConfig::default()
    };
    let weights = golden("gpt_landmark_forward")
        .into_iter()
        .filter_map(|(name, tensor)| {
            Some((name.strip_prefix("param.")?.to_string(), tensor.to_dtype(dtype).unwrap().to_device(device).unwrap()))
        })
        .collect();
    Gpt::from_tensors(&config, weights).unwrap().detached()
}

fn rope() -> Rope {
    Rope::new(16, 10_000., Pairs::Interleaved)
}

fn chunks(ids: &Tensor, chunk: usize) -> Vec<Tensor> {
    let length = ids.dims()[1];
    (0..length).step_by(chunk).map(|at| ids.narrow(1, at, chunk.min(length - at)).unwrap()).collect()
}

fn ids(golden: &HashMap<String, Tensor>) -> Tensor {
    golden["input_ids"].to_dtype(DType::U32).unwrap()
}

/// Largest difference of logits, token by token.
fn differences(got: &Tensor, expected: &Tensor) -> Vec<f64> {
    let got = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let difference = (got - expected).unwrap().abs().unwrap().max(2).unwrap();
    difference.flatten_all().unwrap().to_vec1::<f64>().unwrap()
}

fn cached_logits(model: &Gpt, mut cache: LandmarkCache, ids: &Tensor, chunk: usize) -> Tensor {
    let logits: Vec<Tensor> = chunks(ids, chunk)
        .iter()
        .map(|chunk| {
            let hidden = cache.forward(chunk, |ids, attention| Ok(model.hidden(ids, attention, None)?)).unwrap();
            model.logits(&hidden).unwrap()
        })
        .collect();
    Tensor::cat(&logits, 1).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn check_cache(case: &str, top_k: usize, selection: Selection, max_blocks: usize, chunk: usize) {
    let golden = golden(case);
    let ids = ids(&golden);
    for (device, dtype) in runs() {
        let ids = ids.to_device(&device).unwrap();
        let config = CacheConfig {
            layers: 3,
            batch: 2,
            kv_heads: 2,
            mem_freq: 7,
            landmark_id: 90,
            top_k,
            selection,
            max_blocks: Some(max_blocks),
            window: 512,
            context_miss: None,
        };
        let model = model(Variant::Landmark, dtype, &device);
        let cache = LandmarkCache::new(config.clone(), rope(), dtype, &device).unwrap();
        let logits = cached_logits(&model, cache, &ids, chunk);
        if dtype == DType::F32 && device.is_cpu() {
            // From tiers come the same bits, whether a block in use finds room in RAM or not.
            for ram in [0, 20_000, 1 << 30] {
                let tiers = Tiers { of: BlockType::F32, ram, scoring: Scoring::Exact };
                let cache = LandmarkCache::in_tiers(config.clone(), rope(), tiers).unwrap();
                let tiered = cached_logits(&model, cache, &ids, chunk);
                assert_eq!(bits(&tiered), bits(&logits), "{case}: tiers with {ram} bytes of RAM");
            }
        }
        if dtype == DType::F32 {
            // Below a pool on the device that computes too. A pool that holds less than a chunk reads takes it in pieces; on the CPU that is another
            // order of sums.
            let pools = if device.is_cpu() { &[1 << 20][..] } else { &[0, 50_000, 1 << 20] };
            for &bytes in pools {
                let tiers = Tiers { of: BlockType::F32, ram: 0, scoring: Scoring::Exact };
                let pool = PoolTier { device: device.clone(), dtype, bytes };
                let cache = LandmarkCache::in_tiers_with_pool(config.clone(), rope(), tiers, pool).unwrap();
                let pooled = cached_logits(&model, cache, &ids, chunk);
                assert_eq!(bits(&pooled), bits(&logits), "{case}: a pool of {bytes} bytes on {device:?}");
            }
        }
        let off = differences(&logits, &golden["logits"]);
        if dtype == DType::F64 {
            let largest = off.iter().copied().fold(0., f64::max);
            assert!(largest <= 1e-9, "{case}: off by {largest:e} in f64");
        } else {
            // Rounding to f32 may turn the order of two blocks whose scores are that near, and then another block is read.
            let within = off.iter().filter(|&&x| x <= 1e-4).count();
            assert!(
                within * 100 >= off.len() * 98,
                "{case}: {within} of {} tokens within 1e-4 in f32, {device:?}",
                off.len()
            );
        }
    }
}

macro_rules! cache_cases {
    ($($case:ident: $top_k:literal $selection:ident $blocks:literal $chunk:literal),* $(,)?) => {$(
        #[test]
        fn $case() {
            check_cache(stringify!($case), $top_k, Selection::$selection, $blocks, $chunk);
        }
    )*};
}

cache_cases!(
    gpt_cache_top1_max_over_heads_blocks40_chunk20: 1 MaxOverHeads 40 20,
    gpt_cache_top1_max_over_tokens_blocks40_chunk20: 1 MaxOverTokens 40 20,
    gpt_cache_top1_per_token_and_head_blocks40_chunk20: 1 PerTokenAndHead 40 20,
    gpt_cache_top1_per_token_and_head_blocks6_chunk16: 1 PerTokenAndHead 6 16,
    gpt_cache_top2_max_over_heads_blocks40_chunk24: 2 MaxOverHeads 40 24,
    gpt_cache_top2_max_over_tokens_blocks40_chunk24: 2 MaxOverTokens 40 24,
    gpt_cache_top2_per_token_and_head_blocks40_chunk24: 2 PerTokenAndHead 40 24,
    gpt_cache_top2_per_token_and_head_blocks6_chunk24: 2 PerTokenAndHead 6 24,
    gpt_cache_top4_max_over_heads_blocks40_chunk40: 4 MaxOverHeads 40 40,
    gpt_cache_top4_max_over_tokens_blocks40_chunk40: 4 MaxOverTokens 40 40,
    gpt_cache_top4_per_token_and_head_blocks40_chunk40: 4 PerTokenAndHead 40 40,
    gpt_cache_top4_per_token_and_head_blocks6_chunk40: 4 PerTokenAndHead 6 40,
);

#[test]
fn gpt_xl_cache64_chunk16() {
    let golden = golden("gpt_xl_cache64_chunk16");
    for (device, dtype) in runs() {
        let tolerance = if dtype == DType::F64 { 1e-9 } else { 1e-4 };
        let model = model(Variant::BaseRotary, dtype, &device);
        let mut cache = XlCache::new(3, 64, rope());
        let logits: Vec<Tensor> = chunks(&ids(&golden).to_device(&device).unwrap(), 16)
            .iter()
            .map(|chunk| model.logits(&model.hidden(chunk, &mut cache, None).unwrap()).unwrap())
            .collect();
        let off = differences(&Tensor::cat(&logits, 1).unwrap(), &golden["logits"]);
        let largest = off.into_iter().fold(0., f64::max);
        assert!(largest <= tolerance, "off by {largest:e} in {dtype:?}, {device:?}");
    }
}
