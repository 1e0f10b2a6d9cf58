//! How the keys and values of a block are kept as bytes: one *unit* for each layer and head.
//!
//! A unit holds the keys, then the values, `[block, head_dim]` each, little endian, and zeros up to a multiple of 64 bytes. With
//! [`BlockType::I8`] the factors of the rows come first, `2 * block` of them in f32: an element is its byte times the factor of its row.

use std::str::FromStr;

use candle_core::DType;
use half::{bf16, f16};

/// Units begin at multiples of it.
const ALIGNMENT: usize = 64;

/// The type of a stored element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlockType {
    /// 32-bit floats: what is read is, bit for bit, what was stored.
    #[default]
    F32,
    /// bfloat16, rounded to nearest.
    BF16,
    /// 8-bit integers, with a factor for each token and head.
    I8,
}

impl BlockType {
    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::BF16 => "bfloat16",
            Self::I8 => "int8",
        }
    }

    pub(crate) fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::BF16 => 1,
            Self::I8 => 2,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 => 2,
            Self::I8 => 1,
        }
    }
}

impl FromStr for BlockType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [Self::F32, Self::BF16, Self::I8];
        let found = all.into_iter().find(|of| of.name() == name);
        found.ok_or_else(|| format!("expected float32, bfloat16 or int8, and not {name:?}"))
    }
}

/// The sizes of units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Codec {
    /// The elements' type.
    pub of: BlockType,
    /// Positions of a block's place, the landmark's included.
    pub block: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl Codec {
    /// Elements of a unit.
    pub fn elements(self) -> usize {
        2 * self.block * self.head_dim
    }

    /// Bytes of the rows' factors.
    fn factors(self) -> usize {
        if self.of == BlockType::I8 { 4 * 2 * self.block } else { 0 }
    }

    /// Bytes of a unit.
    pub fn unit(self) -> usize {
        (self.factors() + self.elements() * self.of.bytes()).next_multiple_of(ALIGNMENT)
    }

    /// Writes keys and values into a unit, all of whose bytes are zero.
    pub fn encode(self, keys: &[f32], values: &[f32], unit: &mut [u8]) {
        let rows = keys.chunks_exact(self.head_dim).chain(values.chunks_exact(self.head_dim));
        let (factors, elements) = unit.split_at_mut(self.factors());
        for (i, (row, bytes)) in rows.zip(elements.chunks_exact_mut(self.head_dim * self.of.bytes())).enumerate() {
            if self.of == BlockType::I8 {
                let largest = largest(row);
                let (factor, inverse) = if largest > 0. { (largest / 127., 127. / largest) } else { (0., 0.) };
                factors[4 * i..][..4].copy_from_slice(&factor.to_le_bytes());
                for (byte, x) in bytes.iter_mut().zip(row) {
                    *byte = ((x * inverse).round() as i8).cast_unsigned();
                }
            } else {
                self.encode_floats(row, bytes);
            }
        }
    }

    fn encode_floats(self, row: &[f32], bytes: &mut [u8]) {
        for (bytes, &x) in bytes.chunks_exact_mut(self.of.bytes()).zip(row) {
            match self.of {
                BlockType::BF16 => bytes.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
                _ => bytes.copy_from_slice(&x.to_le_bytes()),
            }
        }
    }

    /// Reads a unit's keys and values, one after the other.
    pub fn decode(self, unit: &[u8], into: &mut [f32]) {
        for (row, into) in into.chunks_exact_mut(self.head_dim).enumerate() {
            self.decode_row(unit, row, into);
        }
    }

    /// The same in the bytes of another type, f32, bf16 or f16, in the machine's byte order.
    pub fn decode_as(self, dtype: DType, unit: &[u8], into: &mut [u8]) {
        let is_stored = cfg!(target_endian = "little")
            && matches!((self.of, dtype), (BlockType::F32, DType::F32) | (BlockType::BF16, DType::BF16));
        if is_stored {
            let length = into.len();
            into.copy_from_slice(&unit[..length]);
            return;
        }
        let mut numbers = vec![0.; self.head_dim];
        for (row, into) in into.chunks_exact_mut(self.head_dim * dtype.size_in_bytes()).enumerate() {
            self.decode_row(unit, row, &mut numbers);
            let bytes = into.chunks_exact_mut(dtype.size_in_bytes()).zip(&numbers);
            match dtype {
                DType::BF16 => bytes.for_each(|(bytes, &x)| bytes.copy_from_slice(&bf16::from_f32(x).to_ne_bytes())),
                DType::F16 => bytes.for_each(|(bytes, &x)| bytes.copy_from_slice(&f16::from_f32(x).to_ne_bytes())),
                _ => bytes.for_each(|(bytes, x)| bytes.copy_from_slice(&x.to_ne_bytes())),
            }
        }
    }

    /// The landmark's key.
    pub fn landmark(self, unit: &[u8], into: &mut [f32]) {
        self.decode_row(unit, self.block - 1, into);
    }

    fn decode_row(self, unit: &[u8], row: usize, into: &mut [f32]) {
        let (factors, elements) = unit.split_at(self.factors());
        let length = self.head_dim * self.of.bytes();
        let factor = factors.as_chunks::<4>().0.get(row).map_or(1., |&bytes| f32::from_le_bytes(bytes));
        self.decode_elements(&elements[row * length..][..length], factor, into);
    }

    fn decode_elements(self, bytes: &[u8], factor: f32, into: &mut [f32]) {
        match self.of {
            BlockType::F32 => {
                for (x, bytes) in into.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*bytes);
                }
            }
            BlockType::BF16 => {
                for (x, bytes) in into.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
            BlockType::I8 => {
                for (x, byte) in into.iter_mut().zip(bytes) {
                    *x = f32::from(byte.cast_signed()) * factor;
                }
            }
        }
    }

    /// Bytes of a row by itself: its factor, if it has one, and its elements.
    pub fn row(self) -> usize {
        self.head_dim * self.of.bytes() + if self.of == BlockType::I8 { 4 } else { 0 }
    }

    /// Writes a row that was decoded from a unit: it is what [`Self::decode_again`] reads, to the bit.
    pub fn encode_again(self, row: &[f32], bytes: &mut [u8]) {
        if self.of != BlockType::I8 {
            return self.encode_floats(row, bytes);
        }
        // The factor is the largest element's 127th part, but for roundings.
        let base = largest(row) / 127.;
        let near = [base, base.next_up(), base.next_down(), base.next_up().next_up(), base.next_down().next_down()];
        // Integers up to 127 are in the low bits of what is added to 1.5 * 2^23.
        let inverse = if base > 0. { 1. / base } else { 0. };
        let (begin, elements) = bytes.split_at_mut(4);
        elements.iter_mut().zip(row).for_each(|(byte, x)| *byte = (x * inverse + 12_582_912.).to_bits() as u8);
        let fits = |factor: &f32| {
            let all = elements.iter().zip(row).map(|(byte, x)| f32::from(byte.cast_signed()) * factor == *x);
            all.fold(true, |all, fits| all & fits)
        };
        let factor = near.into_iter().find(fits).unwrap_or(base);
        begin.copy_from_slice(&factor.to_le_bytes());
    }

    /// Reads a row by itself.
    pub fn decode_again(self, bytes: &[u8], into: &mut [f32]) {
        match bytes.split_first_chunk::<4>().filter(|_| self.of == BlockType::I8) {
            Some((factor, elements)) => self.decode_elements(elements, f32::from_le_bytes(*factor), into),
            None => self.decode_elements(bytes, 1., into),
        }
    }
}

fn largest(row: &[f32]) -> f32 {
    row.iter().fold(0f32, |largest, x| largest.max(x.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn what_is_decoded_is_what_was_encoded_within_the_type() {
        let (block, head_dim) = (5, 6);
        let numbers = |seed: usize| -> Vec<f32> {
            (0..block * head_dim).map(|i| ((i * 37 + seed) % 101) as f32 / 7. - 6.3).collect()
        };
        let (keys, values) = (numbers(1), numbers(50));
        for (of, tolerance) in [(BlockType::F32, 0.), (BlockType::BF16, 1. / 256.), (BlockType::I8, 0.5 / 127.)] {
            let codec = Codec { of, block, head_dim };
            let mut unit = vec![0; codec.unit()];
            assert!(unit.len().is_multiple_of(64));
            codec.encode(&keys, &values, &mut unit);
            let mut decoded = vec![0.; codec.elements()];
            codec.decode(&unit, &mut decoded);
            for (row, (got, expected)) in
                decoded.chunks(head_dim).zip([&keys[..], &values].concat().chunks(head_dim)).enumerate()
            {
                let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                for (got, expected) in got.iter().zip(expected) {
                    let off = (got - expected).abs();
                    assert!(off <= 1.001 * tolerance * largest, "{of:?}, row {row}: {got} is not {expected}");
                }
            }
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let mut bytes = vec![1; codec.elements() * dtype.size_in_bytes()];
                codec.decode_as(dtype, &unit, &mut bytes);
                let got = Tensor::from_raw_buffer(&bytes, dtype, &[codec.elements()], &Device::Cpu).unwrap();
                let expected = Tensor::new(&decoded[..], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                let numbers = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(numbers(&got), numbers(&expected), "{of:?} as {dtype:?}");
            }
            let mut landmark = vec![0.; head_dim];
            codec.landmark(&unit, &mut landmark);
            assert_eq!(landmark, decoded[(block - 1) * head_dim..block * head_dim]);
            // Once more changes nothing.
            let mut again = vec![0; codec.unit()];
            codec.encode(&decoded[..block * head_dim], &decoded[block * head_dim..], &mut again);
            let mut twice = vec![0.; codec.elements()];
            codec.decode(&again, &mut twice);
            if of != BlockType::I8 {
                assert_eq!(twice, decoded);
            }
            assert_eq!(of.name().parse::<BlockType>().unwrap(), of);
            // A row by itself, again and again, is the same to the bit.
            for row in decoded.chunks(head_dim) {
                let (mut bytes, mut alone) = (vec![0; codec.row()], vec![0.; head_dim]);
                codec.encode_again(row, &mut bytes);
                codec.decode_again(&bytes, &mut alone);
                assert_eq!(alone, row, "{of:?}");
            }
        }
        // Whatever the factor: of rows of all sizes.
        let codec = Codec { of: BlockType::I8, block: 1, head_dim };
        for seed in 0..20_000 {
            let x: Vec<f32> = (0..2 * head_dim)
                .map(|i| ((i * 7919 + seed * 31) % 1009) as f32 * (1. + seed as f32 / 777.) - 500.)
                .collect();
            let (mut unit, mut decoded) = (vec![0; codec.unit()], vec![0.; codec.elements()]);
            codec.encode(&x[..head_dim], &x[head_dim..], &mut unit);
            codec.decode(&unit, &mut decoded);
            for row in decoded.chunks(head_dim) {
                let (mut bytes, mut alone) = (vec![0; codec.row()], vec![0.; head_dim]);
                codec.encode_again(row, &mut bytes);
                codec.decode_again(&bytes, &mut alone);
                assert_eq!(alone, row, "{seed}");
            }
        }
        assert!("int4".parse::<BlockType>().unwrap_err().contains("int8"));
    }
}
