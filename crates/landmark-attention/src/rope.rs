//! Rotary position embedding (Su et al., 2021): pair `i` of a head's channels is turned by `position * inv_freq[i]`, so that
//! a product of a rotated query and a rotated key depends on their distance alone.

use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{Error, Result};

/// Which channels of a head form pair `i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// Channels `2i` and `2i + 1`: the reference GPT.
    Interleaved,
    /// Channels `i` and `i + head_dim / 2`: Hugging Face's LLaMA.
    Halves,
}

/// A rotary embedding: the frequencies and which channels form a pair.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    inv_freq: Vec<f64>,
    pairs: Pairs,
    scale: f64,
}

impl Rope {
    /// The usual frequencies `base^(-2i / head_dim)`, rounded to f32: that is how the reference and Hugging Face keep them, in models
    /// of any dtype.
    pub fn new(head_dim: usize, base: f64, pairs: Pairs) -> Self {
        let inv_freq = (0..head_dim / 2).map(|i| base.powf(-2. * i as f64 / head_dim as f64) as f32 as f64).collect();
        Self::with_frequencies(inv_freq, pairs)
    }

    /// These frequencies, of pair 0 first: for models that were stretched to longer texts.
    pub fn with_frequencies(inv_freq: Vec<f64>, pairs: Pairs) -> Self {
        Self { inv_freq, pairs, scale: 1. }
    }

    /// The same, of which what is rotated also comes out longer by a factor (YaRN's temperature: scores grow by its square).
    pub fn scaled(self, scale: f64) -> Self {
        Self { scale, ..self }
    }

    /// The frequencies.
    pub fn frequencies(&self) -> &[f64] {
        &self.inv_freq
    }

    /// Channels of a head: twice the number of frequencies.
    pub fn head_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// The rotation for tokens at `positions`, `[time]` for all rows of a batch or `[batch * time]` for each row its own.
    /// Angles are taken in f64: positions of many millions keep their precision.
    pub fn at(&self, positions: &[i64]) -> Rotation {
        let table = positions
            .iter()
            .flat_map(|&p| {
                self.inv_freq.iter().map(move |f| {
                    let (sin, cos) = (p as f64 * f).sin_cos();
                    [self.scale * cos, self.scale * sin]
                })
            })
            .collect();
        let table = Table {
            host: table,
            single: OnceLock::new(),
            double: OnceLock::new(),
            #[cfg(feature = "cuda")]
            devices: Default::default(),
        };
        Rotation { table: Arc::new(table), n_freq: self.inv_freq.len(), pairs: self.pairs, sign: 1. }
    }
}

/// The cosines and sines of a list of positions, computed once and used for queries and keys of all layers.
#[derive(Debug, Clone)]
pub struct Rotation {
    table: Arc<Table>,
    n_freq: usize,
    pairs: Pairs,
    /// -1 turns back: the gradient of a rotation is the inverse rotation.
    sign: f64,
}

#[derive(Debug)]
struct Table {
    /// `[positions, n_freq]`: cosine and sine.
    host: Vec<[f64; 2]>,
    /// The cosines, then the sines, for the CPU, in the type that asked for them.
    single: OnceLock<[Vec<f32>; 2]>,
    double: OnceLock<[Vec<f64>; 2]>,
    /// The same on each GPU that asked for them.
    #[cfg(feature = "cuda")]
    devices: cuda::rope::Tables,
}

impl Table {
    fn single(&self) -> [&[f32]; 2] {
        self.single
            .get_or_init(|| [0, 1].map(|i| self.host.iter().map(|turn| turn[i] as f32).collect()))
            .each_ref()
            .map(Vec::as_slice)
    }

    fn double(&self) -> [&[f64]; 2] {
        self.double
            .get_or_init(|| [0, 1].map(|i| self.host.iter().map(|turn| turn[i]).collect()))
            .each_ref()
            .map(Vec::as_slice)
    }
}

impl Rotation {
    /// Rotates `x`, `[batch, heads, time, head_dim]` with the last dimension contiguous, of f32 or f64, on a GPU of f32, bf16 or f16 (computed in
    /// f32); differentiable. The result is contiguous. A rotation is copied to a GPU once, when it is first applied there.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        const OP: &str = "rope";
        let (batch, _, time, head_dim) = x.dims4()?;
        let rows = self.table.host.len() / self.n_freq;
        if head_dim != 2 * self.n_freq || (rows != time && rows != batch * time) {
            let expected = format!("[batch, heads, time, {}] with {rows} positions", 2 * self.n_freq);
            return Err(Error::Shape { op: OP, tensor: "x", got: x.dims().to_vec(), expected });
        }
        let (fits, expected) = match x.device() {
            Device::Cpu => (matches!(x.dtype(), DType::F32 | DType::F64), "f32 or f64"),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                (matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16), "f32, bf16 or f16 on a GPU")
            }
            other => {
                let expected = "a device that has kernels in this build".to_string();
                return Err(Error::Device { op: OP, tensor: "x", got: other.location(), expected });
            }
        };
        if !fits {
            return Err(Error::DType { op: OP, tensor: "x", got: x.dtype(), expected: expected.into() });
        }
        Ok(x.apply_op1(self.clone())?)
    }

    /// The rotation back, which turns the gradient of this one's result into that of its argument. (If it [scales](Rope::scaled) it
    /// does so too: it is the transpose.)
    pub fn inverse(&self) -> Self {
        Self { sign: -self.sign, ..self.clone() }
    }

    /// Whether each row of a batch has positions of its own.
    fn is_per_row(&self, batch: usize, time: usize) -> bool {
        self.table.host.len() == batch * time * self.n_freq && batch > 1
    }

    fn rotate<T: WithDType>(&self, x: &[T], layout: &Layout, [cos, sin]: [&[T]; 2]) -> Vec<T> {
        let (batch, heads, time, head_dim) = layout.shape().dims4().expect("checked by apply");
        let [sb, sh, st] = [layout.stride()[0], layout.stride()[1], layout.stride()[2]];
        let (per_row, n) = (self.is_per_row(batch, time), self.n_freq);
        let sign = T::from_f64(self.sign);
        let mut out = vec![T::zero(); batch * heads * time * head_dim];
        out.par_chunks_mut(time * head_dim).enumerate().for_each(|(bh, out)| {
            let (b, h) = (bh / heads, bh % heads);
            let first = if per_row { b * time } else { 0 };
            for (t, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let x = &x[layout.start_offset() + b * sb + h * sh + t * st..][..head_dim];
                let (cos, sin) = (&cos[(first + t) * n..][..n], &sin[(first + t) * n..][..n]);
                match self.pairs {
                    Pairs::Interleaved => {
                        for (i, (x, out)) in x.chunks_exact(2).zip(out.chunks_exact_mut(2)).enumerate() {
                            let sin = sign * sin[i];
                            out[0] = x[0] * cos[i] - x[1] * sin;
                            out[1] = x[1] * cos[i] + x[0] * sin;
                        }
                    }
                    Pairs::Halves => {
                        let ((x0, x1), (out0, out1)) = (x.split_at(n), out.split_at_mut(n));
                        for i in 0..n {
                            let sin = sign * sin[i];
                            out0[i] = x0[i] * cos[i] - x1[i] * sin;
                            out1[i] = x1[i] * cos[i] + x0[i] * sin;
                        }
                    }
                }
            }
        });
        out
    }
}

impl CustomOp1 for Rotation {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        if layout.stride()[3] != 1 {
            candle_core::bail!("rope: the last dimension of x must be contiguous")
        }
        let out = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(self.rotate(x, layout, self.table.single())),
            CpuStorage::F64(x) => CpuStorage::F64(self.rotate(x, layout, self.table.double())),
            other => candle_core::bail!("rope: dtype {:?} has no kernel", other.dtype()),
        };
        Ok((out, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (batch, _, time, _) = layout.shape().dims4()?;
        let turns = cuda::rope::Turns {
            pairs: self.n_freq,
            per_row: self.is_per_row(batch, time),
            halves: self.pairs == Pairs::Halves,
            sign: self.sign as f32,
        };
        let table = self.table.devices.on(x.device(), &self.table.host)?;
        Ok((cuda::rope::rotate(&table, turns, x, layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _res: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let back = Self { sign: -self.sign, ..self.clone() };
        let grad = if grad.stride()[3] == 1 { grad.clone() } else { grad.contiguous()? };
        Ok(Some(grad.apply_op1_no_bwd(&back)?))
    }
}
