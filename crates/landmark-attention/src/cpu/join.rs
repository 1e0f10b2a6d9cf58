//! Two attentions of the same queries over disjoint keys, each with its log-sum-exp, in one.

use candle_core::{DType, Storage, Tensor, WithDType};
use rayon::prelude::*;

use super::lanes::Real;

/// See [`crate::retrieval::join`]: `a` and `b` are outputs and log-sum-exps of one type, in contiguous memory.
pub(crate) fn join(a: (&Tensor, &Tensor), b: (&Tensor, &Tensor)) -> candle_core::Result<(Tensor, Tensor)> {
    fn run<T: Real + WithDType>(tensors: [&Tensor; 4]) -> candle_core::Result<(Tensor, Tensor)> {
        let guards = tensors.map(|t| t.storage_and_layout());
        let mut slices = Vec::with_capacity(4);
        for ((storage, layout), tensor) in guards.iter().zip(tensors) {
            match &**storage {
                Storage::Cpu(storage) => {
                    slices.push(&storage.as_slice::<T>()?[layout.start_offset()..][..tensor.elem_count()])
                }
                _ => candle_core::bail!("join: expected tensors on the CPU"),
            }
        }
        let d = tensors[0].dims()[3];
        let (mut out, mut lse) = (slices[0].to_vec(), slices[1].to_vec());
        let rows =
            out.par_chunks_exact_mut(d).zip(slices[2].par_chunks_exact(d)).zip(lse.par_iter_mut().zip(slices[3]));
        rows.with_min_len(64).for_each(|((out, other), (lse, &other_lse))| {
            // A query with nothing on either side keeps its zeros: the floor turns -inf - -inf into 0.
            let max = lse.widen().max(other_lse.widen()).max(-1e30);
            let (weight, other_weight) = ((lse.widen() - max).exp(), (other_lse.widen() - max).exp());
            let sum = weight + other_weight;
            let share = |weight: f64| T::cast(weight / sum.max(1e-30));
            let (share, other_share) = (share(weight), share(other_weight));
            out.iter_mut().zip(other).for_each(|(out, &other)| *out = *out * share + other * other_share);
            *lse = T::cast(max + sum.ln());
        });
        let device = tensors[0].device();
        Ok((Tensor::from_vec(out, tensors[0].shape(), device)?, Tensor::from_vec(lse, tensors[1].shape(), device)?))
    }
    match a.0.dtype() {
        DType::F32 => run::<f32>([a.0, a.1, b.0, b.1]),
        _ => run::<f64>([a.0, a.1, b.0, b.1]),
    }
}
