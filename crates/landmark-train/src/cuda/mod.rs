//! The optimizer's step on an NVIDIA GPU: AdamW over all parameters in one launch, in f32.

mod numbers;

use std::ffi::{CStr, c_char, c_int, c_void};

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice, WrapErr};
use candle_core::{DType, Result, Storage, Tensor, Var, bail};

pub(crate) use numbers::Numbers;

/// Elements that one block of threads takes, as in `optimizer.cu`.
const PIECE: usize = 16_384;

/// A parameter, its gradient, its moments and its copy, as `optimizer.cu` has them.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Entry {
    p: u64,
    g: u64,
    m: u64,
    v: u64,
    rounded: u64,
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
    /// A copy in bf16.
    pub rounded: Option<&'a Tensor>,
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
            let Operands { var, gradient, moments: [m, v], rounded, keep } = operands;
            let n = if gradient.is_some() { var.elem_count() as i64 } else { 0 };
            let g = gradient.map_or(Ok(0), |g| address(g, DType::F32))?;
            let rounded = rounded.map_or(Ok(0), |copy| address(copy, DType::BF16))?;
            let [p, m, v] = [var.as_tensor(), m, v].map(|x| address(x, DType::F32));
            Ok(Entry { p: p?, g, m: m?, v: v?, rounded, n, keep: *keep as f32, unused: 0. })
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
                let n = sum.elem_count() as i64;
                (entry.p, entry.g, entry.n) = (address(sum, DType::F32)?, address(gradient, DType::F32)?, n);
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

/// Elements that a kernel takes at once: an address must be aligned to so many.
const PACK: usize = 4;

/// A gradient where the kernels can read it.
pub(crate) fn aligned(gradient: Tensor) -> Result<Tensor> {
    match gradient.is_contiguous() && gradient.layout().start_offset().is_multiple_of(PACK) {
        true => Ok(gradient),
        false => gradient.force_contiguous(),
    }
}

/// The address of a contiguous tensor of this type; valid for kernels that are launched while the tensor lives, as all are on one stream.
fn address(x: &Tensor, dtype: DType) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cuda(storage), Some((start, _))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("an optimizer step on a GPU needs contiguous tensors there")
    };
    if !start.is_multiple_of(PACK) {
        bail!("an optimizer step on a GPU needs tensors that are aligned to {PACK} elements")
    }
    let address = match (&storage.slice, dtype) {
        (CudaStorageSlice::F32(x), DType::F32) => x.device_ptr(x.stream()).0,
        (CudaStorageSlice::BF16(x), DType::BF16) => x.device_ptr(x.stream()).0,
        _ => bail!("an optimizer step on a GPU needs {dtype:?} where it has {:?}", x.dtype()),
    };
    Ok(address + (start * dtype.size_in_bytes()) as u64)
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
