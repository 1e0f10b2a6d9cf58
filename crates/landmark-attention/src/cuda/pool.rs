//! What goes into the frames of a pool: page-locked memory, one copy, and a kernel that puts each unit into its frame.

use candle_core::Tensor;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtrMut, HostSlice, PinnedHostSlice, result};

use super::params::{self, PlaceParams};
use super::retrieval::{address, launch};

/// Bytes of a buffer at least.
const SMALLEST: usize = 1 << 20;

/// Buffers that are kept from call to call. One of the page-locked ones is written while the other is still copied; the one on the GPU is read before
/// the next copy begins, as both are in the stream.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    locked: [Option<PinnedHostSlice<u8>>; 2],
    next: usize,
    on_device: Option<CudaSlice<u8>>,
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
        if locked.as_ref().is_none_or(|locked| locked.len() < length) {
            // SAFETY: what is copied of it was written before, below.
            let new = unsafe { stream.context().alloc_pinned(length.next_power_of_two().max(SMALLEST)).w()? };
            *locked = Some(new);
        }
        let Some(locked) = locked else { candle_core::bail!("pool: no page-locked memory") };
        if self.on_device.as_ref().is_none_or(|on_device| on_device.len() < length) {
            // SAFETY: kernels read what was copied there.
            self.on_device = Some(unsafe { device.alloc::<u8>(length.next_power_of_two().max(SMALLEST))? });
        }
        let Some(on_device) = &mut self.on_device else { candle_core::bail!("pool: no memory on the GPU") };
        // Waits until what was in it before is copied.
        let buffer = &mut locked.as_mut_slice().w()?[..length];
        for (bytes, frame) in buffer.chunks_exact_mut(4).zip(frames) {
            bytes.copy_from_slice(&frame.to_ne_bytes());
        }
        write(&mut buffer[head..]);
        let (units, _guard) = on_device.device_ptr_mut(&stream);
        // SAFETY: the buffer is used with this stream alone, and the guard tells it when the copy is done; the copy's source and destination
        // are at least `length` bytes long.
        unsafe {
            stream.context().bind_to_thread().w()?;
            let (source, _copied) = locked.stream_synced_slice(&stream);
            result::memcpy_htod_async(units, &source[..length], stream.cu_stream()).w()?;
        }
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
