//! The optimizer's step on an NVIDIA GPU: AdamW over all parameters in one launch, in f32.

use std::ffi::{CStr, c_char, c_int, c_void};

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{DType, Result, Storage, Tensor, Var, bail};

/// Elements that one block of threads takes, as in `optimizer.cu`.
const PIECE: usize = 65_536;

/// A parameter, its gradient and its moments, as `optimizer.cu` has them.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Entry {
    p: u64,
    g: u64,
    m: u64,
    v: u64,
    n: i64,
    keep: f32,
    unused: f32,
}

/// The numbers of a step, as `optimizer.cu` has them.
#[repr(C)]
pub(crate) struct Step {
    pub beta2: f32,
    pub one_less_beta1: f32,
    pub one_less_beta2: f32,
    pub step_size: f32,
    pub root: f32,
    pub eps: f32,
}

/// The parameters of one optimizer, cut into pieces.
pub(crate) struct Pieces {
    device: CudaDevice,
    pieces: CudaSlice<u32>,
    n: usize,
    partial: CudaSlice<f64>,
    norm_and_scale: CudaSlice<f32>,
}

/// What one parameter is stepped with.
pub(crate) struct Operands<'a> {
    pub var: &'a Var,
    pub gradient: Option<&'a Tensor>,
    pub moments: [&'a Tensor; 2],
    pub keep: f64,
}

impl Pieces {
    /// For parameters of these numbers of elements.
    pub fn new(device: &CudaDevice, sizes: &[usize]) -> Result<Self> {
        let of =
            |(entry, size): (usize, &usize)| (0..size.div_ceil(PIECE)).map(move |index| [entry as u32, index as u32]);
        let pieces: Vec<u32> = sizes.iter().enumerate().flat_map(of).flatten().collect();
        let n = pieces.len() / 2;
        Ok(Self {
            device: device.clone(),
            pieces: device.clone_htod(&pieces)?,
            n,
            partial: device.alloc_zeros(n)?,
            norm_and_scale: device.alloc_zeros(2)?,
        })
    }

    /// One AdamW step. With a `limit` the gradients' norm is bounded by it, and returned as it was before.
    pub fn adamw(&self, operands: &[Operands], step: &Step, limit: Option<f64>) -> Result<Option<f64>> {
        let entry = |operands: &Operands| -> Result<Entry> {
            let Operands { var, gradient, moments: [m, v], keep } = operands;
            let n = if gradient.is_some() { var.elem_count() as i64 } else { 0 };
            let g = gradient.map_or(Ok(0), address)?;
            Ok(Entry { p: address(var)?, g, m: address(m)?, v: address(v)?, n, keep: *keep as f32, unused: 0. })
        };
        let entries = operands.iter().map(entry).collect::<Result<Vec<_>>>()?;
        let stream = self.device.cuda_stream();
        let (partial, norm) = (self.partial.device_ptr(&stream).0, self.norm_and_scale.device_ptr(&stream).0);
        // SAFETY: every address is that of a live tensor of its entry's size, the pieces are theirs.
        self.launch(&entries, |entries, pieces, n, stream| unsafe {
            landmark_adamw(entries, pieces, n, step, limit.unwrap_or(0.), partial, norm, stream)
        })?;
        limit.map(|_| Ok(self.device.clone_dtoh(&self.norm_and_scale)?[0] as f64)).transpose()
    }

    /// Adds to each sum its gradient, where there is one.
    pub fn add(&self, operands: &[Option<(&Tensor, &Tensor)>]) -> Result<()> {
        let entry = |operands: &Option<(&Tensor, &Tensor)>| -> Result<Entry> {
            let mut entry: Entry = bytemuck::Zeroable::zeroed();
            if let Some((sum, gradient)) = operands {
                (entry.p, entry.g, entry.n) = (address(sum)?, address(gradient)?, sum.elem_count() as i64);
            }
            Ok(entry)
        };
        let entries = operands.iter().map(entry).collect::<Result<Vec<_>>>()?;
        // SAFETY: as in `adamw`.
        self.launch(&entries, |entries, pieces, n, stream| unsafe {
            landmark_add_gradients(entries, pieces, n, stream)
        })
    }

    fn launch(&self, entries: &[Entry], kernel: impl FnOnce(u64, u64, c_int, *mut c_void) -> c_int) -> Result<()> {
        let stream = self.device.cuda_stream();
        let entries = self.device.clone_htod(bytemuck::cast_slice::<_, u8>(entries))?;
        let addresses = (entries.device_ptr(&stream).0, self.pieces.device_ptr(&stream).0);
        stream.context().bind_to_thread().w()?;
        match kernel(addresses.0, addresses.1, self.n as c_int, stream.cu_stream().cast()) {
            0 => Ok(()),
            code => {
                // SAFETY: the function returns a static string for any code.
                let reason = unsafe { CStr::from_ptr(landmark_optimizer_error(code)) };
                bail!("the optimizer's step: CUDA error {code}: {}", reason.to_string_lossy())
            }
        }
    }
}

/// The address of a contiguous f32 tensor; valid for kernels that are launched while the tensor lives, as all are on one stream.
fn address(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cuda(storage), Some((start, _)), DType::F32) = (&*storage, layout.contiguous_offsets(), x.dtype())
    else {
        bail!("an optimizer step on a GPU needs contiguous f32 tensors there")
    };
    let slice = storage.as_cuda_slice::<f32>()?;
    Ok(slice.device_ptr(slice.stream()).0 + (start * size_of::<f32>()) as u64)
}

unsafe extern "C" {
    fn landmark_adamw(
        entries: u64,
        pieces: u64,
        n: c_int,
        step: *const Step,
        limit: f64,
        partial: u64,
        norm_and_scale: u64,
        stream: *mut c_void,
    ) -> c_int;
    fn landmark_add_gradients(entries: u64, pieces: u64, n: c_int, stream: *mut c_void) -> c_int;
    fn landmark_optimizer_error(code: c_int) -> *const c_char;
}
