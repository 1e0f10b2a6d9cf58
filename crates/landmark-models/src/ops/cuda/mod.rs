//! The operations on NVIDIA GPUs.

use candle_core::{DType, Tensor};

use super::{Dropout, Mlp, NormKind, TokenScore};
use crate::{Error, Result};

fn refused<T>(op: &'static str, x: &Tensor) -> Result<T> {
    Err(Error::Device { op, tensor: "x", got: format!("{:?}", x.device().location()) })
}

pub fn norm(x: &Tensor, _: NormKind, _: &Tensor, _: Option<&Tensor>, _: DType) -> Result<Tensor> {
    refused("norm", x)
}

pub fn linear(x: &Tensor, _: &Tensor, _: Option<&Tensor>) -> Result<Tensor> {
    refused("linear", x)
}

pub fn project_heads(x: &Tensor, _: &Tensor, _: Option<&Tensor>, _: usize) -> Result<[Tensor; 3]> {
    refused("project_heads", x)
}

pub fn merge_heads(x: &Tensor, _: &Tensor, _: Option<&Tensor>, _: &Tensor, _: Option<Dropout>) -> Result<Tensor> {
    refused("merge_heads", x)
}

pub fn mlp(x: &Tensor, _: &Mlp, _: &Tensor, _: Option<Dropout>) -> Result<Tensor> {
    refused("mlp", x)
}

pub fn embedding(w: &Tensor, _: &Tensor) -> Result<Tensor> {
    refused("embedding", w)
}

pub fn cross_entropy(x: &Tensor, _: &Tensor, _: &Tensor, _: Option<&Tensor>) -> Result<Tensor> {
    refused("cross_entropy", x)
}

pub fn token_scores(x: &Tensor, _: &Tensor, _: &Tensor) -> Result<Vec<Option<TokenScore>>> {
    refused("token_scores", x)
}
