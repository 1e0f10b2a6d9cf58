//! Products with a quantized matrix on the CPU: its blocks become f32 on the way, a part of the matrix at a time that fits the nearest cache.
//!
//! Why not candle's own: for some types it has no vector instructions, for others only in builds for one machine; and it rounds x to 8 bits
//! first. Here x is as it is, many rows of x share the work on the blocks, and for one row, which is what generating a text asks for, blocks are
//! used where they are.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::elements::{Elements, rows_and_width};
use super::product::{Matrix, product, product_here};
use super::record::{Output, Tape};
use super::vectorised::vectorised;
use crate::{Error, Result};

const OP: &str = "quantized_linear";

/// Elements of the matrix that are f32 at a time: 256 KiB of them.
const PART: usize = 1 << 16;

/// Weights of a block, of the types that have code here.
const BLOCK: usize = 32;

/// `x w^T` for `x` `[.., in]` of f32 and `w` `[out, in]`, which does not learn; returns `[.., out]`.
pub(crate) fn quantized_linear(x: &Tensor, w: &Arc<QTensor>) -> Result<Tensor> {
    let (n, n_in) = rows_and_width(OP, "x", x)?;
    let n_out = match *w.shape().dims() {
        [n_out, width] if width == n_in && w.device().is_cpu() => n_out,
        ref got => {
            let expected = format!("[out, {n_in}] on the CPU");
            return Err(Error::Shape { op: OP, tensor: "w", got: got.to_vec(), expected });
        }
    };
    let x = x.contiguous()?;
    let tape = Tape::new(OP, &[&x])?;
    let y = {
        let x = Elements::<f32>::of(OP, "x", &x)?;
        match w.dtype() {
            GgmlDType::Q4_0 => times::<Q4_0>(&x, n, &w.data()?, n_out),
            GgmlDType::Q4_1 => times::<Q4_1>(&x, n, &w.data()?, n_out),
            GgmlDType::Q8_0 => times::<Q8_0>(&x, n, &w.data()?, n_out),
            _ => {
                let parts = |first: u32, rows: u32, out: &mut Vec<f32>| -> Result<()> {
                    let ids = Tensor::arange(first, first + rows, &Device::Cpu)?;
                    *out = w.embedding(&ids)?.flatten_all()?.to_vec1()?;
                    Ok(())
                };
                in_parts(&x, n, n_in, n_out, parts)?
            }
        }
    };
    let shape = [&x.dims()[..x.rank() - 1], &[n_out]].concat();
    let (w, x_shape) = (w.clone(), x.shape().clone());
    tape.finish_one(Output::new(y, shape), move |dy| {
        let w = w.dequantize(&Device::Cpu)?;
        let dx = {
            let (dy, w) = (Elements::<f32>::of(OP, "dy", &dy)?, Elements::<f32>::of(OP, "w", &w)?);
            product(Matrix::new(&dy, n, n_out), Matrix::new(&w, n_out, n_in))
        };
        Ok(vec![Tensor::from_vec(dx, &x_shape, &Device::Cpu)?])
    })
}

/// The product, the rows of the matrix that `part(first, rows, out)` makes f32 at a time.
fn in_parts(
    x: &[f32],
    n: usize,
    n_in: usize,
    n_out: usize,
    part: impl Fn(u32, u32, &mut Vec<f32>) -> Result<()> + Sync,
) -> Result<Vec<f32>> {
    let rows = (PART / n_in).clamp(1, n_out);
    // The transpose: each part gives whole rows of it.
    let mut y_on = vec![0f32; n_out * n];
    y_on.par_chunks_mut(rows * n).enumerate().try_for_each_init(Vec::new, |w, (index, y)| {
        let here = y.len() / n;
        part((index * rows) as u32, here as u32, w)?;
        product_here(y, Matrix::new(w, here, n_in), Matrix::new(x, n, n_in).t());
        Ok::<_, Error>(())
    })?;
    if n == 1 {
        return Ok(y_on);
    }
    let mut y = vec![0f32; n * n_out];
    // Squares that stay in the cache.
    const SIDE: usize = 32;
    y.par_chunks_mut(SIDE * n_out).enumerate().for_each(|(index, y)| {
        for first in (0..n_out).step_by(SIDE) {
            for (i, y) in y.chunks_exact_mut(n_out).enumerate() {
                for o in first..n_out.min(first + SIDE) {
                    y[o] = y_on[o * n + index * SIDE + i];
                }
            }
        }
    });
    Ok(y)
}

/// The product with a matrix of `n_out` rows of blocks.
fn times<B: Block>(x: &[f32], n: usize, w: &[u8], n_out: usize) -> Vec<f32> {
    let (n_in, row) = (x.len() / n, w.len() / n_out);
    assert_eq!(n_in / BLOCK * B::BYTES, row, "rows are whole blocks");
    if n == 1 {
        let rows = (PART / n_in).clamp(1, n_out);
        let mut y = vec![0f32; n_out];
        y.par_chunks_mut(rows).zip(w.par_chunks(rows * row)).for_each(|(y, w)| dots::<B>(w, x, y));
        return y;
    }
    let part = |first: u32, rows: u32, out: &mut Vec<f32>| {
        out.resize(rows as usize * n_in, 0.);
        floats::<B>(&w[first as usize * row..][..rows as usize * row], out);
        Ok(())
    };
    in_parts(x, n, n_in, n_out, part).expect("blocks that are in memory")
}

/// A type of blocks of 32 weights, as ggml lays it out.
trait Block {
    const BYTES: usize;

    /// The weights.
    fn floats(bytes: &[u8]) -> [f32; BLOCK];
}

/// 4 bits and a scale.
struct Q4_0;

/// 4 bits, a scale and a minimum.
struct Q4_1;

/// 8 bits and a scale.
struct Q8_0;

impl Block for Q4_0 {
    const BYTES: usize = 18;

    #[inline(always)]
    fn floats(bytes: &[u8]) -> [f32; BLOCK] {
        let d = half(bytes);
        nibbles(&bytes[2..18], d, -8. * d)
    }
}

impl Block for Q4_1 {
    const BYTES: usize = 20;

    #[inline(always)]
    fn floats(bytes: &[u8]) -> [f32; BLOCK] {
        nibbles(&bytes[4..20], half(bytes), half(&bytes[2..]))
    }
}

impl Block for Q8_0 {
    const BYTES: usize = 34;

    #[inline(always)]
    fn floats(bytes: &[u8]) -> [f32; BLOCK] {
        let (d, quants) = (half(bytes), &bytes[2..34]);
        let mut out = [0.; BLOCK];
        for i in 0..BLOCK {
            out[i] = d * f32::from(quants[i] as i8);
        }
        out
    }
}

/// The low halves of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8], d: f32, m: f32) -> [f32; BLOCK] {
    let bytes = &bytes[..16];
    let mut out = [0.; BLOCK];
    for i in 0..16 {
        out[i] = d * f32::from(bytes[i] & 15) + m;
        out[16 + i] = d * f32::from(bytes[i] >> 4) + m;
    }
    out
}

/// A finite half as f32, without a branch: its bits in their places, and the difference of the exponents' biases.
#[inline(always)]
fn half(bytes: &[u8]) -> f32 {
    let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

vectorised! {
    /// The weights of whole blocks.
    fn floats<B: Block>(w: &[u8], out: &mut [f32]) {
        for (block, out) in w.chunks_exact(B::BYTES).zip(out.chunks_exact_mut(BLOCK)) {
            out.copy_from_slice(&B::floats(block));
        }
    }
}

vectorised! {
    /// The products of the rows of `w` with `x`.
    fn dots<B: Block>(w: &[u8], x: &[f32], y: &mut [f32]) {
        let row = x.len() / BLOCK * B::BYTES;
        for (w, y) in w.chunks_exact(row).zip(y) {
            let mut sums = [0f32; BLOCK];
            for (block, x) in w.chunks_exact(B::BYTES).zip(x.chunks_exact(BLOCK)) {
                let w = B::floats(block);
                for i in 0..BLOCK {
                    sums[i] += w[i] * x[i];
                }
            }
            *y = sums.iter().sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize, seed: usize) -> Tensor {
        let values = (0..rows * cols).map(|i| (((i + seed) * 7919 % 9973) as f32 / 9973. - 0.5) * 3.);
        Tensor::from_iter(values, &Device::Cpu).unwrap().reshape((rows, cols)).unwrap()
    }

    /// Of every type the product is that of the matrix that candle makes f32, for one row and for many.
    #[test]
    fn products_are_those_of_the_dequantized_matrix() {
        use GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
            for (n, n_in, n_out) in [(1, 512, 37), (3, 256, 1), (70, 768, 300)] {
                let w = Arc::new(QTensor::quantize(&matrix(n_out, n_in, 1), dtype).unwrap());
                let x = matrix(n, n_in, 5);
                let expected = x.matmul(&w.dequantize(&Device::Cpu).unwrap().t().unwrap()).unwrap();
                let got = quantized_linear(&x, &w).unwrap();
                let off = (got - &expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(off < 2e-3, "{dtype:?}, {n} rows of {n_in} to {n_out}: off by {off}");
            }
        }
        let w = Arc::new(QTensor::quantize(&matrix(4, 32, 1), Q8_0).unwrap());
        let error = quantized_linear(&matrix(2, 64, 0), &w).unwrap_err();
        assert!(matches!(error, Error::Shape { tensor: "w", .. }), "{error}");
    }

    #[test]
    fn halves_are_exact() {
        for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
            let float = half(&bits.to_le_bytes());
            // 1.m 2^(e - 15), or 0.m 2^-14.
            let (e, m) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.);
            let magnitude = if e == 0 { m * 2f64.powi(-14) } else { (1. + m) * 2f64.powi(e - 15) };
            let expected = if bits & 0x8000 != 0 { -magnitude } else { magnitude };
            assert_eq!((f64::from(float), float.is_sign_negative()), (expected, expected.is_sign_negative()));
        }
    }
}
