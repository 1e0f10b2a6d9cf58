//! The optimizer: parameter groups, gradients over micro-steps, clipping, and one step over all parameters.

use crate::adafactor::{self, Adafactor};
use crate::error::{Error, Result};
use crate::update::{AdamW, AddAssign, Buffer, Sgd, sum_of_squares};
use candle_core::{Tensor, Var};
use landmark_models::ops;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// The rule that turns a gradient into a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Adam with decoupled weight decay, epsilon 1e-8.
    AdamW {
        /// How slowly the mean of the gradient forgets.
        beta1: f64,
        /// How slowly the mean of its square forgets.
        beta2: f64,
    },
    /// Gradient descent with momentum 0.9.
    Sgd,
    /// Adafactor at the learning rate of the schedule, without a first moment, with decoupled weight decay.
    Adafactor,
}

impl Method {
    /// What is remembered for a parameter of these dimensions: names and shapes.
    fn states(&self, dims: &[usize]) -> Vec<(&'static str, Vec<usize>)> {
        match self {
            Self::AdamW { .. } => vec![("exp_avg", dims.to_vec()), ("exp_avg_sq", dims.to_vec())],
            Self::Sgd => vec![("momentum", dims.to_vec())],
            Self::Adafactor => {
                let [rows, columns] = adafactor::state_shapes(dims);
                vec![("exp_avg_sq_row", rows), ("exp_avg_sq_col", columns)]
            }
        }
    }
}

/// One parameter, its group and its state.
struct Slot {
    name: String,
    var: Var,
    decayed: bool,
    state: Vec<Buffer>,
    /// A copy that is always the parameter in another type.
    rounded: Option<Tensor>,
}

/// Updates a model's parameters in place.
pub struct Optimizer {
    slots: Vec<Slot>,
    method: Method,
    weight_decay: f64,
    clip: Option<f64>,
    step: usize,
    /// On a GPU: its own step over all parameters.
    #[cfg(feature = "cuda")]
    gpu: Option<crate::cuda::Pieces>,
}

/// The gradients of one step: those of its micro-steps, added up. The reference does not divide by their number.
pub struct Gradients(Vec<Option<Tensor>>);

impl Optimizer {
    /// An optimizer of these parameters that has made no step. `decays` says to which of them weight decay applies; `clip` bounds the norm of
    /// all gradients together.
    pub fn new(
        parameters: &BTreeMap<String, Var>,
        method: Method,
        weight_decay: f64,
        decays: fn(&str, &Var) -> bool,
        clip: Option<f64>,
    ) -> Result<Self> {
        let slot = |(name, var): (&String, &Var)| -> Result<Slot> {
            let zeros = |shape: &[usize]| Buffer::zeros(var.device(), var.dtype(), shape.iter().product());
            let states = method.states(var.dims());
            let state = states.iter().map(|(_, shape)| zeros(shape)).collect::<candle_core::Result<_>>()?;
            Ok(Slot { name: name.clone(), var: var.clone(), decayed: decays(name, var), state, rounded: None })
        };
        let on_gpu = parameters.values().any(|var| !var.device().is_cpu());
        if on_gpu && !matches!(method, Method::AdamW { .. }) {
            return Err(Error::setting("opt", "on a GPU only adamw is available"));
        }
        let slots = parameters.iter().map(slot).collect::<Result<Vec<_>>>()?;
        #[cfg(feature = "cuda")]
        let gpu = match slots.first() {
            Some(slot) if on_gpu => {
                let sizes: Vec<usize> = slots.iter().map(|slot| slot.var.elem_count()).collect();
                Some(crate::cuda::Pieces::new(slot.var.device().as_cuda_device()?, &sizes)?)
            }
            _ => None,
        };
        Ok(Self {
            slots,
            method,
            weight_decay,
            clip,
            step: 0,
            #[cfg(feature = "cuda")]
            gpu,
        })
    }

    /// From now on each step also writes the matrices, as they come to be, in bf16. Only on a GPU.
    #[cfg(feature = "cuda")]
    pub fn keep_rounded(&mut self) -> Result<()> {
        for slot in self.slots.iter_mut().filter(|slot| slot.var.rank() == 2) {
            slot.rounded = Some(slot.var.as_detached_tensor().to_dtype(candle_core::DType::BF16)?);
        }
        Ok(())
    }

    /// What `keep_rounded` asked for, until the next step.
    pub fn rounded(&self) -> ops::Rounded {
        self.slots.iter().filter_map(|slot| Some((slot.var.clone(), slot.rounded.clone()?))).collect()
    }

    /// No gradients yet.
    pub fn gradients(&self) -> Gradients {
        Gradients(self.slots.iter().map(|_| None).collect())
    }

    /// Adds the gradients of one micro-step, taking them out of `store`.
    pub fn accumulate(&self, gradients: &mut Gradients, store: &mut ops::Gradients) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            let new = self.slots.iter().map(|slot| store.remove(&slot.var).map(crate::cuda::aligned).transpose());
            let new = new.collect::<candle_core::Result<Vec<_>>>()?;
            let pairs: Vec<_> = gradients.0.iter().zip(&new).map(|(sum, new)| sum.as_ref().zip(new.as_ref())).collect();
            if pairs.iter().any(Option::is_some) {
                gpu.add(&pairs)?;
            }
            for (sum, new) in gradients.0.iter_mut().zip(new) {
                if sum.is_none() {
                    *sum = new;
                }
            }
            return Ok(());
        }
        for (slot, sum) in self.slots.iter().zip(&mut gradients.0) {
            let Some(gradient) = store.remove(&slot.var) else { continue };
            let gradient = gradient.contiguous()?;
            match sum {
                Some(sum) => sum.inplace_op2(&gradient, &AddAssign)?,
                None => *sum = Some(gradient),
            }
        }
        Ok(())
    }

    /// One step at learning rate `rate`. A parameter without a gradient stays as it is. Returns the norm of the gradients
    /// before clipping, if they are clipped.
    pub fn step(&mut self, gradients: &Gradients, rate: f64) -> Result<Option<f64>> {
        #[cfg(feature = "cuda")]
        if self.gpu.is_some() {
            return self.gpu_step(gradients, rate);
        }
        let (norm, scale) = match self.clip {
            None => (None, 1.),
            Some(limit) => {
                let norm = gradients.norm()?;
                // As PyTorch's clip_grad_norm_, whose small constant keeps a gradient of zero apart from 0 / 0.
                (Some(norm), (limit / (norm + 1e-6)).min(1.))
            }
        };
        self.step += 1;
        for (slot, gradient) in self.slots.iter_mut().zip(&gradients.0) {
            let Some(gradient) = gradient else { continue };
            let decay = if slot.decayed { self.weight_decay } else { 0. };
            match (self.method, slot.state.as_mut_slice()) {
                (Method::AdamW { beta1, beta2 }, [first, second]) => {
                    let (first, second) = (RefCell::new(first), RefCell::new(second));
                    let op = AdamW { first, second, scale, rate, decay, beta1, beta2, step: self.step };
                    slot.var.inplace_op2(gradient, &op)?;
                }
                (Method::Sgd, [momentum]) => {
                    let op = Sgd { momentum: RefCell::new(momentum), scale, rate, decay };
                    slot.var.inplace_op2(gradient, &op)?;
                }
                (Method::Adafactor, [rows, columns]) => {
                    let op = Adafactor { squares: RefCell::new((rows, columns)), scale, rate, decay, step: self.step };
                    slot.var.inplace_op2(gradient, &op)?;
                }
                _ => unreachable!("every slot holds the states that its method names"),
            }
        }
        Ok(norm)
    }

    #[cfg(feature = "cuda")]
    fn gpu_step(&mut self, gradients: &Gradients, rate: f64) -> Result<Option<f64>> {
        let (Some(gpu), Method::AdamW { beta1, beta2 }) = (&self.gpu, self.method) else {
            unreachable!("refused by new");
        };
        self.step += 1;
        let steps = self.step as i32;
        let step = crate::cuda::Step {
            beta2: beta2 as f32,
            one_less_beta1: (1. - beta1) as f32,
            one_less_beta2: (1. - beta2) as f32,
            step_size: (rate / (1. - beta1.powi(steps))) as f32,
            root: (1. - beta2.powi(steps)).sqrt() as f32,
            eps: crate::update::EPS as f32,
        };
        let operands = self.slots.iter().zip(&gradients.0).map(|(slot, gradient)| {
            let [Buffer::Gpu(first), Buffer::Gpu(second)] = slot.state.as_slice() else {
                unreachable!("AdamW on a GPU has two moments there");
            };
            let decay = if slot.decayed { self.weight_decay } else { 0. };
            let (var, gradient, rounded) = (&slot.var, gradient.as_ref(), slot.rounded.as_ref());
            crate::cuda::Operands { var, gradient, moments: [first, second], rounded, keep: 1. - rate * decay }
        });
        Ok(gpu.adamw(&operands.collect::<Vec<_>>(), &step, self.clip)?)
    }

    /// Writes the state of every parameter, by name, into a safetensors file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let entries = self.entries();
        let bytes = entries.iter().map(|(_, _, state)| state.bytes()).collect::<candle_core::Result<Vec<_>>>()?;
        let views = entries.iter().zip(&bytes).map(|((name, shape, state), bytes)| {
            let dtype = match state {
                Buffer::F32(_) | Buffer::Gpu(_) => Dtype::F32,
                Buffer::F64(_) => Dtype::F64,
            };
            Ok((name, TensorView::new(dtype, shape.clone(), bytes)?))
        });
        let views = views.collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
        let metadata = [("step".to_string(), self.step.to_string())].into();
        views
            .and_then(|views| safetensors::serialize_to_file(views, Some(metadata), path))
            .map_err(|error| Error::format(path, error))
    }

    /// Takes the state from a file that [`Optimizer::save`] wrote for the same parameters and method.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| Error::format(path, error))?;
        let step = header.metadata().as_ref().and_then(|fields| fields.get("step")?.parse().ok());
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| Error::format(path, error))?;
        for slot in &mut self.slots {
            let states = self.method.states(slot.var.dims());
            for (state, (kind, shape)) in slot.state.iter_mut().zip(states) {
                let name = format!("{}.{kind}", slot.name);
                let view = tensors.tensor(&name).map_err(|error| Error::format(path, error))?;
                if view.shape() != shape || !state.set_bytes(view.data())? {
                    return Err(Error::format(path, format!("{name} does not have the shape and type of its weight")));
                }
            }
        }
        self.step = step.ok_or_else(|| Error::format(path, "the number of steps is missing from its metadata"))?;
        Ok(())
    }

    /// Every state with its name and shape in the file.
    fn entries(&self) -> Vec<(String, Vec<usize>, &Buffer)> {
        let mut entries = Vec::new();
        for slot in &self.slots {
            for (state, (kind, shape)) in slot.state.iter().zip(self.method.states(slot.var.dims())) {
                entries.push((format!("{}.{kind}", slot.name), shape, state));
            }
        }
        entries
    }
}

impl Gradients {
    /// The norm of all gradients as one vector.
    pub fn norm(&self) -> Result<f64> {
        let mut sum = 0.;
        for gradient in self.0.iter().flatten() {
            sum += sum_of_squares(gradient)?;
        }
        Ok(sum.sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;
    use candle_core::{DType, Device};
    use landmark_models::gpt::Gpt;

    const ADAMW: Method = Method::AdamW { beta1: 0.9, beta2: 0.95 };

    /// A decayed and an undecayed parameter; the first is longer than what a thread takes at a time.
    fn parameters(dtype: DType) -> BTreeMap<String, Var> {
        let var = |rows: usize, columns: usize| {
            let values = Tensor::arange(0f64, (rows * columns) as f64, &Device::Cpu).unwrap();
            let values = (values.sin().unwrap() * 0.1).unwrap().reshape((rows, columns)).unwrap();
            Var::from_tensor(&values.to_dtype(dtype).unwrap()).unwrap()
        };
        [("h.0.c_fc.weight", var(200, 173)), ("transformer.wte.weight", var(3, 5))].map(|(n, v)| (n.into(), v)).into()
    }

    /// The gradients of a loss in which `slope` sets how steep it is.
    fn store(parameters: &BTreeMap<String, Var>, slope: f64) -> ops::Gradients {
        let terms =
            parameters.values().map(|var| ((var.as_tensor() * slope).unwrap().sqr().unwrap()).sum_all().unwrap());
        terms.reduce(|a, b| (a + b).unwrap()).unwrap().backward().unwrap().into()
    }

    fn values(var: &Var) -> Vec<f64> {
        var.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn step(optimizer: &mut Optimizer, parameters: &BTreeMap<String, Var>, slopes: &[f64], rate: f64) -> Option<f64> {
        let mut gradients = optimizer.gradients();
        for slope in slopes {
            optimizer.accumulate(&mut gradients, &mut store(parameters, *slope)).unwrap();
        }
        optimizer.step(&gradients, rate).unwrap()
    }

    /// Three steps of both methods, written out per element.
    #[test]
    fn steps_are_pytorchs() {
        for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 1e-6)] {
            for method in [ADAMW, Method::Sgd] {
                let parameters = parameters(dtype);
                let start: Vec<_> = parameters.values().map(values).collect();
                let mut optimizer = Optimizer::new(&parameters, method, 0.1, Gpt::decays, None).unwrap();
                for rate in [1e-3, 2e-3, 1e-3] {
                    assert_eq!(step(&mut optimizer, &parameters, &[1., 0.5], rate), None);
                }
                for ((name, var), start) in parameters.iter().zip(start) {
                    let decay = if name.ends_with("wte.weight") { 0. } else { 0.1 };
                    for (ours, start) in values(var).into_iter().zip(start) {
                        let (mut p, mut m, mut v) = (start, 0., 0.);
                        for (t, rate) in [(1, 1e-3), (2, 2e-3), (3, 1e-3)] {
                            let g = 2. * p + 0.5 * p;
                            match method {
                                Method::AdamW { beta1, beta2 } => {
                                    p *= 1. - rate * decay;
                                    m = beta1 * m + (1. - beta1) * g;
                                    v = beta2 * v + (1. - beta2) * g * g;
                                    let (m, v) = (m / (1. - f64::powi(beta1, t)), v / (1. - f64::powi(beta2, t)));
                                    p -= rate * m / (v.sqrt() + 1e-8);
                                }
                                Method::Adafactor => unreachable!("it has a test of its own"),
                                Method::Sgd => {
                                    m = 0.9 * m + g + decay * p;
                                    p -= rate * m;
                                }
                            }
                        }
                        assert!((ours - p).abs() < tolerance, "{name} {method:?}: {ours} is not {p}");
                    }
                }
            }
        }
    }

    /// Three steps on a matrix that decays and a vector, as `transformers` 4.40's Adafactor(scale_parameter=False,
    /// relative_step=False) makes them.
    #[test]
    fn adafactor_is_that_of_transformers() {
        let recorded = [
            [
                -0.01993132086224106,
                0.06229728534244241,
                0.05374998335383944,
                0.0012991035826952803,
                -0.056493355717399676,
                -0.0558048810554041,
                -0.0189104003479318,
                0.048247214832666405,
                0.06082117071889353,
                0.006977427262743157,
                -0.04021285348946954,
                -0.06334300912256745,
            ]
            .as_slice(),
            &[
                -0.020030561201759674,
                0.06638945178557833,
                0.05231903795707224,
                -0.011371431335946904,
                -0.05748936349066943,
            ],
        ];
        for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 1e-7)] {
            let var = |shape: &[usize]| {
                let count: usize = shape.iter().product();
                let values: Vec<f64> = (0..count).map(|i| (i as f64).sin() * 0.1).collect();
                let values = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                Var::from_tensor(&values).unwrap()
            };
            let parameters: BTreeMap<String, Var> =
                [("a.weight", var(&[4, 3])), ("b.bias", var(&[5]))].map(|(name, var)| (name.into(), var)).into();
            let mut optimizer = Optimizer::new(&parameters, Method::Adafactor, 0.1, Gpt::decays, None).unwrap();
            for (step, rate, slope) in [(1., 1e-2, 0.01), (2., 2e-2, 0.01), (3., 1e-2, 1.)] {
                let gradient = |var: &Var| {
                    let waves = (0..var.elem_count()).map(|i| (i as f64 * step).cos() * slope).collect::<Vec<_>>();
                    let waves = Tensor::from_vec(waves, var.shape(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                    Some((waves + var.as_tensor()).unwrap())
                };
                let gradients = Gradients(parameters.values().map(gradient).collect());
                optimizer.step(&gradients, rate).unwrap();
            }
            for (var, recorded) in parameters.values().zip(recorded) {
                for (ours, recorded) in values(var).into_iter().zip(recorded) {
                    assert!((ours - recorded).abs() < tolerance, "{dtype:?}: {ours} is not {recorded}");
                }
            }
        }
    }

    #[test]
    fn clipping_bounds_the_norm_of_the_sum() {
        let norm = |clip| {
            let parameters = parameters(DType::F64);
            let before: Vec<_> = parameters.values().flat_map(values).collect();
            let mut optimizer = Optimizer::new(&parameters, Method::Sgd, 0., Gpt::decays, Some(clip)).unwrap();
            let norm = step(&mut optimizer, &parameters, &[1., 1.], 1.).unwrap();
            let expected = before.iter().map(|p| (4. * p).powi(2)).sum::<f64>().sqrt();
            assert!((norm - expected).abs() < 1e-9, "{norm} is not {expected}");
            let after = parameters.values().flat_map(values);
            before.iter().zip(after).map(|(before, after)| (before - after).powi(2)).sum::<f64>().sqrt()
        };
        assert!((norm(0.25) - 0.25).abs() < 1e-6);
        assert!(norm(1e9) > 1.);
    }

    #[test]
    fn a_saved_state_goes_on_as_if_it_had_never_been_saved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        for method in [ADAMW, Method::Adafactor, Method::Sgd] {
            let parameters = parameters(DType::F32);
            let mut optimizer = Optimizer::new(&parameters, method, 0.1, Gpt::decays, None).unwrap();
            step(&mut optimizer, &parameters, &[1.], 1e-3);
            optimizer.save(&path).unwrap();
            let copies = parameters.iter().map(|(name, var)| {
                (name.clone(), Var::from_tensor(&var.as_detached_tensor().force_contiguous().unwrap()).unwrap())
            });
            let copies: BTreeMap<_, _> = copies.collect();
            let mut copy = Optimizer::new(&copies, method, 0.1, Gpt::decays, None).unwrap();
            copy.load(&path).unwrap();
            step(&mut optimizer, &parameters, &[0.3], 1e-3);
            step(&mut copy, &copies, &[0.3], 1e-3);
            for (name, var) in &parameters {
                assert_eq!(values(var), values(&copies[name]));
            }
        }
        // The state of another method, or of other parameters, is refused.
        let parameters = parameters(DType::F32);
        assert!(Optimizer::new(&parameters, ADAMW, 0., Gpt::decays, None).unwrap().load(&path).is_err());
    }

    #[test]
    fn only_linear_weights_decay() {
        let config = landmark_models::gpt::GptConfig {
            n_embd: 8,
            n_head: 1,
            n_layer: 1,
            vocab_size: 12,
            landmark_id: 3,
            bias: true,
            model: landmark_models::gpt::Variant::LandmarkWithCmt,
            ..Default::default()
        };
        let model = landmark_models::gpt::Gpt::init(&config, 0, DType::F32, &Device::Cpu).unwrap();
        let decayed: Vec<_> = model
            .parameters()
            .iter()
            .filter(|(name, var)| Gpt::decays(name, var))
            .map(|(name, _)| name.as_str())
            .collect();
        let layer = |name| format!("transformer.h.0.{name}.weight");
        assert_eq!(decayed, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"].map(layer));
    }
}
