//! The fused CPU kernels: forward and backward in O(T) memory, for f32 and f64; bf16 and f16 are computed in f32.
//!
//! - `tiles`: how keys are cut into tiles that hold whole blocks;
//! - `forward`, `backward`: what is done with a tile, and why it is right;
//! - `column`: the softmax steps that both are made of;
//! - `retrieval`: choosing cached blocks, and attention over them; `single`: the same where there are few queries;
//! - `lists`: choosing through lists of landmarks, by keys that are `rounded`, of which `scan` finds the best;
//! - `product`: the one matrix product under both; `lanes`: the vector arithmetic;
//! - this file: heads and rows, workers, and the candle operation.

mod backward;
mod column;
mod dropout;

mod forward;
pub(crate) mod join;
mod lanes;
pub(crate) mod lists;
mod product;
pub(crate) mod retrieval;
pub(crate) mod rounded;
mod scan;
mod single;
mod tiles;

use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Storage, Tensor, WithDType};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::Softmax;
use crate::call::Call;
use crate::outside::{self, Joined};
use dropout::Draw;
use forward::{QUERIES_PER_TILE, Steps, TileInput};
use lanes::Real;

/// `[batch, heads, time, head_dim]` with any strides but a contiguous last dimension.
#[derive(Clone, Copy)]
struct Heads<'a, T> {
    data: &'a [T],
    strides: [usize; 3],
}

impl<'a, T> Heads<'a, T> {
    fn new(data: &'a [T], layout: &Layout) -> Self {
        let strides = layout.stride();
        Self { data: &data[layout.start_offset()..], strides: [strides[0], strides[1], strides[2]] }
    }

    fn steps(&self, b: usize, h: usize) -> Steps<'a, T> {
        Steps { data: &self.data[b * self.strides[0] + h * self.strides[1]..], stride: self.strides[2] }
    }
}

/// The operands of a call, and what follows from its landmarks.
struct Problem<'a, T> {
    call: &'a Call,
    q: Heads<'a, T>,
    k: Heads<'a, T>,
    v: Heads<'a, T>,
    /// From which query position on each key of each row is visible, where that is not its own.
    visible_from: Vec<Vec<usize>>,
    queries_per_tile: usize,
}

impl<'a, T: Real> Problem<'a, T> {
    fn new(call: &'a Call, q: Heads<'a, T>, k: Heads<'a, T>, v: Heads<'a, T>) -> Self {
        let visible_from = match call.softmax {
            Softmax::Grouped => vec![],
            plain => (0..call.batch)
                .map(|b| {
                    let mut from: Vec<usize> = (0..call.kv_len).collect();
                    for &l in call.landmarks(b) {
                        from[l] = if plain == Softmax::NoMem { l + 1 } else { call.kv_len };
                    }
                    from
                })
                .collect(),
        };
        let queries_per_tile = QUERIES_PER_TILE.min(call.q_len);
        Self { call, q, k, v, visible_from, queries_per_tile }
    }

    /// Queries `from..from + n` of head `h` of row `b`.
    fn tile(&self, b: usize, h: usize, from: usize, n: usize) -> TileInput<'_, T> {
        let call = self.call;
        let kv_head = h / (call.heads / call.kv_heads);
        let q = self.q.steps(b, h);
        TileInput {
            head_dim: call.head_dim,
            scale: call.scale,
            k: self.k.steps(b, kv_head),
            v: self.v.steps(b, kv_head),
            landmarks: if call.softmax == Softmax::Grouped { call.landmarks(b) } else { &[] },
            visible_from: self.visible_from.get(b).map(Vec::as_slice),
            q: Steps { data: q.from(from), stride: q.stride },
            first: call.kv_len - call.q_len + from,
            n,
            draw: Draw::new(call.dropout, b, h),
        }
    }
}

/// Outputs `[batch, heads, q_len, head_dim]` and log-sum-exps `[batch, heads, q_len]` of the outer softmax.
struct Forward<'a, T>(&'a Problem<'a, T>);

impl<T: Real> WithSimd for Forward<'_, T> {
    type Output = (Vec<T>, Vec<T>);

    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let (problem, call) = (self.0, self.0.call);
        let (t, d, per_tile) = (call.q_len, call.head_dim, problem.queries_per_tile);
        let mut out = vec![T::default(); call.batch * call.heads * t * d];
        let mut lse = vec![T::default(); call.batch * call.heads * t];
        let tiles = out.par_chunks_mut(t * d).zip(lse.par_chunks_mut(t)).enumerate().flat_map(|(bh, (out, lse))| {
            let tiles = out.par_chunks_mut(per_tile * d).zip(lse.par_chunks_mut(per_tile)).enumerate();
            tiles.map(move |(i, tile)| (bh, i, tile))
        });
        tiles.for_each_init(forward::Scratch::<S, T>::default, |scratch, (bh, i, (out, lse))| {
            let input = problem.tile(bh / call.heads, bh % call.heads, i * per_tile, lse.len());
            s.vectorize(forward::ForwardTile { s, input, scratch, out, lse });
        });
        (out, lse)
    }
}

/// Gradients of q, k and v, in the shapes of q, k and v, contiguous.
struct Backward<'a, T> {
    problem: &'a Problem<'a, T>,
    out: &'a [T],
    lse: &'a [T],
    dout: Heads<'a, T>,
}

impl<T: Real> WithSimd for Backward<'_, T> {
    type Output = [Vec<T>; 3];

    /// A worker takes the queries that share a key-value head, and adds into gradients of its own. Where there are fewer such
    /// groups than threads, several workers share a group's tiles, and their gradients are added in a fixed order.
    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let Self { problem, out, lse, dout } = self;
        let call = problem.call;
        let (t, d, per_tile) = (call.q_len, call.head_dim, problem.queries_per_tile);
        let (group, kv_elems) = (call.heads / call.kv_heads, call.kv_len * d);
        let channels = d.div_ceil(T::lanes::<S>());
        let groups = call.batch * call.kv_heads;
        let workers = rayon::current_num_threads().div_ceil(groups).min(t.div_ceil(per_tile));
        let mut dq = vec![T::default(); call.batch * call.heads * t * d];
        let mut dk = vec![T::default(); groups * kv_elems];
        let mut dv = vec![T::default(); groups * kv_elems];
        let groups = dq.par_chunks_mut(group * t * d).zip(dk.par_chunks_mut(kv_elems).zip(dv.par_chunks_mut(kv_elems)));
        groups.enumerate().for_each(|(g, (dq, (dk, dv)))| {
            let (b, first_head) = (g / call.kv_heads, g % call.kv_heads * group);
            // Tiles of the group's heads, dealt to the workers in turn: causal tiles grow with their place.
            let mut dealt: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
            for (h, dq) in dq.chunks_mut(t * d).enumerate() {
                for (i, dq) in dq.chunks_mut(per_tile * d).enumerate() {
                    dealt[i % workers].push((first_head + h, i * per_tile, dq));
                }
            }
            let work = |tiles: Vec<(usize, usize, &mut [T])>| {
                let mut scratch = backward::Scratch::<S, T>::default();
                let mut dk = vec![T::splat(s, T::default()); call.kv_len * channels];
                let mut dv = dk.clone();
                for (h, from, dq) in tiles {
                    let n = dq.len() / d;
                    let row = (b * call.heads + h) * t + from;
                    let grad = dout.steps(b, h);
                    s.vectorize(backward::BackwardTile {
                        s,
                        input: problem.tile(b, h, from, n),
                        scratch: &mut scratch,
                        out: &out[row * d..][..n * d],
                        lse: &lse[row..][..n],
                        dout: Steps { data: grad.from(from), stride: grad.stride },
                        dq,
                        dk: &mut dk,
                        dv: &mut dv,
                    });
                }
                (dk, dv)
            };
            let parts: Vec<_> = dealt.into_par_iter().map(work).collect();
            for (part_k, part_v) in &parts {
                add_rows(dk, bytemuck::cast_slice(part_k), d);
                add_rows(dv, bytemuck::cast_slice(part_v), d);
            }
        });
        [dq, dk, dv]
    }
}

/// Adds rows padded to whole registers to rows of `head_dim`.
fn add_rows<T: Real>(sum: &mut [T], padded: &[T], head_dim: usize) {
    let steps = sum.len() / head_dim;
    for (sum, padded) in sum.chunks_exact_mut(head_dim).zip(padded.chunks_exact(padded.len() / steps)) {
        for (sum, &x) in sum.iter_mut().zip(padded) {
            *sum += x;
        }
    }
}

/// The candle operation. One value serves one forward pass: it keeps the log-sum-exps for the backward pass.
struct Fused {
    call: Call,
    lse: Arc<OnceLock<CpuStorage>>,
    joined: Joined,
}

impl Fused {
    fn forward<T: Real + WithDType>(&self, [q, k, v]: [(&[T], &Layout); 3]) -> candle_core::Result<CpuStorage> {
        let problem = Problem::new(&self.call, Heads::new(q.0, q.1), Heads::new(k.0, k.1), Heads::new(v.0, v.1));
        let (out, lse) = Arch::new().dispatch(Forward(&problem));
        if self.lse.set(T::to_cpu_storage_owned(lse)).is_err() {
            candle_core::bail!("landmark_attention: the operation was run twice")
        }
        Ok(T::to_cpu_storage_owned(out))
    }

    fn backward<T: Real + WithDType>(&self, tensors: [&Tensor; 5]) -> candle_core::Result<[Tensor; 3]> {
        let joined = self.joined.take();
        let joined_lse = joined.as_ref().map(|[_, lse]| lse.flatten_all()?.to_vec1::<T>()).transpose()?;
        let mut tensors = tensors;
        if let Some([out, _]) = &joined {
            tensors[3] = out;
        }
        let guards = tensors.map(|t| t.storage_and_layout());
        let mut slices = Vec::with_capacity(5);
        for (storage, layout) in &guards {
            match &**storage {
                Storage::Cpu(storage) => slices.push((storage.as_slice::<T>()?, *layout)),
                _ => candle_core::bail!("landmark_attention: expected tensors on the CPU"),
            }
        }
        let [q, k, v, out, dout] = [0, 1, 2, 3, 4].map(|i| Heads::new(slices[i].0, slices[i].1));
        let problem = Problem::new(&self.call, q, k, v);
        let lse = match (&joined_lse, self.lse.get()) {
            (Some(lse), _) => lse,
            (None, Some(lse)) => lse.as_slice::<T>()?,
            (None, None) => candle_core::bail!("landmark_attention: backward without forward"),
        };
        let [dq, dk, dv] = Arch::new().dispatch(Backward { problem: &problem, out: out.data, lse, dout });
        let device = tensors[0].device();
        Ok([
            Tensor::from_vec(dq, tensors[0].shape(), device)?,
            Tensor::from_vec(dk, tensors[1].shape(), device)?,
            Tensor::from_vec(dv, tensors[2].shape(), device)?,
        ])
    }
}

impl CustomOp3 for Fused {
    fn name(&self) -> &'static str {
        "landmark_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = q_layout.shape().clone();
        let out = match q.dtype() {
            DType::F32 => {
                self.forward::<f32>([(q.as_slice()?, q_layout), (k.as_slice()?, k_layout), (v.as_slice()?, v_layout)])?
            }
            DType::F64 => {
                self.forward::<f64>([(q.as_slice()?, q_layout), (k.as_slice()?, k_layout), (v.as_slice()?, v_layout)])?
            }
            other => candle_core::bail!("landmark_attention: dtype {other:?} has no kernel"),
        };
        Ok((out, shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dout = if dout.layout().stride()[3] == 1 { dout.clone() } else { dout.contiguous()? };
        let tensors = [q, k, v, out, &dout];
        let [dq, dk, dv] = match q.dtype() {
            DType::F32 => self.backward::<f32>(tensors)?,
            _ => self.backward::<f64>(tensors)?,
        };
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}

/// What the kernels compute with: f32 for the half types, and the channels of a head side by side.
fn operand(x: &Tensor) -> candle_core::Result<Tensor> {
    let x = x.to_dtype(if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 })?;
    if x.layout().stride()[3] == 1 { Ok(x) } else { x.contiguous() }
}

/// Runs the fused kernels on tensors of any supported type: outputs `[batch, heads, q_len, head_dim]`, differentiable, and
/// natural log-sum-exps `[batch, heads, q_len]` of the outer softmax in f32 (f64 for f64), which are not; both with the keys
/// [outside](crate::outside), if there are some.
pub(crate) fn attend(
    call: Call,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    outside: Option<&Tensor>,
) -> candle_core::Result<(Tensor, Tensor)> {
    let dtype = q.dtype();
    let (q, k, v) = (operand(q)?, operand(k)?, operand(v)?);
    let (lse, shape) = (Arc::new(OnceLock::new()), (call.batch, call.heads, call.q_len));
    let joined = Joined::default();
    let out = q.apply_op3(&k, &v, Fused { call, lse: lse.clone(), joined: joined.clone() })?;
    let lse = match lse.get() {
        Some(CpuStorage::F32(lse)) => Tensor::from_slice(lse, shape, q.device())?,
        Some(CpuStorage::F64(lse)) => Tensor::from_slice(lse, shape, q.device())?,
        _ => candle_core::bail!("landmark_attention: the forward pass left no log-sum-exp"),
    };
    let [out, lse] = match outside {
        Some(outside) => outside::join(&out, &lse, outside, joined)?,
        None => [out, lse],
    };
    Ok((out.to_dtype(dtype)?, lse))
}

/// The gradients of q, k and v.
pub(crate) fn gradients(
    call: Call,
    [q, k, v, out, dout]: [&Tensor; 5],
    lse: &Tensor,
) -> candle_core::Result<[Tensor; 3]> {
    let lse = match lse.dtype() {
        DType::F64 => CpuStorage::F64(lse.flatten_all()?.to_vec1()?),
        _ => CpuStorage::F32(lse.flatten_all()?.to_vec1()?),
    };
    let fused = Fused { call, lse: Arc::new(OnceLock::from(lse)), joined: Joined::default() };
    let (out, dtype) = (operand(out)?.contiguous()?, q.dtype());
    let tensors = [&operand(q)?, &operand(k)?, &operand(v)?, &out, &operand(dout)?];
    let [dq, dk, dv] = match tensors[0].dtype() {
        DType::F64 => fused.backward::<f64>(tensors)?,
        _ => fused.backward::<f32>(tensors)?,
    };
    Ok([dq.to_dtype(dtype)?, dk.to_dtype(dtype)?, dv.to_dtype(dtype)?])
}
