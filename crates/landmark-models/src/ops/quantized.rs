//! Products with a quantized matrix on the CPU.
//!
//! Why not candle's own: for some types it has no vector instructions (Q4_1: a twenty-fifth of the speed), for others only in builds for one
//! machine; and it rounds x to 8 bits first. Here x is as it is. Many rows of x share the work of making weights f32 ([`packed`](super::packed));
//! for one row, which is what generating a text asks for, blocks are used where they are ([`blocks`](super::blocks)).

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::blocks::{BLOCK, Block, Q4_0, Q4_1, Q8_0, Summed, add_dots, floats};
use super::elements::{Elements, check_shape, rows_and_width};
use super::math::{Real, sum_of};
use super::packed::add_times_rows;
use super::product::{Matrix, product};
use super::record::{Output, Tape};
use super::vectorised::vectorised;
use crate::{Error, Result};

const OP: &str = "quantized_linear";

/// Weights that a worker takes at a time, where there are few rows of x.
const PART: usize = 1 << 16;

/// Rows of x that are few: it is cheaper to go through the blocks for each.
const FEW: usize = 4;

/// `x w^T` for `x` `[.., in]` of f32 and `w` `[out, in]`, which does not learn, or `residual + x w^T`; returns `[.., out]`.
pub(crate) fn quantized_linear(x: &Tensor, w: &Arc<QTensor>, residual: Option<&Tensor>) -> Result<Tensor> {
    let (n, n_in) = rows_and_width(OP, "x", x)?;
    let n_out = match *w.shape().dims() {
        [n_out, width] if width == n_in && w.device().is_cpu() => n_out,
        ref got => {
            let expected = format!("[out, {n_in}] on the CPU");
            return Err(Error::Shape { op: OP, tensor: "w", got: got.to_vec(), expected });
        }
    };
    let shape = [&x.dims()[..x.rank() - 1], &[n_out]].concat();
    let x = x.contiguous()?;
    let tape = Tape::new(OP, &[Some(&x), residual].into_iter().flatten().collect::<Vec<_>>())?;
    let mut y = match residual {
        None => vec![0f32; n * n_out],
        Some(residual) => {
            check_shape(OP, "residual", residual, &shape)?;
            Elements::<f32>::of(OP, "residual", &residual.contiguous()?)?.to_vec()
        }
    };
    {
        let x = Elements::<f32>::of(OP, "x", &x)?;
        match w.dtype() {
            GgmlDType::Q4_0 => add_times_blocks::<Q4_0>(&mut y, &x, n, &w.data()?)?,
            GgmlDType::Q4_1 => add_times_blocks::<Q4_1>(&mut y, &x, n, &w.data()?)?,
            GgmlDType::Q8_0 => add_times_blocks::<Q8_0>(&mut y, &x, n, &w.data()?)?,
            _ => add_times_any(&mut y, &x, n, w)?,
        }
    }
    let (w, x_shape, adds) = (w.clone(), x.shape().clone(), residual.is_some());
    tape.finish_one(Output::new(y, shape), move |dy| {
        let w = w.dequantize(&Device::Cpu)?;
        let dx = {
            let (dy, w) = (Elements::<f32>::of(OP, "dy", &dy)?, Elements::<f32>::of(OP, "w", &w)?);
            product(Matrix::new(&dy, n, n_out), Matrix::new(&w, n_out, n_in))
        };
        let mut grads = vec![Tensor::from_vec(dx, &x_shape, &Device::Cpu)?];
        if adds {
            grads.push(dy.clone());
        }
        Ok(grads)
    })
}

/// `y += x w^T`, for a matrix of rows of blocks.
fn add_times_blocks<B: Block>(y: &mut [f32], x: &[f32], n: usize, w: &[u8]) -> Result<()> {
    let (n_in, n_out) = (x.len() / n, y.len() / n);
    let row = n_in / BLOCK * B::BYTES;
    assert_eq!(n_out * row, w.len(), "rows are whole blocks");
    if n > FEW {
        return add_times_rows(y, x, n, |first, out| {
            floats::<B>(&w[first * row..][..out.len() / n_in * row], out);
            Ok(())
        });
    }
    let rows = (PART / n_in).max(1);
    for (x, y) in x.chunks_exact(n_in).zip(y.chunks_exact_mut(n_out)) {
        let sums: Vec<f32> = x.chunks_exact(BLOCK).map(|x| x.iter().sum()).collect();
        let x = Summed { x, sums: &sums };
        y.par_chunks_mut(rows).zip(w.par_chunks(rows * row)).for_each(|(y, w)| add_dots::<B>(w, x, y));
    }
    Ok(())
}

/// The same for a matrix of any type: candle makes its rows f32.
fn add_times_any(y: &mut [f32], x: &[f32], n: usize, w: &QTensor) -> Result<()> {
    let (n_in, n_out) = (x.len() / n, y.len() / n);
    let floats = |first: usize, rows: usize| -> Result<Vec<f32>> {
        let ids = Tensor::arange(first as u32, (first + rows) as u32, &Device::Cpu)?;
        Ok(w.embedding(&ids)?.flatten_all()?.to_vec1()?)
    };
    if n > FEW {
        return add_times_rows(y, x, n, |first, out| {
            out.copy_from_slice(&floats(first, out.len() / n_in)?);
            Ok(())
        });
    }
    let rows = (PART / n_in).max(1);
    for (x, y) in x.chunks_exact(n_in).zip(y.chunks_exact_mut(n_out)) {
        y.par_chunks_mut(rows).enumerate().try_for_each(|(part, y)| {
            add_dots_of_floats::<f32>(&floats(part * rows, y.len())?, x, y);
            Ok::<_, Error>(())
        })?;
    }
    Ok(())
}

vectorised! {
    fn add_dots_of_floats<T: Real>(w: &[T], x: &[T], y: &mut [T]) {
        for (w, y) in w.chunks_exact(x.len()).zip(y) {
            *y += sum_of(x.len(), |i| w[i] * x[i]);
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
                let got = quantized_linear(&x, &w, None).unwrap();
                let off = (got - &expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(off < 2e-3, "{dtype:?}, {n} rows of {n_in} to {n_out}: off by {off}");
            }
        }
        let w = Arc::new(QTensor::quantize(&matrix(4, 32, 1), Q8_0).unwrap());
        let error = quantized_linear(&matrix(2, 64, 0), &w, None).unwrap_err();
        assert!(matches!(error, Error::Shape { tensor: "w", .. }), "{error}");
    }
}
