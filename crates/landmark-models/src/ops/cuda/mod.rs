//! The operations on NVIDIA GPUs: f32, or bf16 with f32 parameters, which is the reference's `autocast`.
//!
//! With activations in bf16 the residual stream, the parameters and their gradients, every sum and the loss are f32; matrix products take
//! bf16 and sum in f32; what they give, but for what goes onto the residual stream, is rounded to bf16, as are the logits. PyTorch's
//! autocast differs in one place: it rounds to bf16 before it adds to the residual stream.
//!
//! - `gemm`: matrix products, by cuBLASLt; `tune` chooses its algorithms;
//! - `norm`: normalisation, `norm.cu` its kernels;
//! - `layers`: the other operations of a layer and the embedding, `layers.cu` its kernels;
//! - `loss`: the cross entropy, `loss.cu` its kernels;
//! - this file: memory that kernels read and write.

mod gemm;
mod layers;
mod loss;
mod norm;
mod tune;

use std::ffi::{CStr, c_char, c_int};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Shape, Storage, Tensor};

use super::record::Output;
use crate::{Error, Result};

pub use layers::{embedding, join_heads, linear, linears, merge_heads, mlp, project_heads, split_heads, swiglu};
pub use loss::{cross_entropy, token_scores};
pub use norm::norm;

/// An address on a GPU.
type Address = u64;

/// Element types, as `common.cuh` numbers them.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ElementType {
    F32 = 0,
    Bf16 = 1,
}

impl ElementType {
    fn of(op: &'static str, tensor: &'static str, dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Self::F32),
            DType::BF16 => Ok(Self::Bf16),
            got => Err(Error::DType { op, tensor, got, expected: "f32 or bf16 on a GPU".into() }),
        }
    }

    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    fn bytes(self) -> usize {
        self.dtype().size_in_bytes()
    }
}

/// The address of a contiguous tensor on a GPU.
///
/// Reads and writes through it are in the order of the device's one stream, on which the tensor's memory is freed as well: it is valid
/// for every kernel that is launched while the tensor lives.
fn address(op: &'static str, tensor: &'static str, x: &Tensor) -> Result<Address> {
    if !x.is_contiguous() {
        let got = format!("strided {:?}", x.stride());
        return Err(Error::Value { op, name: tensor, got, expected: "contiguous".into() });
    }
    start(op, tensor, x)
}

/// The address of the first element of a tensor on a GPU, whose other elements are where its strides say; valid as [`address`] is.
fn start(op: &'static str, tensor: &'static str, x: &Tensor) -> Result<Address> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Device { op, tensor, got: format!("{:?}", x.device().location()) });
    };
    Ok(storage_address(storage) + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
}

fn storage_address(storage: &CudaStorage) -> Address {
    fn of<T>(slice: &CudaSlice<T>) -> Address {
        slice.device_ptr(slice.stream()).0
    }
    match &storage.slice {
        CudaStorageSlice::F32(x) => of(x),
        CudaStorageSlice::BF16(x) => of(x),
        CudaStorageSlice::U32(x) => of(x),
        CudaStorageSlice::U8(x) => of(x),
        _ => unreachable!("kernels take f32, bf16, u32 and u8"),
    }
}

/// Memory that a kernel is about to write all of.
struct Fresh {
    storage: CudaStorage,
    shape: Shape,
    address: Address,
}

impl Fresh {
    fn new(device: &CudaDevice, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        // SAFETY: the caller's kernel writes every element before anything reads it.
        let storage = unsafe { device.alloc_uninit(&shape, dtype)? };
        let address = storage_address(&storage);
        Ok(Self { storage, shape, address })
    }

    fn tensor(self) -> Tensor {
        Tensor::from_storage(Storage::Cuda(self.storage), self.shape, BackpropOp::none(), false)
    }

    fn output(self) -> Output {
        Output::on_gpu(self.storage, self.shape)
    }
}

/// Calls `launch` with the device's stream, and turns its CUDA error into ours.
fn run(op: &'static str, device: &CudaDevice, launch: impl FnOnce(*mut CudaStream_) -> c_int) -> Result<()> {
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().w()?;
    match launch(stream.cu_stream().cast()) {
        0 => Ok(()),
        code => {
            // SAFETY: the function returns a static string for any code.
            let reason = unsafe { CStr::from_ptr(landmark_layers_error(code)) };
            Err(candle_core::Error::Msg(format!("{op}: CUDA error {code}: {}", reason.to_string_lossy())).into())
        }
    }
}

/// A stream, to the kernels.
type CudaStream_ = std::ffi::c_void;

unsafe extern "C" {
    fn landmark_layers_error(code: c_int) -> *const c_char;
}
