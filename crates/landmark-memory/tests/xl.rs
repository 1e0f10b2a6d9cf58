//! The Transformer-XL cache in training: gradients against finite differences, and what dropout does.

use candle_core::{DType, Device, Tensor};
use landmark_attention::Dropout;
use landmark_memory::XlCache;
use landmark_models::gpt::{Gpt, GptConfig, Variant};

const CPU: Device = Device::Cpu;

fn model() -> Gpt {
    let config = GptConfig {
        model: Variant::BaseRotary,
        vocab_size: 30,
        landmark_id: 29,
        n_embd: 16,
        n_head: 2,
        n_layer: 2,
        mem_freq: None,
        bias: true,
        ..GptConfig::default()
    };
    let model = Gpt::init(&config, 2, DType::F64, &CPU).unwrap();
    for var in model.parameters().values() {
        var.set(&(var.as_tensor() * 5.).unwrap()).unwrap();
    }
    model
}

fn ids(from: u32) -> Tensor {
    Tensor::from_vec((from..from + 10).map(|i| i * i % 29).collect::<Vec<u32>>(), (2, 5), &CPU).unwrap()
}

/// A cache that has read a window with the weights as they are.
fn cache(model: &Gpt) -> XlCache {
    let mut cache = XlCache::new(2, 4, model.config().rope());
    model.hidden(&ids(3), &mut cache, None).unwrap();
    cache
}

/// The loss of the next window.
fn loss(model: &Gpt, mut cache: XlCache) -> Tensor {
    let hidden = model.hidden(&ids(50), &mut cache, None).unwrap();
    model.loss(&hidden, &ids(51), None).unwrap()
}

#[test]
fn gradients_are_those_of_a_loss_whose_cache_is_a_constant() {
    let model = model();
    let cache = cache(&model);
    let gradients = loss(&model, cache.clone()).backward().unwrap();
    let step = 1e-5;
    for (name, var) in model.parameters() {
        let gradient = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let values = var.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let at = |place: usize, offset: f64| {
            let mut values = values.clone();
            values[place] += offset;
            var.set(&Tensor::from_vec(values, var.shape(), &CPU).unwrap()).unwrap();
            loss(&model, cache.clone()).to_scalar::<f64>().unwrap()
        };
        for place in (0..values.len()).step_by(values.len().div_ceil(25)) {
            let expected = (at(place, step) - at(place, -step)) / (2. * step);
            at(place, 0.);
            let ours = gradient[place];
            assert!(
                (ours - expected).abs() < 1e-7 * (1. + expected.abs()),
                "{name}[{place}]: {ours} is not {expected}"
            );
        }
    }
}

#[test]
fn dropout_is_a_function_of_its_seed_and_falls_on_the_cache_too() {
    let model = model();
    let with = |seed: Option<u64>| {
        let mut cache = cache(&model);
        cache.set_dropout(seed.map(|seed| Dropout { weights: 0.5, groups: 0., seed }));
        loss(&model, cache).to_scalar::<f64>().unwrap()
    };
    assert_eq!(with(Some(1)), with(Some(1)));
    assert_ne!(with(Some(1)), with(Some(2)));
    assert_ne!(with(Some(1)), with(None));
}
