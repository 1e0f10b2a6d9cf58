//! The model as a whole: its start, what is random in it, its files, and its errors.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use landmark_attention::Attend;
use landmark_models::gpt::{Gpt, GptConfig, MlpKind, NegativeRows, Norm, PositionalEncoder, Variant, WindowAttention};
use landmark_models::ops::{Recording, Rounded};
use landmark_models::{Error, IGNORE};

const CPU: Device = Device::Cpu;

fn config() -> GptConfig {
    GptConfig {
        vocab_size: 96,
        n_embd: 32,
        n_head: 2,
        n_layer: 2,
        sequence_length: 64,
        mem_freq: Some(7),
        landmark_id: 90,
        ..GptConfig::default()
    }
}

fn ids() -> Tensor {
    let token = |i: u32| if i % 8 == 7 { 90 } else { i * 37 % 89 };
    Tensor::from_iter((0..80).map(token), &CPU).unwrap().reshape((2, 40)).unwrap()
}

fn loss_and_gradients(model: &Gpt, seed: Option<u64>) -> (f32, Vec<Vec<u32>>) {
    let mut attention = WindowAttention::new(model.config(), &ids(), seed).unwrap();
    let targets = (ids() + 1.).unwrap().to_dtype(DType::U32).unwrap();
    let loss = model.loss(&model.hidden(&ids(), &mut attention, seed).unwrap(), &targets, None).unwrap();
    let grads = loss.backward().unwrap();
    let bits =
        |grad: &Tensor| grad.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect();
    let grads = model.parameters().values().map(|p| bits(grads.get(p).expect("a gradient"))).collect();
    (loss.to_scalar().unwrap(), grads)
}

fn std(model: &Gpt, name: &str) -> f64 {
    let w = model.parameters()[name].to_dtype(DType::F64).unwrap().sqr().unwrap().mean_all().unwrap();
    w.to_scalar::<f64>().unwrap().sqrt()
}

#[test]
fn a_seed_is_a_model() {
    let model = Gpt::init(&config(), 1, DType::F32, &CPU).unwrap();
    let twin = Gpt::init(&config(), 1, DType::F64, &CPU).unwrap();
    let other = Gpt::init(&config(), 2, DType::F32, &CPU).unwrap();
    for (name, parameter) in model.parameters() {
        let values = |p: &Tensor| p.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(parameter), values(&twin.parameters()[name]), "{name}");
        assert_eq!(values(parameter) == values(&other.parameters()[name]), name.contains("ln_"), "{name}");
    }
    assert!((std(&model, "transformer.wte.weight") - 0.02).abs() < 1e-3);
    assert!((std(&model, "transformer.h.1.mlp.c_proj.weight") - 0.01).abs() < 1e-3);
    // Nothing is known yet: the loss is that of guessing among all tokens.
    assert!((loss_and_gradients(&model, None).0 - 96f32.ln()).abs() < 0.1);
}

#[test]
fn steps_are_the_same_bits_every_time_and_random_by_seed() {
    let config = GptConfig {
        dropout: 0.1,
        group_dropout: Some(0.2),
        positional_encoder: PositionalEncoder::RotaryMemJump,
        pos_jump_on_mem: Some(5),
        bias: true,
        ..config()
    };
    let model = Gpt::init(&config, 1, DType::F32, &CPU).unwrap();
    let first = loss_and_gradients(&model, Some(1));
    assert_eq!(first, loss_and_gradients(&model, Some(1)));
    assert_ne!(first.0, loss_and_gradients(&model, Some(2)).0);
    assert_ne!(first.0, loss_and_gradients(&model, None).0);
}

#[test]
fn every_variant_trains() {
    for model in [Variant::BaseRotary, Variant::Landmark, Variant::LandmarkWithCmt] {
        let control = (model == Variant::LandmarkWithCmt).then_some(0.5);
        let config = GptConfig { model, under_rem_score_prob: control, ..config() };
        let model = Gpt::init(&config, 1, DType::F32, &CPU).unwrap();
        let (loss, grads) = loss_and_gradients(&model, Some(1));
        assert!(loss.is_finite());
        assert!(grads.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
        assert!(grads.iter().all(|grad| grad.iter().any(|bits| f32::from_bits(*bits) != 0.)), "{:?}", config.model);
    }
}

/// Counts the layers that attended.
struct Counted {
    attention: Box<dyn Attend + Send>,
    calls: Arc<AtomicUsize>,
}

impl Attend for Counted {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.attention.attend(layer, q, k, v)
    }

    fn again(&self) -> Option<Box<dyn Attend + Send>> {
        Some(Box::new(Counted { attention: self.attention.again()?, calls: self.calls.clone() }))
    }
}

#[test]
fn layers_that_are_computed_again_change_no_bit() {
    let swiglu = GptConfig { norm: Norm::Rms, mlp: MlpKind::Swiglu, qk_norm: true, ..config() };
    let miss = GptConfig { model: Variant::LandmarkWithCmt, under_rem_score_prob: Some(0.3), ..config() };
    let negatives = NegativeRows { negative_rows: 1, negative_share: 1., negative_top_k: 1 };
    for (config, negatives) in [
        (config(), None),
        (GptConfig { bias: true, dropout: 0.2, ..config() }, None),
        (swiglu, None),
        (miss, None),
        (config(), Some((negatives, 0))),
    ] {
        let run = |again: bool| {
            let model = Gpt::init(&config, 1, DType::F32, &CPU).unwrap().with_activation_checkpointing(again);
            let recording = Recording::start(&Rounded::default());
            let attention = WindowAttention::with_negatives(&config, &ids(), Some(3), negatives).unwrap();
            let mut attention = Counted { attention: Box::new(attention), calls: Arc::default() };
            let hidden = model.hidden(&ids(), &mut attention, Some(3)).unwrap();
            let loss = model.loss(&hidden, &ids(), None).unwrap();
            let mut gradients = recording.backward(&loss).unwrap();
            assert_eq!(attention.calls.load(Ordering::Relaxed), config.n_layer * if again { 2 } else { 1 });
            let gradient = |p| gradients.remove(p).expect("of every parameter").flatten_all().unwrap();
            let gradients: Vec<_> = model.parameters().values().map(gradient).collect();
            let bits = |x: &Tensor| x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
            (loss.to_scalar::<f32>().unwrap(), gradients.iter().map(bits).collect::<Vec<_>>())
        };
        assert_eq!(run(true), run(false), "{config:?}");
    }
}

#[test]
fn a_detached_model_follows_its_original_and_keeps_no_graph() {
    let model = Gpt::init(&config(), 1, DType::F32, &CPU).unwrap();
    let detached = model.detached();
    let run =
        |model: &Gpt| model.hidden(&ids(), &mut WindowAttention::new(&config(), &ids(), None).unwrap(), None).unwrap();
    let values = |model: &Gpt| run(model).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(!run(&detached).track_op());
    let before = values(&detached);
    let wte = &model.parameters()["transformer.wte.weight"];
    wte.set(&Tensor::randn(0f32, 1., wte.shape(), &CPU).unwrap()).unwrap();
    let after = values(&detached);
    assert_ne!(before, after);
    assert_eq!(after, values(&model));
}

#[test]
fn files_bring_back_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in [DType::F32, DType::F64] {
        let config = GptConfig { model: Variant::LandmarkWithCmt, bias: true, rem_cutoff: Some(0.1), ..config() };
        let model = Gpt::init(&config, 3, dtype, &CPU).unwrap();
        model.save(dir.path()).unwrap();
        let loaded = Gpt::load(dir.path(), &CPU).unwrap();
        assert_eq!((loaded.config(), loaded.dtype()), (&config, dtype));
        assert!(loaded.parameters().keys().eq(model.parameters().keys()));
        for (name, parameter) in model.parameters() {
            let values = |p: &Tensor| p.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(values(parameter), values(&loaded.parameters()[name]));
        }
    }
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors"]);
}

#[test]
fn broken_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Gpt::load(dir.path(), &CPU), Err(Error::Io { .. })));
    Gpt::init(&config(), 3, DType::F32, &CPU).unwrap().save(dir.path()).unwrap();
    let (weights, json) = (dir.path().join("model.safetensors"), dir.path().join("config.json"));
    let whole = fs::read(&weights).unwrap();
    for cut in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&weights, &whole[..cut]).unwrap();
        assert!(matches!(Gpt::load(dir.path(), &CPU), Err(Error::WeightsFile { .. })), "{cut} bytes");
    }
    let mut corrupt = whole.clone();
    corrupt[12] ^= 0xff;
    fs::write(&weights, corrupt).unwrap();
    assert!(matches!(Gpt::load(dir.path(), &CPU), Err(Error::WeightsFile { .. })));
    fs::write(&weights, whole).unwrap();
    let text = fs::read_to_string(&json).unwrap();
    fs::write(&json, text.replace("\"n_head\": 2", "\"n_head\": 3")).unwrap();
    assert!(matches!(Gpt::load(dir.path(), &CPU), Err(Error::Config { field: "n_embd", .. })));
    fs::write(&json, text.replace("n_head", "n_heads")).unwrap();
    assert!(matches!(Gpt::load(dir.path(), &CPU), Err(Error::ConfigFile { .. })));
    fs::write(&json, text.replace("\"n_layer\": 2", "\"n_layer\": 1")).unwrap();
    assert!(matches!(Gpt::load(dir.path(), &CPU), Err(Error::UnknownTensor { .. })));
}

#[test]
fn weights_must_be_the_models_own() {
    let model = Gpt::init(&config(), 3, DType::F32, &CPU).unwrap();
    let weights = || -> HashMap<String, Tensor> {
        model.parameters().iter().map(|(name, p)| (name.clone(), p.as_detached_tensor())).collect()
    };
    let name = "transformer.h.1.ln_2.weight";
    let mut missing = weights();
    missing.remove(name);
    assert!(matches!(Gpt::from_tensors(&config(), missing), Err(Error::MissingTensor { name: n }) if n == name));
    let mut unknown = weights();
    unknown.insert("lm_head.weight".into(), Tensor::zeros((96, 32), DType::F32, &CPU).unwrap());
    assert!(
        matches!(Gpt::from_tensors(&config(), unknown), Err(Error::UnknownTensor { name: n }) if n == "lm_head.weight")
    );
    for wrong in [Tensor::zeros(33, DType::F32, &CPU).unwrap(), Tensor::zeros(32, DType::F64, &CPU).unwrap()] {
        let mut weights = weights();
        weights.insert(name.into(), wrong);
        assert!(matches!(Gpt::from_tensors(&config(), weights), Err(Error::WrongTensor { .. })));
    }
    // The model has its own copy.
    let tensors = weights();
    let copy = Gpt::from_tensors(&config(), tensors.clone()).unwrap();
    copy.parameters()[name].set(&Tensor::zeros(32, DType::F32, &CPU).unwrap()).unwrap();
    assert_eq!(tensors[name].to_vec1::<f32>().unwrap(), vec![1.; 32]);
}

#[test]
fn bad_input_is_an_error() {
    let model = Gpt::init(&config(), 3, DType::F32, &CPU).unwrap();
    let long = Tensor::zeros((1, 65), DType::U32, &CPU).unwrap();
    assert!(matches!(WindowAttention::new(&config(), &long, None), Err(Error::Shape { tensor: "ids", .. })));
    assert!(matches!(WindowAttention::new(&config(), &long.get(0).unwrap(), None), Err(Error::Shape { .. })));
    let mut attention = WindowAttention::new(&config(), &ids(), None).unwrap();
    let unknown = (ids().zeros_like().unwrap() + 96.).unwrap();
    assert!(matches!(model.hidden(&unknown, &mut attention, None), Err(Error::Value { name: "tokens", .. })));
    let floats = ids().to_dtype(DType::F32).unwrap();
    assert!(matches!(model.hidden(&floats, &mut attention, None), Err(Error::DType { .. })));
    // Attention made for another batch.
    assert!(model.hidden(&ids().narrow(1, 0, 20).unwrap(), &mut attention, None).is_err());
    let hidden = model.hidden(&ids(), &mut attention, None).unwrap();
    let nothing = Tensor::full(IGNORE, (2, 40), &CPU).unwrap();
    assert!(matches!(model.loss(&hidden, &nothing, None), Err(Error::Value { name: "targets", .. })));
    assert!(matches!(Gpt::init(&config(), 3, DType::BF16, &CPU), Err(Error::DType { .. })));
}

/// Models are handed on in half of the bytes; the CPU computes in f32 with what is left of their weights.
#[test]
fn half_precision_files_are_read_as_f32() {
    let model = Gpt::init(&config(), 1, DType::F32, &CPU).unwrap();
    for half in [DType::BF16, DType::F16] {
        let dir = tempfile::tempdir().unwrap();
        model.save_as(dir.path(), half).unwrap();
        let halves: HashMap<String, Tensor> =
            model.parameters().iter().map(|(name, p)| (name.clone(), p.to_dtype(half).unwrap())).collect();
        let file = candle_core::safetensors::load(dir.path().join("model.safetensors"), &CPU).unwrap();
        assert!(file.len() == halves.len() && file.values().all(|tensor| tensor.dtype() == half));
        let read = Gpt::load(dir.path(), &CPU).unwrap();
        assert_eq!(read.dtype(), DType::F32);
        for (name, parameter) in read.parameters() {
            let off = (parameter.as_tensor() - halves[name].to_dtype(DType::F32).unwrap()).unwrap().abs().unwrap();
            assert_eq!(off.max_all().unwrap().to_scalar::<f32>().unwrap(), 0., "{name}");
        }
        let loss = loss_and_gradients(&read, None).0;
        assert!((loss - loss_and_gradients(&model, None).0).abs() < 1e-2);
    }
}
