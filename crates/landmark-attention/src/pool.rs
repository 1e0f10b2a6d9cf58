//! Frames on the device that computes, for blocks that are kept elsewhere: they are filled before blocks are read, and filled again with others.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

#[cfg(feature = "cuda")]
use crate::cuda::pool::Staging;
use crate::{Error, Result};

const OP: &str = "pool";
/// Bytes that are written at once and then go to the device.
const BATCH: usize = 16 << 20;

/// Frames for the keys and values of one block and head each, that [`crate::retrieval::attend`] reads as
/// [`Kept::Pool`](crate::retrieval::Kept::Pool).
#[derive(Debug)]
pub struct Pool {
    /// `[frames, block, head_dim]` each.
    keys: Tensor,
    values: Tensor,
    #[cfg(feature = "cuda")]
    staging: Staging,
}

impl Pool {
    /// A pool of so many frames of `[block, head_dim]` keys and as many values, all zeros.
    ///
    /// # Errors
    /// No frames; not so much memory on the device.
    pub fn new(frames: usize, block: usize, head_dim: usize, dtype: DType, device: &Device) -> Result<Self> {
        if frames == 0 || u32::try_from(frames).is_err() {
            let expected = "1 to 2^32 - 1";
            return Err(Error::Param { op: OP, name: "frames", got: frames.to_string(), expected });
        }
        let zeros = || Tensor::zeros((frames, block, head_dim), dtype, device);
        Ok(Self {
            keys: zeros()?,
            values: zeros()?,
            #[cfg(feature = "cuda")]
            staging: Staging::default(),
        })
    }

    /// Frames.
    pub fn frames(&self) -> usize {
        self.keys.dims()[0]
    }

    /// Bytes of a frame: keys, then values, `[block, head_dim]` each in the pool's dtype.
    pub fn frame_bytes(&self) -> usize {
        self.bytes() / self.frames()
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        2 * self.keys.elem_count() * self.keys.dtype().size_in_bytes()
    }

    /// Keys and values, `[frames, block, head_dim]` each.
    pub(crate) fn tensors(&self) -> [&Tensor; 2] {
        [&self.keys, &self.values]
    }

    /// Fills these frames. `write(range, bytes)` is called for runs of them and writes what goes into the frames `frames[range]`, one after the
    /// other, each as [`Self::frame_bytes`] says, in the machine's byte order. What was launched before reads what was there before. On a GPU nothing is
    /// waited for but the copy of the run before the last one.
    ///
    /// # Errors
    /// A frame that is none of the pool's; a device that fails.
    pub fn fill(&mut self, frames: &[u32], mut write: impl FnMut(Range<usize>, &mut [u8])) -> Result<()> {
        if let Some(frame) = frames.iter().find(|&&frame| frame as usize >= self.frames()) {
            let got = format!("{frame} of {}", self.frames());
            return Err(Error::Param { op: OP, name: "frames", got, expected: "frames of the pool" });
        }
        let bytes = self.frame_bytes();
        let run = (BATCH / bytes).max(1);
        for (i, frames) in frames.chunks(run).enumerate() {
            let range = i * run..i * run + frames.len();
            #[cfg(feature = "cuda")]
            if self.keys.device().is_cuda() {
                self.staging.fill([&self.keys, &self.values], frames, bytes, |bytes| write(range, bytes))?;
                continue;
            }
            let mut buffer = vec![0; frames.len() * bytes];
            write(range, &mut buffer);
            for (&frame, unit) in frames.iter().zip(buffer.chunks_exact(bytes)) {
                for (part, bytes) in self.tensors().into_iter().zip(unit.chunks_exact(bytes / 2)) {
                    let dims = [&[1], &part.dims()[1..]].concat();
                    let new = Tensor::from_raw_buffer(bytes, part.dtype(), &dims, part.device())?;
                    part.slice_set(&new, 0, frame as usize)?;
                }
            }
        }
        Ok(())
    }
}
