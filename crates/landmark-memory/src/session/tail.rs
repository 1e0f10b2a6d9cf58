//! `tail-N`: the unfinished block of a session, and the model's last hidden state.
//!
//! Little endian: the ASCII bytes `LMTAIL` and two zero bytes; 4 bytes each: the unfinished block's tokens `u`, and the channels `C` of the hidden
//! state, 0 for none; then floats of 4 bytes: the hidden state `[C]`, and for each layer keys (before rotation) and values
//! `[kv_heads, u, head_dim]`. They are as the model gave them, whatever the type of the blocks. The journal has the length and the checksum.

use candle_core::{DType, Device, Tensor};

use crate::segments::Shape;

const MAGIC: &[u8; 8] = b"LMTAIL\0\0";
const HEADER: usize = 16;

/// What the file holds.
#[derive(Debug, Default)]
pub struct Tail {
    pub hidden: Vec<f32>,
    /// Keys and values `[1, kv_heads, u, head_dim]` of each layer, or nothing.
    pub layers: Vec<Option<(Tensor, Tensor)>>,
}

impl Tail {
    /// Tokens of the unfinished block.
    pub fn tokens(&self) -> usize {
        self.layers.first().and_then(|layer| layer.as_ref()).map_or(0, |(keys, _)| keys.dims()[2])
    }

    pub fn encode(hidden: &[f32], layers: &[Option<(Tensor, Tensor)>]) -> candle_core::Result<Vec<u8>> {
        let tokens = layers.first().and_then(|layer| layer.as_ref()).map_or(0, |(keys, _)| keys.dims()[2]);
        let mut bytes = MAGIC.to_vec();
        bytes.extend((tokens as u32).to_le_bytes());
        bytes.extend((hidden.len() as u32).to_le_bytes());
        let mut put = |numbers: &[f32]| numbers.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        put(hidden);
        for (keys, values) in layers.iter().flatten() {
            put(&keys.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?);
            put(&values.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?);
        }
        Ok(bytes)
    }

    /// `None` if the bytes are not exactly what they say.
    pub fn decode(bytes: &[u8], shape: &Shape) -> Option<Self> {
        let (head, body) = bytes.split_at_checked(HEADER)?;
        let short = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes")) as usize;
        let (tokens, channels) = (short(8), short(12));
        let (floats, rest) = body.as_chunks::<4>();
        let each = shape.heads * shape.codec.head_dim * tokens;
        let is_whole = head[..8] == *MAGIC && rest.is_empty() && tokens < shape.codec.block;
        if !is_whole || floats.len() != channels.checked_add(2 * shape.layers * each)? {
            return None;
        }
        let mut numbers = floats.iter().map(|&bytes| f32::from_le_bytes(bytes));
        let hidden = numbers.by_ref().take(channels).collect();
        let mut next = || {
            let numbers: Vec<f32> = numbers.by_ref().take(each).collect();
            Tensor::from_vec(numbers, (1, shape.heads, tokens, shape.codec.head_dim), &Device::Cpu).ok()
        };
        let layers = match tokens {
            0 => (0..shape.layers).map(|_| None).collect(),
            _ => (0..shape.layers).map(|_| Some(Some((next()?, next()?)))).collect::<Option<_>>()?,
        };
        Some(Self { hidden, layers })
    }
}
