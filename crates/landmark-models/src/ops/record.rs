//! Functions of any number of tensors to any number of tensors, with their gradients.
//!
//! There are two ways back through them. A caller that knows nothing of this gets candle's, see [`graph`].
//!
//! candle adds every gradient to zeros that it fills first: on a GPU that is half of the time of a training step. Training therefore starts
//! a [`Recording`], in which functions put themselves into a list, and goes back through the list.

mod graph;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backprop::GradStore;
use candle_core::op::BackpropOp;
use candle_core::{DType, Shape, Storage, Tensor, TensorId, Var, WithDType};

use landmark_attention::Attend;

use crate::Result;
use graph::{Hub, Out, Seed, Slots, Tie};

type Backward = Box<dyn Fn(Vec<Option<Gradient>>) -> Result<Vec<Gradient>> + Send + Sync>;

/// A gradient on its way back.
#[derive(Clone)]
pub(crate) struct Gradient {
    pub whole: Tensor,
    /// The same in bf16, from a function that could write it on the way, for the products that take it so.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub rounded: Option<Tensor>,
}

impl From<Tensor> for Gradient {
    fn from(whole: Tensor) -> Self {
        Self { whole, rounded: None }
    }
}

/// The parameters in another element type, for the products that take them so. Whoever changes the parameters keeps it, and hands it to the
/// recordings between two changes: outside of them nobody reads it, and so nobody reads what is out of date.
#[derive(Debug, Clone, Default)]
pub struct Rounded(#[cfg_attr(not(feature = "cuda"), allow(dead_code))] Arc<HashMap<TensorId, Tensor>>);

impl FromIterator<(Var, Tensor)> for Rounded {
    fn from_iter<I: IntoIterator<Item = (Var, Tensor)>>(copies: I) -> Self {
        Self(Arc::new(copies.into_iter().map(|(var, copy)| (var.id(), copy)).collect()))
    }
}

/// A result of a recorded function: its elements and its shape.
pub(crate) struct Output {
    storage: Storage,
    shape: Shape,
}

impl Output {
    pub fn new<T: WithDType>(elements: Vec<T>, shape: impl Into<Shape>) -> Self {
        Self { storage: Storage::Cpu(T::to_cpu_storage_owned(elements)), shape: shape.into() }
    }

    #[cfg(feature = "cuda")]
    pub fn on_gpu(storage: CudaStorage, shape: impl Into<Shape>) -> Self {
        Self { storage: Storage::Cuda(storage), shape: shape.into() }
    }
}

/// A training step's functions in the order in which they were called on this thread, from the start of the recording.
#[derive(Debug)]
pub struct Recording(());

/// The gradients of a loss.
pub struct Gradients(Source);

enum Source {
    Recorded(HashMap<TensorId, Tensor>),
    Candle(GradStore),
}

impl Gradients {
    /// Takes out the gradient of a parameter, if the loss depends on it.
    pub fn remove(&mut self, var: &Var) -> Option<Tensor> {
        match &mut self.0 {
            Source::Recorded(gradients) => gradients.remove(&var.id()),
            Source::Candle(gradients) => gradients.remove(var),
        }
    }
}

impl From<GradStore> for Gradients {
    fn from(gradients: GradStore) -> Self {
        Self(Source::Candle(gradients))
    }
}

thread_local! {
    static RECORDED: RefCell<Option<Recorded>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Recorded {
    nodes: Vec<Node>,
    /// Results that are no variables to candle.
    bridged: HashSet<TensorId>,
    rounded: Rounded,
    /// Nothing is recorded now: it will be computed again.
    paused: bool,
}

struct Node {
    /// The inputs that want a gradient.
    inputs: Vec<Option<TensorId>>,
    outputs: Vec<TensorId>,
    backward: Backward,
    /// Whether `backward` is given, after the gradients of the outputs, what the gradient of the first input is so far, and adds to it.
    adds: bool,
}

fn is_recording() -> bool {
    RECORDED.with_borrow(Option::is_some)
}

impl Recording {
    /// From now on the functions of this crate, on this thread, record themselves; a recording before this one is forgotten. Their results are
    /// variables to candle: what else is done with them has no gradient, but for what models do. `rounded` holds the parameters as they are now.
    pub fn start(rounded: &Rounded) -> Self {
        RECORDED.set(Some(Recorded { rounded: rounded.clone(), ..Recorded::default() }));
        Self(())
    }

    /// Ends the recording and goes back from `loss`, a scalar that one of the recorded functions gave.
    pub fn backward(self, loss: &Tensor) -> Result<Gradients> {
        let gradients = self.back_from(loss, loss.ones_like()?.into())?;
        let gradients = gradients.into_iter().map(|(id, gradient)| (id, gradient.whole)).collect();
        Ok(Gradients(Source::Recorded(gradients)))
    }

    fn back_from(self, out: &Tensor, gradient: Gradient) -> Result<HashMap<TensorId, Gradient>> {
        let Recorded { nodes, .. } = RECORDED.take().unwrap_or_default();
        drop(self);
        let mut gradients = HashMap::from([(out.id(), gradient)]);
        for Node { inputs, outputs, backward, adds } in nodes.into_iter().rev() {
            let mut of_outputs: Vec<_> = outputs.iter().map(|id| gradients.remove(id)).collect();
            if of_outputs.iter().all(Option::is_none) {
                continue;
            }
            if adds {
                of_outputs.push(inputs[0].and_then(|id| gradients.remove(&id)));
            }
            let of_inputs = backward(of_outputs)?;
            assert_eq!(inputs.len(), of_inputs.len(), "one gradient for each input");
            for (id, gradient) in inputs.into_iter().zip(of_inputs) {
                let Some(id) = id else { continue };
                let sum = match gradients.remove(&id) {
                    None => gradient,
                    Some(other) => (other.whole + gradient.whole)?.into(),
                };
                gradients.insert(id, sum);
            }
        }
        Ok(gradients)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDED.set(None);
    }
}

/// What candle's own operations make of `inputs`, for a recording: going back through it is candle's graph between the two. Without a
/// recording it is `f(inputs)` itself.
pub(crate) fn bridge<const N: usize>(
    inputs: [&Tensor; N],
    f: impl FnOnce([&Tensor; N]) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let ids = inputs.map(wanted);
    if RECORDED.with_borrow(|recorded| recorded.as_ref().is_some_and(|recorded| recorded.paused)) {
        return Ok(f(inputs.map(Tensor::detach).each_ref())?);
    }
    if ids.iter().all(Option::is_none) {
        return Ok(f(inputs)?);
    }
    // The result of another bridge is no variable to candle; a copy of it is.
    let variable = |x: &Tensor| match wanted(x) {
        Some(_) if !x.is_variable() => Ok(Var::from_tensor(x)?.into_inner()),
        _ => Ok(x.clone()),
    };
    let inputs = inputs.iter().map(|x| variable(x)).collect::<Result<Vec<_>>>()?;
    let result = f(std::array::from_fn(|i| &inputs[i]))?.contiguous()?;
    let detached = result.detach();
    let backward: Backward = Box::new(move |mut gradients| {
        let gradient = gradients.pop().flatten().expect("a node is reached through its only result").whole;
        let mut gradients = result.apply_op1(Seed(gradient))?.backward()?;
        let of = |input: &Tensor| Ok(gradients.remove(input).map_or_else(|| input.zeros_like(), Ok)?.into());
        inputs.iter().map(of).collect()
    });
    push(ids.to_vec(), std::slice::from_ref(&detached), backward);
    Ok(detached)
}

/// Attention of a layer, in `dtype`; for a recording with the attention's own way back, where it has one.
pub(crate) fn attend(attention: &mut dyn Attend, layer: usize, qkv: [&Tensor; 3], dtype: DType) -> Result<Tensor> {
    let ids = qkv.map(wanted);
    if ids.iter().any(Option::is_some) {
        let [q, k, v] = qkv.map(Tensor::detach);
        if let Some((out, backward)) = attention.attend_with_backward(layer, &q, &k, &v)? {
            let backward: Backward = Box::new(move |mut gradients| {
                let gradient = gradients.pop().flatten().expect("a node is reached through its only result");
                Ok(backward(&gradient.whole)?.map(Gradient::from).into())
            });
            push(ids.to_vec(), std::slice::from_ref(&out), backward);
            return Ok(out);
        }
    }
    bridge(qkv, |[q, k, v]| attention.attend(layer, q, k, v)?.to_dtype(dtype))
}

/// `f(x)`, of which a recording keeps x alone: on the way back f is called again, and gone back through. It gives the same both times, reads
/// these `parameters`, and is all that reads them and x.
pub(crate) fn recomputed(
    x: &Tensor,
    parameters: &[&Tensor],
    f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let inputs: Vec<Tensor> = [&[x], parameters].concat().into_iter().cloned().collect();
    let ids: Vec<_> = inputs.iter().map(wanted).collect();
    if ids.iter().all(Option::is_none) {
        return f(x);
    }
    let pause = |paused| {
        RECORDED.with_borrow_mut(|recorded| {
            let recorded = recorded.as_mut().expect("a recording wants these gradients");
            recorded.paused = paused;
            recorded.rounded.clone()
        })
    };
    let rounded = pause(true);
    let out = f(&x.detach());
    pause(false);
    let out = out?.detach();
    let backward: Backward = Box::new(move |mut gradients| {
        let gradient = gradients.pop().flatten().expect("a node is reached through its only result");
        let recording = Recording::start(&rounded);
        let x = inputs[0].detach();
        RECORDED.with_borrow_mut(|recorded| recorded.as_mut().expect("just started").bridged.insert(x.id()));
        let out = f(&x)?;
        let mut gradients = recording.back_from(&out, gradient)?;
        let of = |input: &Tensor| match gradients.remove(&input.id()) {
            Some(gradient) => Ok(gradient),
            None => Ok(input.zeros_like()?.into()),
        };
        std::iter::once(&x).chain(&inputs[1..]).map(of).collect()
    });
    push(ids, std::slice::from_ref(&out), backward);
    Ok(out)
}

/// Parts of x that `cut` makes without moving anything. For a recording `backward` makes the gradient of x of theirs, `None` for one that the
/// loss does not depend on.
#[cfg(feature = "cuda")]
pub(crate) fn parts<const N: usize>(
    x: &Tensor,
    cut: impl FnOnce(&Tensor) -> candle_core::Result<[Tensor; N]>,
    backward: impl Fn(Vec<Option<Tensor>>) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<[Tensor; N]> {
    let id = wanted(x);
    if id.is_none() {
        return Ok(cut(x)?);
    }
    let parts = cut(&x.detach())?;
    let backward: Backward = Box::new(move |gradients| {
        let gradients = gradients.into_iter().map(|gradient| gradient.map(|gradient| gradient.whole)).collect();
        Ok(vec![backward(gradients)?.into()])
    });
    push(vec![id], &parts, backward);
    Ok(parts)
}

/// Records what gave `outputs`, which are no variables to candle.
fn push(inputs: Vec<Option<TensorId>>, outputs: &[Tensor], backward: Backward) {
    RECORDED.with_borrow_mut(|recorded| {
        let recorded = recorded.as_mut().expect("a recording wants these gradients");
        let outputs: Vec<_> = outputs.iter().map(Tensor::id).collect();
        recorded.bridged.extend(&outputs);
        recorded.nodes.push(Node { inputs, outputs, backward, adds: false });
    });
}

/// The id of a tensor whose gradient a recording wants.
fn wanted(x: &Tensor) -> Option<TensorId> {
    RECORDED.with_borrow(|recorded| {
        let recorded = recorded.as_ref().filter(|recorded| !recorded.paused)?;
        (x.is_variable() || recorded.bridged.contains(&x.id())).then(|| x.id())
    })
}

/// A parameter in the type of the activations that it meets.
#[cfg(feature = "cuda")]
pub(crate) fn in_type(w: &Tensor, dtype: DType) -> Result<Tensor> {
    let rounded = RECORDED.with_borrow(|recorded| recorded.as_ref()?.rounded.0.get(&w.id()).cloned());
    match rounded {
        Some(rounded) if rounded.dtype() == dtype => Ok(rounded),
        _ => Ok(w.detach().to_dtype(dtype)?.contiguous()?),
    }
}

/// A function being recorded.
pub(crate) struct Tape {
    name: &'static str,
    way: Way,
    adds: bool,
}

enum Way {
    Recorded(Vec<Option<TensorId>>),
    Candle { token: Tensor, input_grads: Slots },
}

impl Tape {
    pub fn new(name: &'static str, inputs: &[&Tensor]) -> Result<Self> {
        if is_recording() {
            let ids = inputs.iter().map(|input| {
                assert!(input.is_variable() || !input.track_op(), "{name}: an input that was not bridged");
                wanted(input)
            });
            return Ok(Self { name, way: Way::Recorded(ids.collect()), adds: false });
        }
        let input_grads: Slots = Arc::new(Mutex::new(vec![None; inputs.len()]));
        let mut token = Tensor::zeros((), DType::F32, inputs[0].device())?;
        for (index, input) in inputs.iter().enumerate() {
            token = token.apply_op2(input, Tie { name, index, grads: input_grads.clone() })?;
        }
        Ok(Self { name, way: Way::Candle { token, input_grads }, adds: false })
    }

    /// Whether a gradient of the results can be asked for: what only the backward needs is worth keeping only then.
    pub fn tracked(&self) -> bool {
        match &self.way {
            Way::Recorded(inputs) => inputs.iter().any(Option::is_some),
            Way::Candle { token, .. } => token.track_op(),
        }
    }

    /// Whether the gradient of an input can be asked for. For one of which it can't, `backward` gives any tensor.
    pub fn wants(&self, input: &Tensor) -> bool {
        match &self.way {
            Way::Recorded(_) => wanted(input).is_some(),
            Way::Candle { .. } => input.track_op(),
        }
    }

    /// Ends the recording with the `outputs`. `backward` takes the gradient of each output, `None` for one that the loss does
    /// not depend on, and gives the gradient of each input.
    pub fn finish<const N: usize>(
        self,
        outputs: [Output; N],
        backward: impl Fn(Vec<Option<Tensor>>) -> Result<Vec<Tensor>> + Send + Sync + 'static,
    ) -> Result<[Tensor; N]> {
        self.end(outputs, move |grads| {
            let grads = grads.into_iter().map(|grad| grad.map(|grad| grad.whole)).collect();
            Ok(backward(grads)?.into_iter().map(Gradient::from).collect())
        })
    }

    /// [`Tape::finish`] for a function with one result.
    pub fn finish_one(
        self,
        output: Output,
        backward: impl Fn(Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let [tensor] = self.finish([output], move |mut grads| {
            backward(grads.pop().flatten().expect("the hub is reached through its only result"))
        })?;
        Ok(tensor)
    }

    /// [`Tape::finish`] for a function that looks at what else comes with the gradients.
    #[cfg(feature = "cuda")]
    pub fn finish_rounded<const N: usize>(
        self,
        outputs: [Output; N],
        backward: impl Fn(Vec<Option<Gradient>>) -> Result<Vec<Gradient>> + Send + Sync + 'static,
    ) -> Result<[Tensor; N]> {
        self.end(outputs, backward)
    }

    /// [`Tape::finish_one`] for a function that adds the gradient of its first input to what there is of it so far, if anything. Nobody
    /// else reads that any more.
    #[cfg(feature = "cuda")]
    pub fn finish_adding(
        mut self,
        output: Output,
        backward: impl Fn(Tensor, Option<Tensor>) -> Result<Vec<Gradient>> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        self.adds = true;
        let [tensor] = self.end([output], move |grads| {
            let mut grads = grads.into_iter().map(|grad| grad.map(|grad| grad.whole));
            let grad = grads.next().flatten().expect("the hub is reached through its only result");
            backward(grad, grads.next().flatten())
        })?;
        Ok(tensor)
    }

    fn end<const N: usize>(
        self,
        outputs: [Output; N],
        backward: impl Fn(Vec<Option<Gradient>>) -> Result<Vec<Gradient>> + Send + Sync + 'static,
    ) -> Result<[Tensor; N]> {
        let tracked = self.tracked();
        let (token, input_grads) = match self.way {
            Way::Candle { token, input_grads } => (token, input_grads),
            Way::Recorded(inputs) => {
                let tensors = outputs
                    .map(|Output { storage, shape }| Tensor::from_storage(storage, shape, BackpropOp::none(), tracked));
                if tracked {
                    let outputs = tensors.iter().map(Tensor::id).collect();
                    let node = Node { inputs, outputs, backward: Box::new(backward), adds: self.adds };
                    RECORDED.with_borrow_mut(|recorded| recorded.as_mut().expect("a recording").nodes.push(node));
                }
                return Ok(tensors);
            }
        };
        let output_grads: Slots = Arc::new(Mutex::new(vec![None; N]));
        let hub =
            Hub { name: self.name, output_grads: output_grads.clone(), input_grads, backward: Box::new(backward) };
        let hub = token.apply_op1(hub)?;
        let mut index = 0;
        let outputs = outputs.map(|output| {
            let out = Out { name: self.name, index, grads: output_grads.clone(), output: Mutex::new(Some(output)) };
            index += 1;
            hub.apply_op1(out)
        });
        let mut tensors = Vec::with_capacity(N);
        for output in outputs {
            tensors.push(output?);
        }
        Ok(tensors.try_into().expect("one tensor for each of the N outputs"))
    }
}
