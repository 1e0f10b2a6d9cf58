//! A matrix of a model: dense, or quantized as GGUF files are and then read as it is.

use std::sync::Arc;

use candle_core::quantized::{QStorage, QTensor};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};

use crate::ops::{self, TokenScore};
use crate::{Error, Result};

/// A matrix `[out, in]`.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// A tensor; one that is a variable learns.
    Dense(Tensor),
    /// Blocks of a few bits. It does not learn; gradients go through it.
    Quantized(Arc<QTensor>),
}

impl Matrix {
    /// `[out, in]`.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Dense(w) => w.dims(),
            Self::Quantized(w) => w.shape().dims(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(w) => w.device().clone(),
            Self::Quantized(w) => w.device(),
        }
    }

    /// Its elements: of a quantized one, a copy in f32.
    pub fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(w) => Ok(w.clone()),
            Self::Quantized(w) => Ok(w.dequantize(&w.device())?),
        }
    }

    /// `x w^T + b` for `x` `[.., in]` and `b` `[out]`, or `residual + x w^T + b`.
    pub(super) fn linear(&self, x: &Tensor, b: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
        match (self, residual) {
            (Self::Dense(w), None) => ops::linear(x, w, b),
            (Self::Dense(w), Some(residual)) => ops::linear_onto(x, w, b, residual),
            (Self::Quantized(w), _) => {
                if let (Device::Cpu, None) = (x.device(), b) {
                    return ops::quantized_linear(x, w, residual);
                }
                let dtype = residual.unwrap_or(x).dtype();
                let y = match x.device() {
                    Device::Cpu => ops::quantized_linear(x, w, None)?,
                    _ => ops::bridge([x], |[x]| x.contiguous()?.apply_op1(Times(w.clone()))?.to_dtype(dtype))?,
                };
                let y = match b {
                    Some(b) => ops::bridge([&y, b], |[y, b]| y.broadcast_add(&b.to_dtype(dtype)?))?,
                    None => y,
                };
                match residual {
                    Some(residual) => ops::bridge([residual, &y], |[residual, y]| residual + y),
                    None => Ok(y),
                }
            }
        }
    }

    /// The rows that `ids`, u32 of any shape, name: `[.., in]`, in f32 (f64 for f64).
    pub(super) fn embedding(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) if matches!(w.dtype(), DType::F32 | DType::F64) => ops::embedding(w, ids),
            _ => {
                let rows = self.dims()[0];
                if let Some(id) = ops::ids("embedding", "tokens", ids)?.into_iter().find(|&id| id as usize >= rows) {
                    let expected = format!("ids below {rows}");
                    return Err(Error::Value { op: "embedding", name: "tokens", got: id.to_string(), expected });
                }
                match self {
                    Self::Quantized(w) => Ok(w.embedding(ids)?),
                    Self::Dense(w) => {
                        let flat = ids.to_device(w.device())?.flatten_all()?;
                        let shape = [ids.dims(), &w.dims()[1..]].concat();
                        Ok(w.detach().index_select(&flat, 0)?.to_dtype(DType::F32)?.reshape(shape)?)
                    }
                }
            }
        }
    }

    /// See [`ops::cross_entropy`]; of one `row` of a matrix that does not learn there may be a tensor `[1, in]` that does, which it holds.
    pub(super) fn cross_entropy(
        &self,
        x: &Tensor,
        row: Option<(&Tensor, usize)>,
        targets: &Tensor,
        weights: Option<&Tensor>,
    ) -> Result<Tensor> {
        match row {
            Some(row) => ops::cross_entropy_with_row(x, &self.dense()?, row, targets, weights),
            None => ops::cross_entropy(x, &self.dense()?, targets, weights),
        }
    }

    /// See [`ops::token_scores`].
    pub(super) fn token_scores(&self, x: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
        match self {
            // Its blocks, not a copy of it in f32.
            Self::Quantized(w) if x.device().is_cpu() && x.dtype() == DType::F32 => {
                ops::token_scores_by(x, targets, self.dims()[0], |x| ops::quantized_linear(x, w, None))
            }
            _ => ops::token_scores(x, &self.dense()?, targets),
        }
    }

    /// The matrix with one more row, or with another in place of one: `row` `[in]`.
    pub(super) fn with_row(&self, index: usize, row: &Tensor) -> Result<Self> {
        let &[rows, cols] = self.dims() else {
            let expected = "[rows, columns]".to_string();
            return Err(Error::Shape { op: "with_row", tensor: "matrix", got: self.dims().to_vec(), expected });
        };
        match self {
            Self::Dense(w) => {
                let row = row.to_dtype(w.dtype())?.reshape((1, cols))?;
                let parts = [w.narrow(0, 0, index.min(rows))?, row];
                let after = if index + 1 < rows { Some(w.narrow(0, index + 1, rows - index - 1)?) } else { None };
                Ok(Self::Dense(Tensor::cat(&parts.iter().chain(&after).collect::<Vec<_>>(), 0)?))
            }
            // Rows are whole blocks: the others stay as they are to the bit.
            Self::Quantized(w) => {
                let row = QTensor::quantize(&row.to_dtype(DType::F32)?.reshape((1, cols))?, w.dtype())?;
                let mut bytes = w.data()?.into_owned();
                let new = row.data()?;
                let at = index * new.len();
                bytes.resize(bytes.len().max(at + new.len()), 0);
                bytes[at..][..new.len()].copy_from_slice(&new);
                let storage = QStorage::from_data(bytes.into(), &w.device(), w.dtype())?;
                Ok(Self::Quantized(Arc::new(QTensor::new(storage, (rows.max(index + 1), cols))?)))
            }
        }
    }
}

/// `x w^T` on a GPU, by candle.
struct Times(Arc<QTensor>);

impl CustomOp1 for Times {
    fn name(&self) -> &'static str {
        "quantized_linear"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("quantized_linear: on the CPU it is an operation of its own")
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        self.0.cuda_fwd(x, layout)
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let w = self.0.dequantize(dy.device())?.to_dtype(dy.dtype())?;
        Ok(Some(dy.broadcast_matmul(&w)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;
    use candle_core::quantized::GgmlDType;

    fn matrix(rows: usize, cols: usize) -> Tensor {
        let values = (0..rows * cols).map(|i| ((i * i % 97) as f32 - 48.) / 50.);
        Tensor::from_iter(values, &Device::Cpu).unwrap().reshape((rows, cols)).unwrap()
    }

    fn quantized(rows: usize) -> Matrix {
        Matrix::Quantized(Arc::new(QTensor::quantize(&matrix(rows, 64), GgmlDType::Q8_0).unwrap()))
    }

    fn off(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    /// The product, its gradients and the rows are those of the dequantized matrix; and a row alone is what it is among others.
    #[test]
    fn a_quantized_matrix_is_its_dequantized_one() {
        let (w, b) = (quantized(7), Tensor::arange(0f32, 7., &Device::Cpu).unwrap());
        let dense = Matrix::Dense(w.dense().unwrap());
        let x = Var::from_tensor(&matrix(6, 64).reshape((2, 3, 64)).unwrap()).unwrap();
        let residual = Var::from_tensor(&matrix(6, 7).reshape((2, 3, 7)).unwrap()).unwrap();
        let run = |w: &Matrix, record: bool| {
            let recording = record.then(|| ops::Recording::start(&ops::Rounded::default()));
            let y = w.linear(&x, Some(&b), Some(&residual)).unwrap();
            let head = Matrix::Dense(matrix(5, 7));
            let targets = Tensor::new(&[[0u32, 1, 2], [3, 4, 0]], &Device::Cpu).unwrap();
            let loss = head.cross_entropy(&y, None, &targets, None).unwrap();
            let mut grads: ops::Gradients = match recording {
                Some(recording) => recording.backward(&loss).unwrap(),
                None => loss.backward().unwrap().into(),
            };
            [y, grads.remove(&x).unwrap(), grads.remove(&residual).unwrap()]
        };
        let expected = run(&dense, false);
        for record in [false, true] {
            for (got, expected) in run(&w, record).iter().zip(&expected) {
                assert!(off(got, expected) < 1e-5, "{}", off(got, expected));
            }
        }
        let targets = Tensor::new(&[[0u32, ops::IGNORE, 2], [6, 4, 0]], &Device::Cpu).unwrap();
        let [got, expected] = [&w, &dense].map(|w| w.token_scores(&x.detach(), &targets).unwrap());
        assert_eq!(got.len(), 6);
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(got.is_some(), expected.is_some());
            let [got, expected] = [got, expected].map(|score| score.map_or(0., |score| score.loss));
            assert!((got - expected).abs() < 1e-5, "{got}, expected {expected}");
        }
        let ids = Tensor::new(&[[6u32, 0]], &Device::Cpu).unwrap();
        assert_eq!(off(&w.embedding(&ids).unwrap(), &dense.embedding(&ids).unwrap()), 0.);
        let ids = Tensor::new(&[7u32], &Device::Cpu).unwrap();
        assert!(matches!(w.embedding(&ids), Err(Error::Value { name: "tokens", .. })));
    }

    #[test]
    fn rows_are_added_and_replaced() {
        let row = matrix(1, 64).get(0).unwrap();
        for w in [quantized(3), Matrix::Dense(matrix(3, 64))] {
            let before = w.dense().unwrap();
            for index in [0, 1, 2, 3] {
                let after = w.with_row(index, &row).unwrap().dense().unwrap();
                assert_eq!(after.dims(), [3.max(index + 1), 64]);
                for other in (0..3).filter(|&other| other != index) {
                    assert_eq!(off(&after.get(other).unwrap(), &before.get(other).unwrap()), 0.);
                }
                assert!(off(&after.get(index).unwrap(), &row) < 0.005);
            }
        }
    }
}
