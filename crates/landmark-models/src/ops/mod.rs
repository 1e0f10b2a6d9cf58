//! Fused operations, each with its gradient: on the CPU in f32 and f64; with the feature `cuda` also on NVIDIA GPUs, see `cuda`.
//!
//! Why not candle's own: its matrix product zeroes the result first, every elementwise operation is a pass over memory, and
//! each step of a composition costs its gradient a pass over fresh zeros. Here a layer is a handful of operations, each one
//! node of candle's graph, parallel over rows, vectorised for the machine it runs on.
//!
//! All reductions have an order that the shapes alone fix, so results are the same bits from run to run on one machine.

mod blocks;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod dropout;
mod elements;
mod embedding;
mod heads;
mod linear;
mod math;
mod mlp;
mod norm;
mod packed;
mod product;
mod quantized;
mod record;
mod rows;
mod vectorised;

pub use cross_entropy::{IGNORE, TokenScore, cross_entropy, token_scores};
pub use dropout::{Dropout, dropout};
pub use embedding::embedding;
pub use heads::{join_heads, merge_heads, project_heads, split_heads};
pub use linear::{linear, linear_onto};
pub use mlp::{Activation, Mlp, mlp, swiglu};
pub use norm::{NormKind, norm};
pub use record::{Gradients, Recording, Rounded};

pub(crate) use cross_entropy::cross_entropy_with_row;
pub(crate) use cross_entropy::token_scores_by;
pub(crate) use dropout::mix64;
pub(crate) use elements::ids;
pub(crate) use linear::{LowRank, Map, linears};
pub(crate) use quantized::quantized_linear;
pub(crate) use record::{attend, bridge, recomputed};

/// `factor * x`.
pub fn scaled(x: &candle_core::Tensor, factor: f64) -> crate::Result<candle_core::Tensor> {
    bridge([x], |[x]| x * factor)
}

/// Calls a function that is generic over the element type with the type of a tensor.
macro_rules! by_dtype {
    ($op:expr, $name:expr, $tensor:expr, $f:ident($($arg:expr),* $(,)?)) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => $f::<f32>($($arg),*),
            candle_core::DType::F64 => $f::<f64>($($arg),*),
            got => Err(crate::Error::DType { op: $op, tensor: $name, got, expected: "f32 or f64".into() }),
        }
    };
}
use by_dtype;

/// Leaves the function with the GPU's version of the operation if the tensor is not on the CPU.
macro_rules! on_gpu {
    ($tensor:expr, $call:expr) => {
        #[cfg(feature = "cuda")]
        if $tensor.device().is_cuda() {
            return $call;
        }
    };
}
use on_gpu;
