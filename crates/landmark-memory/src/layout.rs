//! Where the blocks of a chunk are.

use candle_core::{Device, Tensor};
use landmark_attention::Landmarks;

use crate::{Error, Result};

/// The ordinary tokens of the blocks that end in a chunk of `time` tokens, after `unfinished` tokens of the first.
pub fn block_sizes(follows: &[bool], time: usize, unfinished: usize, mem_freq: usize) -> Result<Vec<u32>> {
    if follows.len() != time {
        let got = format!("landmarks are given for {} tokens", follows.len());
        return Err(Error::Landmarks { got, expected: format!("for the {time} of the chunk") });
    }
    let (mut sizes, mut size) = (Vec::new(), unfinished);
    for &follows in follows {
        size += 1;
        if size > mem_freq {
            let got = format!("a block of more than {mem_freq} tokens");
            return Err(Error::Landmarks { got, expected: "a landmark after mem_freq tokens at the latest".into() });
        }
        if follows {
            sizes.push(size as u32);
            size = 0;
        }
    }
    Ok(sizes)
}

/// Where the blocks are in the unfinished block and the chunk after it.
pub struct Layout {
    /// The landmarks among the rows.
    pub landmarks: Landmarks,
    /// The landmarks' rows: one of each finished block.
    pub landmark_rows: Vec<u32>,
    /// Rows of the finished blocks.
    pub rows: usize,
    /// The row of each position of the places that they are stored in, if some are shorter than their place.
    pub stored: Option<Tensor>,
}

impl Layout {
    /// For finished blocks of so many ordinary tokens in `time` rows.
    pub fn new(sizes: &[u32], batch: usize, time: usize, mem_freq: usize, device: &Device) -> Result<Self> {
        let block = mem_freq + 1;
        let after = sizes.iter().scan(0, |end, &size| {
            *end += size + 1;
            Some(*end - 1)
        });
        let landmark_rows: Vec<u32> = after.collect();
        let rows = landmark_rows.last().map_or(0, |&last| last as usize + 1);
        if rows == sizes.len() * block {
            return Ok(Self { landmarks: Landmarks::Every(block), landmark_rows, rows, stored: None });
        }
        let (mut mask, mut stored) = (vec![0u8; time], Vec::with_capacity(sizes.len() * block));
        for (&landmark, &size) in landmark_rows.iter().zip(sizes) {
            mask[landmark as usize] = 1;
            // What is before a short block is never read; any row will do.
            let first = landmark - size;
            stored.extend(std::iter::repeat_n(first, mem_freq - size as usize));
            stored.extend(first..=landmark);
        }
        // The operation looks for the landmarks on the CPU.
        let mask = Tensor::from_vec(mask, (1, time), &Device::Cpu)?.broadcast_as((batch, time))?.contiguous()?;
        let stored = Some(Tensor::new(stored, device)?);
        Ok(Self { landmarks: Landmarks::Mask(mask), landmark_rows, rows, stored })
    }
}
