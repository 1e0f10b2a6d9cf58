//! What goes into the frames of a pool: page-locked memory, one copy, and a kernel that puts each unit into its frame.

use candle_core::Tensor;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtrMut, PinnedHostSlice, result,
};

use super::params::{self, PlaceParams};
use super::retrieval::{address, launch};

/// Bytes of a buffer at least.
const SMALLEST: usize = 1 << 20;

/// Buffers that are kept from call to call. One of the page-locked ones is written while the other is still copied; the one on the GPU is read before
/// the next copy begins, as both are in the stream.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    locked: [Option<Locked>; 2],
    next: usize,
    on_device: Option<CudaSlice<u8>>,
}

/// Page-locked memory. cudarc has an event for it too, which it records only in contexts with streams of their own: not in candle's.
#[derive(Debug)]
struct Locked {
    memory: PinnedHostSlice<u8>,
    /// What was in it is on the GPU.
    copied: CudaEvent,
}

impl Locked {
    fn new(bytes: usize, stream: &CudaStream) -> candle_core::Result<Self> {
        // SAFETY: what is copied of it was written before, in `fill`.
        let memory = unsafe { stream.context().alloc_pinned(bytes).w()? };
        Ok(Self { memory, copied: stream.context().new_event(None).w()? })
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Memory that is still read must not go. A GPU that fails reads no more.
        let _ = self.copied.synchronize();
    }
}

impl Staging {
    /// Writes units of so many bytes, half of them keys and half values, and sees to it that they come into these frames of `[keys, values]`.
    pub fn fill(
        &mut self,
        [keys, values]: [&Tensor; 2],
        frames: &[u32],
        bytes: usize,
        write: impl FnOnce(&mut [u8]),
    ) -> candle_core::Result<()> {
        let device = keys.device().as_cuda_device()?;
        let stream = device.cuda_stream();
        // The numbers of the frames, then the units.
        let head = (4 * frames.len()).next_multiple_of(16);
        let length = head + frames.len() * bytes;
        let locked = &mut self.locked[self.next];
        self.next = 1 - self.next;
        if locked.as_ref().is_none_or(|locked| locked.memory.len() < length) {
            *locked = Some(Locked::new(length.next_power_of_two().max(SMALLEST), &stream)?);
        }
        let Some(Locked { memory, copied }) = locked else { candle_core::bail!("pool: no page-locked memory") };
        if self.on_device.as_ref().is_none_or(|on_device| on_device.len() < length) {
            // SAFETY: kernels read what was copied there.
            self.on_device = Some(unsafe { device.alloc::<u8>(length.next_power_of_two().max(SMALLEST))? });
        }
        let Some(on_device) = &mut self.on_device else { candle_core::bail!("pool: no memory on the GPU") };
        copied.synchronize().w()?;
        let buffer = &mut memory.as_mut_slice().w()?[..length];
        for (bytes, frame) in buffer.chunks_exact_mut(4).zip(frames) {
            bytes.copy_from_slice(&frame.to_ne_bytes());
        }
        write(&mut buffer[head..]);
        let (units, _guard) = on_device.device_ptr_mut(&stream);
        stream.context().bind_to_thread().w()?;
        // SAFETY: both are at least `length` bytes long, and the event tells when the buffer may be written again.
        unsafe { result::memcpy_htod_async(units, buffer, stream.cu_stream()).w()? };
        copied.record(&stream).w()?;
        let params = PlaceParams {
            units: units + head as u64,
            frames: units,
            keys: address(keys)?,
            values: address(values)?,
            part_bytes: (bytes / 2) as i64,
            count: frames.len() as i32,
            reserved: 0,
        };
        // SAFETY: `count` units and as many numbers of frames were copied; the caller compared the numbers with the pool's frames.
        launch("pool", keys, |stream| unsafe { params::landmark_place(&params, stream) })
    }
}
