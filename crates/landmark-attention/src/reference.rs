//! The definition of landmark attention, with plain tensor operations: the executable specification. Differentiable, any
//! float dtype, any device; its memory is O(T^2), so it is for tests, for golden values and for reading.
//!
//! For one query `i` with scores `s_j = scale * q_i . k_j` (paper, section 3.1):
//!
//! 1. its *own* block is the unfinished block that it is in; a landmark query closes its own block;
//! 2. the *outer* softmax runs over the ordinary tokens `j <= i` of the own block and the landmarks of all earlier blocks;
//! 3. the *inner* softmax of each earlier block runs over the block's ordinary tokens;
//! 4. an ordinary token weighs `outer[j]` in the own block and `outer[landmark] * inner[j]` in an earlier one; a landmark
//!    weighs nothing, so its value never reaches the output.
//!
//! Example: blocks of 3, `a b L c d L e f`, query `f`. Outer: `{L0, L1, e, f}`. Weights: `a, b` share `outer[L0]` as their
//! inner softmax says, `c, d` share `outer[L1]`, `e` and `f` have their outer weights; they sum to 1.
//!
//! Shapes: B batch, H query heads, T queries, S keys, C blocks, L longest block, D head_dim.

use candle_core::{D, DType, Device, Tensor};

use crate::call::Call;
use crate::{Error, LandmarkParams, Result, Softmax};

/// Attention of `q` `[B, H, T, D]` over `k`, `v` `[B, kv_heads, S, D]`, the queries being the last `T` of the `S` positions;
/// returns `[B, H, T, D]`. Errors are those of [`landmark_attention`](fn@crate::landmark_attention); dropout is refused.
pub fn landmark_attention(q: &Tensor, k: &Tensor, v: &Tensor, params: &LandmarkParams) -> Result<Tensor> {
    let call = Call::check(q, k, v, params)?;
    call.refuse_dropout()?;
    attend(&call, q, k, v, None)
}

/// [`landmark_attention`] with a *context-miss token* (paper, appendix on retrieving fewer blocks): one more candidate of the
/// outer softmax, with a score per query, `[B, H, T, 1]`, and no value. `controlled` is a mask `[B, S]` of u8 that names the landmarks
/// which only a context miss opens: those have a softmax of their own, and its weights are multiplied by the token's.
pub fn landmark_attention_with_context_miss(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    params: &LandmarkParams,
    miss_score: &Tensor,
    controlled: &Tensor,
) -> Result<Tensor> {
    let call = Call::check(q, k, v, params)?;
    call.refuse_dropout()?;
    attend(&call, q, k, v, Some((miss_score, controlled)))
}

/// [`landmark_attention`] with keys outside the window, see
/// [`landmark_attention_with_outside`](crate::landmark_attention_with_outside): one more candidate of the outer softmax, without a value. The
/// grouped softmax alone.
pub fn landmark_attention_with_outside(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    params: &LandmarkParams,
    outside: &Tensor,
) -> Result<Tensor> {
    if params.softmax != Softmax::Grouped {
        let (op, got) = ("reference::landmark_attention_with_outside", format!("{:?}", params.softmax));
        return Err(Error::Param { op, name: "softmax", got, expected: "the grouped one" });
    }
    // Which is what a context-miss token is that controls no landmark.
    let controlled = Tensor::zeros((k.dims()[0], k.dims()[2]), DType::U8, k.device())?;
    landmark_attention_with_context_miss(q, k, v, params, &outside.unsqueeze(D::Minus1)?, &controlled)
}

fn attend(call: &Call, q: &Tensor, k: &Tensor, v: &Tensor, miss: Option<(&Tensor, &Tensor)>) -> Result<Tensor> {
    let in_dtype = q.dtype();
    let dtype = if matches!(in_dtype, DType::F16 | DType::BF16) { DType::F32 } else { in_dtype };
    let mut rows = Vec::with_capacity(call.batch);
    for b in 0..call.batch {
        let row = |x: &Tensor| -> Result<Tensor> { Ok(x.get(b)?.to_dtype(dtype)?) };
        let kv_head = |x: Tensor| -> Result<Tensor> {
            let group = call.heads / call.kv_heads;
            let (kv_heads, s, d) = x.dims3()?;
            Ok(x.unsqueeze(1)?.broadcast_as((kv_heads, group, s, d))?.reshape((call.heads, s, d))?)
        };
        let (q_htd, k_hsd, v_hsd) = (row(q)?, kv_head(row(k)?)?, kv_head(row(v)?)?);
        let scores_hts = (q_htd.contiguous()?.matmul(&k_hsd.t()?.contiguous()?)? * call.scale)?;
        let miss = match miss {
            Some((score, controlled)) => Some((row(score)?, controlled.get(b)?.to_vec1::<u8>()?)),
            None => None,
        };
        rows.push(attend_row(call, b, &scores_hts, &v_hsd, miss)?.to_dtype(in_dtype)?);
    }
    Ok(Tensor::stack(&rows, 0)?)
}

/// One row of the batch: scores `[H, T, S]` and values `[H, S, D]` to outputs `[H, T, D]`.
fn attend_row(
    call: &Call,
    b: usize,
    scores_hts: &Tensor,
    v_hsd: &Tensor,
    miss: Option<(Tensor, Vec<u8>)>,
) -> Result<Tensor> {
    let (t, s, device) = (call.q_len, call.kv_len, scores_hts.device());
    let landmarks = call.landmarks(b);
    let is_landmark = |j: &usize| landmarks.binary_search(j).is_ok();
    let position = |i: usize| s - t + i;
    // Pass 1: the first position of each query's own block, right after the last landmark before the query.
    let own_start = |i: usize| match landmarks.partition_point(|&l| l < position(i)) {
        0 => 0,
        n => landmarks[n - 1] + 1,
    };
    let mask = |f: &dyn Fn(usize, usize) -> bool| -> Result<Tensor> {
        let cells: Vec<u8> = (0..t).flat_map(|i| (0..s).map(move |j| (i, j))).map(|(i, j)| f(i, j) as u8).collect();
        Ok(Tensor::from_vec(cells, (1, t, s), device)?)
    };
    if call.softmax != Softmax::Grouped {
        let seen = mask(&|i, j| match call.softmax {
            Softmax::NoMem => j <= position(i) && !(j == position(i) && is_landmark(&j)),
            _ => j <= position(i) && !is_landmark(&j),
        })?;
        let (weights_hts, _) = masked_softmax(scores_hts, &seen, None)?;
        return Ok(weights_hts.matmul(&v_hsd.contiguous()?)?);
    }

    // Pass 2: the outer softmax, over the own block's ordinary tokens and the landmarks of earlier blocks.
    let own = mask(&|i, j| own_start(i) <= j && j <= position(i) && !is_landmark(&j))?;
    let earlier_landmark = |i: usize, j: usize| j < own_start(i) && is_landmark(&j);
    let (outer_hts, landmark_weight_hts) = match miss {
        None => {
            let outer =
                mask(&|i, j| (own_start(i) <= j && j <= position(i) && !is_landmark(&j)) || earlier_landmark(i, j))?;
            let (outer_hts, _) = masked_softmax(scores_hts, &outer, None)?;
            (outer_hts.clone(), outer_hts)
        }
        Some((miss_score_ht1, controlled)) => {
            let open = mask(&|i, j| {
                (own_start(i) <= j && j <= position(i) && !is_landmark(&j))
                    || (earlier_landmark(i, j) && controlled[j] == 0)
            })?;
            let (outer_hts, miss_ht1) = masked_softmax(scores_hts, &open, Some(&miss_score_ht1))?;
            let shut = mask(&|i, j| earlier_landmark(i, j) && controlled[j] != 0)?;
            let (shut_hts, _) = masked_softmax(scores_hts, &shut, None)?;
            let weight_hts = (&outer_hts + shut_hts.broadcast_mul(&miss_ht1)?)?;
            (outer_hts, weight_hts)
        }
    };
    let own_hts = outer_hts.broadcast_mul(&own.to_dtype(outer_hts.dtype())?)?;
    let mut out_htd = own_hts.matmul(&v_hsd.contiguous()?)?;
    if landmarks.is_empty() {
        return Ok(out_htd);
    }

    // Pass 3: the inner softmax of every block, over its ordinary tokens, laid side by side and padded to the longest.
    let starts: Vec<usize> = std::iter::once(0).chain(landmarks.iter().map(|l| l + 1)).collect();
    let (c, l) =
        (landmarks.len(), landmarks.iter().zip(&starts).map(|(end, start)| end - start).max().unwrap_or(0).max(1));
    let (mut index, mut ordinary) = (vec![0u32; c * l], vec![0u8; c * l]);
    for (block, (&start, &end)) in starts.iter().zip(landmarks).enumerate() {
        for (n, j) in (start..end).enumerate() {
            (index[block * l + n], ordinary[block * l + n]) = (j as u32, 1);
        }
    }
    let index = Tensor::from_vec(index, c * l, device)?;
    let ordinary = Tensor::from_vec(ordinary, (1, 1, c, l), device)?;
    let scores_htcl = scores_hts.contiguous()?.index_select(&index, 2)?.reshape((call.heads, t, c, l))?;
    let (inner_htcl, _) = masked_softmax(&scores_htcl, &ordinary, None)?;

    // Pass 4: a block's share times the inner weights, and the values they belong to.
    let places = Tensor::from_iter(landmarks.iter().map(|&l| l as u32), device)?;
    let earlier = mask(&earlier_landmark)?.to_dtype(scores_hts.dtype())?;
    let share_htc = landmark_weight_hts.broadcast_mul(&earlier)?.index_select(&places, 2)?;
    let weights_htj = inner_htcl.broadcast_mul(&share_htc.unsqueeze(D::Minus1)?)?.reshape((call.heads, t, c * l))?;
    out_htd = (out_htd + weights_htj.matmul(&v_hsd.contiguous()?.index_select(&index, 1)?)?)?;
    Ok(out_htd)
}

/// Softmax over the last dimension of the entries where `mask` is not 0 (and of `extra`, one more entry per row); all zeros
/// where a row has none.
fn masked_softmax(scores: &Tensor, mask: &Tensor, extra: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let low = Tensor::new(-1e30f32, &Device::Cpu)?.to_device(scores.device())?.to_dtype(scores.dtype())?;
    let mask = mask.broadcast_as(scores.shape())?;
    let scores = mask.where_cond(scores, &low.broadcast_as(scores.shape())?)?;
    // Any shift gives the same softmax; the maximum keeps exp in range, and is no part of the gradient.
    let mut max = scores.max_keepdim(D::Minus1)?.detach();
    if let Some(extra) = extra {
        max = max.maximum(&extra.detach())?;
    }
    let exp = scores.broadcast_sub(&max)?.exp()?.mul(&mask.to_dtype(scores.dtype())?)?;
    let extra_exp = match extra {
        Some(extra) => (extra - &max)?.exp()?,
        None => max.zeros_like()?,
    };
    // The largest entry counts 1, so a sum under one half belongs to an empty row.
    let sum = (exp.sum_keepdim(D::Minus1)? + &extra_exp)?.maximum(0.5)?;
    Ok((exp.broadcast_div(&sum)?, (extra_exp / sum)?))
}
