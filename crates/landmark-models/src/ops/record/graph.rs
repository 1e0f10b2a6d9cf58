//! What a function of many tensors is in candle's graph, whose custom operations take at most three tensors and give one:
//!
//! ```text
//! input 0 -- Tie --.                       .-- Out 0 (a result)
//!                  Tie -- ... -- Hub ------+
//! input 1 ---------'                       '-- Out 1 (a result)
//! ```
//!
//! Everything between the inputs and the results is a single number, there only to give the graph its order. Going
//! back, each `Out` leaves the gradient of its result in a slot; the `Hub`, reached after all of them, calls the function's
//! backward and leaves the gradients of the inputs in slots; each `Tie` hands its input the gradient from there.

use std::sync::{Arc, Mutex, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Storage, Tensor};

use super::{Backward, Gradient, Output};

pub type Slots = Arc<Mutex<Vec<Option<Tensor>>>>;

/// The end of a graph whose gradient is known.
pub struct Seed(pub Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(token())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, beside: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        gpu_token(beside)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
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

pub struct Tie {
    pub name: &'static str,
    pub index: usize,
    pub grads: Slots,
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

pub struct Hub {
    pub name: &'static str,
    pub output_grads: Slots,
    pub input_grads: Slots,
    pub backward: Backward,
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
        let output_grads = lock(&self.output_grads).iter_mut().map(|grad| grad.take().map(Gradient::from)).collect();
        let grads = (self.backward)(output_grads)?;
        let mut slots = lock(&self.input_grads);
        assert_eq!(slots.len(), grads.len(), "{}: one gradient for each input", self.name);
        for (slot, grad) in slots.iter_mut().zip(grads) {
            *slot = Some(grad.whole);
        }
        Ok(Some(grad.clone()))
    }
}

pub struct Out {
    pub name: &'static str,
    pub index: usize,
    pub grads: Slots,
    /// Taken by the forward pass, which runs once, when the node is made.
    pub output: Mutex<Option<Output>>,
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
