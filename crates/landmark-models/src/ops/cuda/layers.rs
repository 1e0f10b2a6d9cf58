//! The operations of a layer, and the embedding.

use std::ffi::c_int;

use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Tensor};

use super::gemm::{Matrix, product};
use super::{Address, CudaStream_, ElementType, Fresh, address, run};
use crate::ops::elements::{check_shape, ids, rows_and_width};
use crate::ops::heads::Layout;
use crate::ops::linear::{LowRank, Map, check_weight};
use crate::ops::record::{Gradient, Tape, bridge, in_type, parts};
use crate::ops::{Activation, Dropout, Mlp};
use crate::{Error, Result};

/// Columns that a thread of the activations' kernels takes at once.
const PACK: usize = 4;

/// A matrix of a contiguous tensor.
fn matrix(op: &'static str, name: &'static str, x: &Tensor, rows: usize, cols: usize) -> Result<Matrix> {
    Ok(Matrix::new(address(op, name, x)?, ElementType::of(op, name, x.dtype())?, rows, cols))
}

fn without_dropout(op: &'static str, dropout: Option<Dropout>) -> Result<()> {
    match dropout {
        None => Ok(()),
        Some(dropout) => {
            let expected = "none: only the CPU's operations drop".to_string();
            Err(Error::Value { op, name: "dropout", got: dropout.p.to_string(), expected })
        }
    }
}

/// See [`crate::ops::linear`] and [`crate::ops::linear_onto`].
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
    biased("linear", affine("linear", x, w, b, residual)?, b)
}

fn biased(op: &'static str, y: Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let Some(b) = b else { return Ok(y) };
    check_shape(op, "bias", b, &[y.dims()[y.rank() - 1]])?;
    bridge([&y, b], |[y, b]| y.broadcast_add(&b.to_dtype(y.dtype())?))
}

/// `x w^T` in the type of `x`, or `residual + x w^T` in that of the residual. The bias is only checked.
fn affine(op: &'static str, x: &Tensor, w: &Tensor, b: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
    let [y] = maps(op, x, [Map { w, b, low: None }], residual)?;
    Ok(y)
}

/// A part of [`maps`] with what its backward needs.
struct Kept {
    n_out: usize,
    /// Of x's type.
    w: Tensor,
    learns: bool,
    /// A and B of x's type, `scale x A^T`, the rank and the scale.
    low: Option<(Tensor, Tensor, Tensor, usize, f64)>,
}

/// See [`crate::ops::linears`]; with a residual, which one map alone may have, what it gives is added to it, in its type. Biases are only
/// checked. The gradient of x is summed up by the products themselves.
fn maps<const N: usize>(
    op: &'static str,
    x: &Tensor,
    maps: [Map<'_>; N],
    residual: Option<&Tensor>,
) -> Result<[Tensor; N]> {
    assert!(N == 1 || residual.is_none(), "what is added belongs to one map");
    let (n, n_in) = rows_and_width(op, "x", x)?;
    let device = x.device().as_cuda_device()?.clone();
    let x = x.contiguous()?;
    let residual = residual.map(|residual| residual.contiguous()).transpose()?;
    let parameters =
        |map: &Map<'_>| [Some(map.w.clone()), map.low.map(|low| low.a.clone()), map.low.map(|low| low.b.clone())];
    let parameters: Vec<Tensor> = maps.iter().flat_map(parameters).flatten().collect();
    let inputs: Vec<&Tensor> = std::iter::once(&x).chain(&parameters).chain(&residual).collect();
    let tape = Tape::new(op, &inputs)?;
    let dtype = residual.as_ref().map_or(x.dtype(), Tensor::dtype);
    let x_ni = matrix(op, "x", &x, n, n_in)?;
    let (mut outputs, mut kept) = (Vec::with_capacity(N), Vec::with_capacity(N));
    for Map { w, b, low } in maps {
        let n_out = check_weight(op, "w", w, b, n_in)?;
        let shape = [&x.dims()[..x.rank() - 1], &[n_out]].concat();
        let added = match &residual {
            None => None,
            Some(residual) => {
                check_shape(op, "residual", residual, &shape)?;
                Some(address(op, "residual", residual)?)
            }
        };
        let weight = in_type(w, x.dtype())?;
        let y = Fresh::new(&device, shape, dtype)?;
        let out = Matrix::new(y.address, ElementType::of(op, "residual", dtype)?, n, n_out);
        // SAFETY: all are live contiguous allocations of the sizes that were checked.
        unsafe { product(&device, x_ni, matrix(op, "w", &weight, n_out, n_in)?.t(), out, added)? };
        let low = match low {
            None => None,
            Some(LowRank { a, b, scale }) => {
                let r = check_weight(op, "a", a, None, n_in)?;
                check_shape(op, "b", b, &[n_out, r])?;
                let (a, b) = (in_type(a, x.dtype())?, in_type(b, x.dtype())?);
                let low = Fresh::new(&device, (n, r), x.dtype())?.tensor();
                let low_nr = matrix(op, "x", &low, n, r)?;
                let a_ri = matrix(op, "a", &a, r, n_in)?;
                // SAFETY: as above; the second product adds to what the first one of this map gave.
                unsafe {
                    product(&device, x_ni.times(scale), a_ri.t(), low_nr, None)?;
                    product(&device, low_nr, matrix(op, "b", &b, n_out, r)?.t(), out, Some(y.address))?;
                }
                Some((a, b, low, r, scale))
            }
        };
        kept.push(Kept { n_out, w: weight, learns: tape.wants(w), low });
        outputs.push(y.output());
    }
    let (adds, wants_x) = (residual.is_some(), tape.wants(&x));
    let outputs = outputs.try_into().unwrap_or_else(|_| unreachable!("one for each map"));
    tape.finish_rounded(outputs, move |gradients| {
        let dx = Fresh::new(&device, x.shape(), x.dtype())?;
        let x_ni = matrix(op, "x", &x, n, n_in)?;
        let dx_ni = Matrix::new(dx.address, x_ni.dtype, n, n_in);
        let mut so_far = None;
        let (mut of_parameters, mut of_residual) = (Vec::new(), None);
        for (gradient, Kept { n_out, w, learns, low }) in gradients.into_iter().zip(&kept) {
            let n_out = *n_out;
            let dy = match gradient {
                Some(Gradient { rounded: Some(rounded), whole }) if rounded.dtype() == x.dtype() => {
                    of_residual = Some(whole);
                    rounded
                }
                Some(Gradient { whole, .. }) => {
                    of_residual = Some(whole.clone());
                    whole.to_dtype(x.dtype())?.contiguous()?
                }
                // Nobody asked for this one.
                None => Tensor::zeros((n, n_out), x.dtype(), x.device())?,
            };
            let dy_no = matrix(op, "dy", &dy, n, n_out)?;
            let mut add_to_dx = |a, b| match wants_x {
                // SAFETY: here and below, live contiguous allocations of the sizes that were checked.
                true => unsafe { product(&device, a, b, dx_ni, so_far.replace(dx_ni.address)) },
                false => Ok(()),
            };
            let weight_gradient = |dy, x, rows, cols| -> Result<Tensor> {
                let dw = Fresh::new(&device, (rows, cols), DType::F32)?;
                // SAFETY: as above.
                unsafe { product(&device, dy, x, Matrix::new(dw.address, ElementType::F32, rows, cols), None)? };
                Ok(dw.tensor())
            };
            add_to_dx(dy_no, matrix(op, "w", w, n_out, n_in)?)?;
            of_parameters.push(if *learns { weight_gradient(dy_no.t(), x_ni, n_out, n_in)? } else { w.clone() });
            if let Some((a, b, low, r, scale)) = low {
                let d_low = Fresh::new(&device, (n, *r), x.dtype())?;
                let d_low_nr = Matrix::new(d_low.address, x_ni.dtype, n, *r);
                // SAFETY: as above.
                unsafe { product(&device, dy_no.times(*scale), matrix(op, "b", b, n_out, *r)?, d_low_nr, None)? };
                add_to_dx(d_low_nr, matrix(op, "a", a, *r, n_in)?)?;
                of_parameters.push(weight_gradient(d_low_nr.t(), x_ni, *r, n_in)?);
                of_parameters.push(weight_gradient(dy_no.t(), matrix(op, "x", low, n, *r)?, n_out, *r)?);
            }
        }
        let mut all = vec![dx.tensor().into()];
        all.extend(of_parameters.into_iter().map(Gradient::from));
        if adds {
            all.push(of_residual.expect("a node is reached through its only result").into());
        }
        Ok(all)
    })
}

/// See [`crate::ops::linears`].
pub fn linears<const N: usize>(x: &Tensor, each: [Map<'_>; N], residual: Option<&Tensor>) -> Result<[Tensor; N]> {
    const OP: &str = "linears";
    let biases = each.map(|map| map.b);
    let ys = maps(OP, x, each, residual)?;
    let ys = ys.into_iter().zip(biases).map(|(y, b)| biased(OP, y, b)).collect::<Result<Vec<_>>>()?;
    Ok(ys.try_into().expect("one for each map"))
}

/// See [`crate::ops::project_heads`].
pub fn project_heads(x: &Tensor, w: &Tensor, b: Option<&Tensor>, heads: usize) -> Result<[Tensor; 3]> {
    const OP: &str = "project_heads";
    let layout = Layout::of_projection(OP, x, w, b, heads)?;
    let y = biased(OP, affine(OP, x, w, b, None)?, b)?.contiguous()?;
    let cut = |y: &Tensor| Ok([layout.view(y, 0)?, layout.view(y, 1)?, layout.view(y, 2)?]);
    parts(&y, cut, move |grads| {
        let grads = grads.iter().map(|grad| grad.as_ref().map(Tensor::contiguous).transpose());
        let grads = grads.collect::<candle_core::Result<Vec<_>>>()?;
        Ok(layout.merge_on_gpu(OP, &grads.iter().map(Option::as_ref).collect::<Vec<_>>())?.tensor())
    })
}

/// See [`crate::ops::merge_heads`].
pub fn merge_heads(
    o: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    residual: &Tensor,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    const OP: &str = "merge_heads";
    without_dropout(OP, dropout)?;
    let layout = Layout::of_heads(OP, o)?;
    let o = o.contiguous()?;
    let tape = Tape::new(OP, &[&o])?;
    let merged = layout.merge_on_gpu(OP, &[Some(&o)])?;
    let merged = tape.finish_one(merged.output(), move |dy| Ok(vec![layout.view(&dy.contiguous()?, 0)?]))?;
    biased(OP, affine(OP, &merged, w, b, Some(residual))?, b)
}

/// See [`crate::ops::mlp`].
pub fn mlp(x: &Tensor, mlp: &Mlp, residual: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    const OP: &str = "mlp";
    without_dropout(OP, dropout)?;
    let (n, width) = rows_and_width(OP, "x", x)?;
    let (_, hidden) = mlp.check(width)?;
    if !hidden.is_multiple_of(PACK) {
        let expected = format!("columns in a multiple of {PACK} on a GPU");
        return Err(Error::Shape { op: OP, tensor: "down", got: mlp.down.dims().to_vec(), expected });
    }
    let up = biased(OP, affine(OP, x, &mlp.up, mlp.up_bias.as_ref(), None)?, mlp.up_bias.as_ref())?.contiguous()?;
    let activation = Activate { gated: mlp.activation == Activation::Swiglu, rows: n, width: hidden };
    let shape = [&x.dims()[..x.rank() - 1], &[hidden]].concat();
    let device = x.device().as_cuda_device()?.clone();
    let tape = Tape::new(OP, &[&up])?;
    let act = Fresh::new(&device, shape.as_slice(), up.dtype())?;
    activation.launch(&device, &up, None, act.address)?;
    let act = tape.finish_one(act.output(), move |dy| {
        let d_up = Fresh::new(&device, up.shape(), up.dtype())?;
        activation.launch(&device, &up, Some(&dy.contiguous()?), d_up.address)?;
        Ok(vec![d_up.tensor()])
    })?;
    let b = mlp.down_bias.as_ref();
    biased(OP, affine(OP, &act, &mlp.down, b, Some(residual))?, b)
}

/// See [`crate::ops::split_heads`].
pub fn split_heads(x: &Tensor, layout: Layout) -> Result<Tensor> {
    const OP: &str = "split_heads";
    let x = x.contiguous()?;
    let cut = |x: &Tensor| Ok([layout.view(x, 0)?]);
    let [heads] = parts(&x, cut, move |grads| {
        let grad = grads[0].as_ref().expect("a node is reached through its only result").contiguous()?;
        Ok(layout.merge_on_gpu(OP, &[Some(&grad)])?.tensor())
    })?;
    Ok(heads)
}

/// See [`crate::ops::join_heads`].
pub fn join_heads(o: &Tensor, layout: Layout) -> Result<Tensor> {
    const OP: &str = "join_heads";
    let o = o.contiguous()?;
    let tape = Tape::new(OP, &[&o])?;
    let joined = layout.merge_on_gpu(OP, &[Some(&o)])?;
    tape.finish_one(joined.output(), move |dy| Ok(vec![layout.view(&dy.contiguous()?, 0)?]))
}

/// See [`crate::ops::swiglu`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu";
    let (rows, width) = rows_and_width(OP, "gate", gate)?;
    check_shape(OP, "up", up, gate.dims())?;
    if !width.is_multiple_of(PACK) || up.dtype() != gate.dtype() {
        let expected = format!("columns in a multiple of {PACK} on a GPU, of the type of up");
        return Err(Error::Shape { op: OP, tensor: "gate", got: gate.dims().to_vec(), expected });
    }
    let dtype = ElementType::of(OP, "gate", gate.dtype())?;
    let device = gate.device().as_cuda_device()?.clone();
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let launch = move |device: &CudaDevice, gate: &Tensor, up: &Tensor, dy: Address, out: Address, d_up: Address| {
        let (gate, up) = (address(OP, "gate", gate)?, address(OP, "up", up)?);
        run(OP, device, |stream| {
            // SAFETY: live contiguous allocations of these sizes and this type.
            unsafe { landmark_swiglu(gate, up, dy, out, d_up, dtype, rows as i64, width as c_int, stream) }
        })
    };
    let tape = Tape::new(OP, &[&gate, &up])?;
    let y = Fresh::new(&device, gate.shape(), gate.dtype())?;
    launch(&device, &gate, &up, 0, y.address, 0)?;
    tape.finish_one(y.output(), move |dy| {
        let dy = dy.contiguous()?;
        let [d_gate, d_up] = [(); 2].map(|()| Fresh::new(&device, gate.shape(), gate.dtype()));
        let (d_gate, d_up) = (d_gate?, d_up?);
        launch(&device, &gate, &up, address(OP, "dy", &dy)?, d_gate.address, d_up.address)?;
        Ok(vec![d_gate.tensor(), d_up.tensor()])
    })
}

#[derive(Clone, Copy)]
struct Activate {
    gated: bool,
    rows: usize,
    width: usize,
}

impl Activate {
    fn launch(self, device: &CudaDevice, x: &Tensor, dy: Option<&Tensor>, out: Address) -> Result<()> {
        const OP: &str = "mlp";
        let dtype = ElementType::of(OP, "x", x.dtype())?;
        let (x, dy) = (address(OP, "x", x)?, dy.map_or(Ok(0), |dy| address(OP, "dy", dy))?);
        let Self { gated, rows, width } = self;
        run(OP, device, |stream| {
            // SAFETY: live contiguous allocations of these sizes and this type.
            unsafe { landmark_activation(gated.into(), x, dy, out, dtype, rows as i64, width as c_int, stream) }
        })
    }
}

impl Layout {
    /// Part i of those that lie side by side in `x` `[B, T, n H D]`, as `[B, H, T, D]`; nothing moves.
    fn view(self, x: &Tensor, i: usize) -> candle_core::Result<Tensor> {
        let Self { batch, heads, time, dim } = self;
        x.reshape((batch, time, (), heads, dim))?.get_on_dim(2, i)?.transpose(1, 2)
    }

    /// Parts `[B, H, T, D]` side by side, `[B, T, n H D]`; a part that is not there is zeros.
    fn merge_on_gpu(self, op: &'static str, parts: &[Option<&Tensor>]) -> Result<Fresh> {
        let Self { batch, heads, time, dim } = self;
        let like = parts.iter().flatten().next().expect("one part at least");
        let device = like.device().as_cuda_device()?;
        let whole = Fresh::new(device, (batch, time, parts.len() * heads * dim), like.dtype())?;
        let part = |i: usize| match parts.get(i) {
            Some(Some(part)) => address(op, "grad", part),
            _ => Ok(0),
        };
        let (a, b, c, n) = (part(0)?, part(1)?, part(2)?, parts.len() as c_int);
        let [batch, heads, time, dim] = [batch, heads, time, dim].map(|size| size as c_int);
        let bytes = like.dtype().size_in_bytes() as c_int;
        ElementType::of(op, "x", like.dtype())?;
        run(op, device, |stream| {
            // SAFETY: live contiguous allocations of these sizes.
            unsafe { landmark_merge_heads(whole.address, a, b, c, n, batch, heads, time, dim, bytes, stream) }
        })?;
        Ok(whole)
    }
}

/// See [`crate::ops::embedding`]; f32. The tokens are best on the CPU: they are checked and sorted there.
pub fn embedding(w: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    const OP: &str = "embedding";
    let &[vocab, width] = w.dims() else {
        return Err(Error::Shape { op: OP, tensor: "w", got: w.dims().to_vec(), expected: "[vocab, width]".into() });
    };
    let ids = ids(OP, "tokens", tokens)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        let expected = format!("ids below {vocab}");
        return Err(Error::Value { op: OP, name: "tokens", got: id.to_string(), expected });
    }
    if ids.is_empty() || w.dtype() != DType::F32 {
        return Err(Error::DType { op: OP, tensor: "w", got: w.dtype(), expected: "f32, and tokens".into() });
    }
    let device = w.device().as_cuda_device()?.clone();
    let tape = Tape::new(OP, &[w])?;
    let y = Fresh::new(&device, [tokens.dims(), &[width]].concat(), DType::F32)?;
    let (n, c) = (ids.len() as c_int, width as c_int);
    let (w_at, ids_on_device) = (address(OP, "w", w)?, uploaded(&ids, w)?);
    let ids_at = address(OP, "tokens", &ids_on_device)?;
    run(OP, &device, |stream| {
        // SAFETY: live contiguous allocations of these sizes; the ids are rows of w.
        unsafe { landmark_gather_rows(w_at, ids_at, y.address, n, c, stream) }
    })?;
    tape.finish_adding(y.output(), move |dy, so_far| {
        let dy = dy.contiguous()?;
        // Here and not before: on the way back the processor is ahead of the GPU.
        let [places, piece_starts, ids, token_starts] = Pieces::of(&ids).on_device(&dy)?;
        let (pieces, tokens) = (piece_starts.elem_count() - 1, ids.elem_count());
        let dw = match so_far {
            Some(so_far) => so_far.contiguous()?,
            None => Tensor::zeros((vocab, width), DType::F32, dy.device())?,
        };
        let sums = Fresh::new(&device, (pieces, width), DType::F32)?;
        let at = |x: &Tensor| address(OP, "dy", x);
        let (dy_at, dw_at) = (at(&dy)?, at(&dw)?);
        let [places_at, piece_starts, ids_at, token_starts] =
            [at(&places)?, at(&piece_starts)?, at(&ids)?, at(&token_starts)?];
        run(OP, &device, |stream| {
            let (pieces, tokens) = (pieces as c_int, tokens as c_int);
            // SAFETY: live contiguous allocations; the lists name rows of dy, of sums and of dw.
            unsafe {
                landmark_scatter_rows(
                    dy_at,
                    places_at,
                    piece_starts,
                    pieces,
                    ids_at,
                    token_starts,
                    tokens,
                    sums.address,
                    dw_at,
                    c,
                    stream,
                )
            }
        })?;
        Ok(vec![dw.into()])
    })
}

fn uploaded(ids: &[u32], beside: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_slice(ids, ids.len(), beside.device())?)
}

/// The places of each token in a text, in pieces that are short enough to be summed side by side.
struct Pieces {
    /// Places in the text, by token and then by place.
    places: Vec<u32>,
    /// Where each piece starts in `places`, and the end.
    piece_starts: Vec<u32>,
    /// The tokens that occur.
    ids: Vec<u32>,
    /// Where each token starts in the pieces, and the end.
    token_starts: Vec<u32>,
}

impl Pieces {
    fn of(ids: &[u32]) -> Self {
        const PIECE: u32 = 32;
        let mut sorted: Vec<u64> = ids.iter().zip(0u64..).map(|(&id, place)| (id as u64) << 32 | place).collect();
        sorted.sort_unstable();
        let mut pieces = Self {
            places: sorted.iter().map(|entry| *entry as u32).collect(),
            piece_starts: Vec::new(),
            ids: Vec::new(),
            token_starts: Vec::new(),
        };
        for (index, entry) in (0u32..).zip(&sorted) {
            let id = (entry >> 32) as u32;
            if pieces.ids.last() != Some(&id) {
                pieces.ids.push(id);
                pieces.token_starts.push(pieces.piece_starts.len() as u32);
                pieces.piece_starts.push(index);
            } else if index - pieces.piece_starts.last().expect("the token's first piece") == PIECE {
                pieces.piece_starts.push(index);
            }
        }
        pieces.token_starts.push(pieces.piece_starts.len() as u32);
        pieces.piece_starts.push(ids.len() as u32);
        pieces
    }

    /// The lists in their order.
    fn on_device(&self, beside: &Tensor) -> Result<[Tensor; 4]> {
        let Self { places, piece_starts, ids, token_starts } = self;
        let up = |list: &[u32]| uploaded(list, beside);
        Ok([up(places)?, up(piece_starts)?, up(ids)?, up(token_starts)?])
    }
}

unsafe extern "C" {
    fn landmark_merge_heads(
        whole: Address,
        part0: Address,
        part1: Address,
        part2: Address,
        n: c_int,
        batch: c_int,
        heads: c_int,
        time: c_int,
        dim: c_int,
        bytes: c_int,
        stream: *mut CudaStream_,
    ) -> c_int;
    fn landmark_activation(
        gated: c_int,
        x: Address,
        dy: Address,
        out: Address,
        dtype: ElementType,
        rows: i64,
        width: c_int,
        stream: *mut CudaStream_,
    ) -> c_int;
    fn landmark_swiglu(
        gate: Address,
        up: Address,
        dy: Address,
        out: Address,
        d_up: Address,
        dtype: ElementType,
        rows: i64,
        width: c_int,
        stream: *mut CudaStream_,
    ) -> c_int;
    fn landmark_gather_rows(
        w: Address,
        ids: Address,
        y: Address,
        n: c_int,
        width: c_int,
        stream: *mut CudaStream_,
    ) -> c_int;
    fn landmark_scatter_rows(
        dy: Address,
        places: Address,
        piece_starts: Address,
        pieces: c_int,
        ids: Address,
        token_starts: Address,
        tokens: c_int,
        sums: Address,
        dw: Address,
        width: c_int,
        stream: *mut CudaStream_,
    ) -> c_int;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_place_once_and_in_order() {
        let ids: Vec<u32> = (0..1000).map(|i| if i % 3 == 0 { 7 } else { i % 11 }).collect();
        let pieces = Pieces::of(&ids);
        let mut seen = vec![false; ids.len()];
        for (index, &id) in pieces.ids.iter().enumerate() {
            let mut before = None;
            for piece in pieces.token_starts[index]..pieces.token_starts[index + 1] {
                let (from, to) = (pieces.piece_starts[piece as usize], pieces.piece_starts[piece as usize + 1]);
                assert!((1..=32).contains(&(to - from)));
                for &place in &pieces.places[from as usize..to as usize] {
                    assert_eq!(ids[place as usize], id);
                    assert!(before < Some(place) && !std::mem::replace(&mut seen[place as usize], true));
                    before = Some(place);
                }
            }
        }
        assert!(seen.into_iter().all(|seen| seen));
    }
}
