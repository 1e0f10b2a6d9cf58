//! The parameters of a GPT: their names, which are the authors', shapes and initial values.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Normal};

use super::config::{GptConfig, MlpKind, Variant};
use crate::{Error, Result};

/// What a parameter starts as.
#[derive(Debug, Clone, Copy)]
pub(super) enum Start {
    Normal { std: f64 },
    Ones,
    Zeros,
}

/// Name, shape and start of every parameter.
pub(super) fn specification(config: &GptConfig) -> BTreeMap<String, (Vec<usize>, Start)> {
    let (c, bias) = (config.n_embd, config.bias);
    let mut all = BTreeMap::new();
    let mut matrix = |name: &str, n_out, n_in, std, bias| {
        all.insert(format!("{name}.weight"), (vec![n_out, n_in], Start::Normal { std }));
        if bias {
            all.insert(format!("{name}.bias"), (vec![n_out], Start::Zeros));
        }
    };
    // The stream is a sum of 2 n_layer of these, so each is narrower by the root of that.
    let residual = 0.02 / (2. * config.n_layer as f64).sqrt();
    matrix("transformer.wte", config.vocab_size, c, 0.02, false);
    if config.model == Variant::LandmarkWithCmt {
        matrix("rem_token_embedding", 1, c, 0.02, false);
    }
    for layer in 0..config.n_layer {
        let layer = format!("transformer.h.{layer}");
        matrix(&format!("{layer}.attn.c_attn"), 3 * c, c, 0.02, bias);
        matrix(&format!("{layer}.attn.c_proj"), c, c, residual, bias);
        let rows = match config.mlp {
            MlpKind::Gelu => config.n_hidden(),
            MlpKind::Swiglu => 2 * config.n_hidden(),
        };
        matrix(&format!("{layer}.mlp.c_fc"), rows, c, 0.02, bias);
        matrix(&format!("{layer}.mlp.c_proj"), c, config.n_hidden(), residual, bias);
    }
    let mut norm = |name: &str, width: usize| {
        all.insert(format!("{name}.weight"), (vec![width], Start::Ones));
        if bias {
            all.insert(format!("{name}.bias"), (vec![width], Start::Zeros));
        }
    };
    for layer in 0..config.n_layer {
        norm(&format!("transformer.h.{layer}.ln_1"), c);
        norm(&format!("transformer.h.{layer}.ln_2"), c);
        if config.qk_norm {
            norm(&format!("transformer.h.{layer}.attn.q_norm"), config.head_dim());
            norm(&format!("transformer.h.{layer}.attn.k_norm"), config.head_dim());
        }
    }
    norm("transformer.ln_f", c);
    all
}

/// New parameters: one stream of random numbers through all of them in the order of their names, drawn in f64, so that a seed
/// means the same model in f32.
pub(super) fn init(config: &GptConfig, seed: u64, dtype: DType, device: &Device) -> Result<BTreeMap<String, Var>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut parameters = BTreeMap::new();
    for (name, (shape, start)) in specification(config) {
        let tensor = match start {
            Start::Normal { std } => {
                let normal = Normal::new(0., std).expect("a finite deviation");
                let values: Vec<f64> = (0..shape.iter().product()).map(|_| normal.sample(&mut rng)).collect();
                Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?
            }
            Start::Ones => Tensor::ones(shape, dtype, device)?,
            Start::Zeros => Tensor::zeros(shape, dtype, device)?,
        };
        parameters.insert(name, Var::from_tensor(&tensor)?);
    }
    Ok(parameters)
}

/// Parameters from tensors: exactly the names and shapes of the specification, all of one element type.
pub(super) fn from_tensors(config: &GptConfig, mut tensors: HashMap<String, Tensor>) -> Result<BTreeMap<String, Var>> {
    let mut parameters = BTreeMap::new();
    let (mut dtype, mut device) = (None, None::<Device>);
    for (name, (shape, _)) in specification(config) {
        let Some(tensor) = tensors.remove(&name) else {
            return Err(Error::MissingTensor { name });
        };
        if tensor.dims() != shape {
            let got = format!("{:?}", tensor.dims());
            return Err(Error::WrongTensor { name, got, expected: format!("{shape:?}") });
        }
        let dtype = *dtype.get_or_insert(tensor.dtype());
        if tensor.dtype() != dtype || !matches!(dtype, DType::F32 | DType::F64) {
            let expected = "f32 or f64, the same for all".to_string();
            return Err(Error::WrongTensor { name, got: format!("{:?}", tensor.dtype()), expected });
        }
        let got = tensor.device();
        let device = device.get_or_insert_with(|| got.clone());
        if !got.same_device(device) {
            let (got, expected) =
                (format!("on {:?}", got.location()), format!("on {:?}, as the others", device.location()));
            return Err(Error::WrongTensor { name, got, expected });
        }
        // A copy: the parameter must not share its storage with a tensor that the caller keeps.
        parameters.insert(name, Var::from_tensor(&tensor.force_contiguous()?.detach())?);
    }
    match tensors.into_keys().min() {
        Some(name) => Err(Error::UnknownTensor { name }),
        None => Ok(parameters),
    }
}
