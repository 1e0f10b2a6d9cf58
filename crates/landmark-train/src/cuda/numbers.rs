//! Numbers on their way from a GPU.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, PinnedHostSlice};
use candle_core::{Result, Storage, Tensor, bail};

/// The losses of a step. Reading one waits for what was launched before it was sent, and for nothing that was launched since: the GPU goes on
/// with the way back while the next step is launched.
#[derive(Default)]
pub(crate) struct Numbers {
    places: Vec<Place>,
    sent: usize,
}

struct Place {
    /// Memory that the GPU can write while the processor does something else.
    number: PinnedHostSlice<f32>,
    /// When it has.
    written: CudaEvent,
}

impl Numbers {
    /// Forgets what was sent and not taken, by a step that failed.
    pub fn restart(&mut self) {
        self.sent = 0;
    }

    /// Sends a scalar of f32 on its way.
    pub fn send(&mut self, x: &Tensor) -> Result<()> {
        let stream = x.device().as_cuda_device()?.cuda_stream();
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("a number that is not on a GPU") };
        let from = storage.as_cuda_slice::<f32>()?.slice(layout.start_offset()..layout.start_offset() + 1);
        if self.sent == self.places.len() {
            // SAFETY: it is written before it is read: `take` waits for that.
            let number = unsafe { stream.context().alloc_pinned(1).w()? };
            self.places.push(Place { number, written: stream.context().new_event(None).w()? });
        }
        let Place { number, written } = &mut self.places[self.sent];
        stream.memcpy_dtoh(&from, number).w()?;
        written.record(&stream).w()?;
        self.sent += 1;
        Ok(())
    }

    /// The numbers that were sent since they were last taken.
    pub fn take(&mut self) -> Result<Vec<f64>> {
        let sent = &self.places[..std::mem::take(&mut self.sent)];
        let read = |Place { number, written }: &Place| {
            written.synchronize().w()?;
            Ok(number.as_slice().w()?[0] as f64)
        };
        sent.iter().map(read).collect()
    }
}
