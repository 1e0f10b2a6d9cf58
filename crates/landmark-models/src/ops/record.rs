//! Functions of any number of tensors to any number of tensors, as nodes of candle's graph.
//!
//! candle's own custom operations take at most three tensors and give one. A function here is recorded as
//!
//! ```text
//! input 0 -- Tie --.                       .-- Out 0 (a result)
//!                  Tie -- ... -- Hub ------+
//! input 1 ---------'                       '-- Out 1 (a result)
//! ```
//!
//! where everything between the inputs and the results is a single number, there only to give the graph its order. Going
//! back, each `Out` leaves the gradient of its result in a slot; the `Hub`, reached after all of them, calls the function's
//! backward and leaves the gradients of the inputs in slots; each `Tie` hands its input the gradient from there.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, DType, Layout, Shape, Storage, Tensor, WithDType};

use crate::Result;

type Slots = Arc<Mutex<Vec<Option<Tensor>>>>;
type Backward = Box<dyn Fn(Vec<Option<Tensor>>) -> Result<Vec<Tensor>> + Send + Sync>;

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

/// A function being recorded.
pub(crate) struct Tape {
    name: &'static str,
    token: Tensor,
    input_grads: Slots,
}

impl Tape {
    pub fn new(name: &'static str, inputs: &[&Tensor]) -> Result<Self> {
        let input_grads: Slots = Arc::new(Mutex::new(vec![None; inputs.len()]));
        let mut token = Tensor::zeros((), DType::F32, inputs[0].device())?;
        for (index, input) in inputs.iter().enumerate() {
            token = token.apply_op2(input, Tie { name, index, grads: input_grads.clone() })?;
        }
        Ok(Self { name, token, input_grads })
    }

    /// Whether a gradient of the results can be asked for: what only the backward needs is worth keeping only then.
    pub fn tracked(&self) -> bool {
        self.token.track_op()
    }

    /// Ends the recording with the `outputs`. `backward` takes the gradient of each output, `None` for one that the loss does
    /// not depend on, and gives the gradient of each input.
    pub fn finish<const N: usize>(
        self,
        outputs: [Output; N],
        backward: impl Fn(Vec<Option<Tensor>>) -> Result<Vec<Tensor>> + Send + Sync + 'static,
    ) -> Result<[Tensor; N]> {
        let output_grads: Slots = Arc::new(Mutex::new(vec![None; N]));
        let hub = Hub {
            name: self.name,
            output_grads: output_grads.clone(),
            input_grads: self.input_grads,
            backward: Box::new(backward),
        };
        let hub = self.token.apply_op1(hub)?;
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
}

/// The slots, also after a panic elsewhere: they hold whole values at all times.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number that orders the graph.
fn token() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.]), Shape::from(()))
}

/// The same on a GPU.
#[cfg(feature = "cuda")]
fn gpu_token(beside: &CudaStorage) -> candle_core::Result<(CudaStorage, Shape)> {
    use candle_core::backend::BackendStorage;
    let device = beside.device();
    // SAFETY: nobody reads the number.
    let token = unsafe { device.alloc::<f32>(1)? };
    Ok((CudaStorage::wrap_cuda_slice(token, device.clone()), Shape::from(())))
}

struct Tie {
    name: &'static str,
    index: usize,
    grads: Slots,
}

impl CustomOp2 for Tie {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(token())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        token: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        gpu_token(token)
    }

    fn bwd(
        &self,
        _token: &Tensor,
        input: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        // An input that no gradient is wanted of is spared candle's accumulation.
        let input_grad = lock(&self.grads)[self.index].take().filter(|_| input.track_op());
        Ok((Some(grad.clone()), input_grad))
    }
}

struct Hub {
    name: &'static str,
    output_grads: Slots,
    input_grads: Slots,
    backward: Backward,
}

impl CustomOp1 for Hub {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(token())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, token: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        gpu_token(token)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let output_grads = lock(&self.output_grads).iter_mut().map(Option::take).collect();
        let grads = (self.backward)(output_grads)?;
        let mut slots = lock(&self.input_grads);
        assert_eq!(slots.len(), grads.len(), "{}: one gradient for each input", self.name);
        for (slot, grad) in slots.iter_mut().zip(grads) {
            *slot = Some(grad);
        }
        Ok(Some(grad.clone()))
    }
}

struct Out {
    name: &'static str,
    index: usize,
    grads: Slots,
    /// Taken by the forward pass, which runs once, when the node is made.
    output: Mutex<Option<Output>>,
}

impl CustomOp1 for Out {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        match lock(&self.output).take() {
            Some(Output { storage: Storage::Cpu(storage), shape }) => Ok((storage, shape)),
            _ => candle_core::bail!("{}: the forward pass runs once, where its result is", self.name),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        match lock(&self.output).take() {
            Some(Output { storage: Storage::Cuda(storage), shape }) => Ok((storage, shape)),
            _ => candle_core::bail!("{}: the forward pass runs once, where its result is", self.name),
        }
    }

    fn bwd(&self, hub: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        lock(&self.grads)[self.index] = Some(grad.contiguous()?);
        Ok(Some(hub.zeros_like()?))
    }
}
