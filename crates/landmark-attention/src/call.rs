//! A call of the operation after its arguments were checked: shapes, scale, and the landmarks of each row as places.

use candle_core::{DType, Tensor};

use crate::{Dropout, Error, LandmarkParams, Landmarks, Result, Softmax};

const OP: &str = "landmark_attention";

/// A valid call.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    pub scale: f64,
    pub softmax: Softmax,
    pub dropout: Option<Dropout>,
    /// Places of the landmarks, ascending: one list a row, or one for all rows.
    landmarks: Vec<Vec<usize>>,
}

impl Call {
    pub fn check(q: &Tensor, k: &Tensor, v: &Tensor, params: &LandmarkParams) -> Result<Self> {
        let shape = |tensor: &'static str, x: &Tensor, expected: String| Error::Shape {
            op: OP,
            tensor,
            got: x.dims().to_vec(),
            expected,
        };
        let (batch, heads, q_len, head_dim) =
            q.dims4().map_err(|_| shape("q", q, "[batch, heads, q_len, head_dim]".into()))?;
        let (kv_batch, kv_heads, kv_len, kv_dim) =
            k.dims4().map_err(|_| shape("k", k, "[batch, kv_heads, kv_len, head_dim]".into()))?;
        if q.elem_count() == 0 {
            return Err(shape("q", q, "at least one element in each dimension".into()));
        }
        if kv_batch != batch || kv_dim != head_dim || kv_len < q_len {
            return Err(shape("k", k, format!("[{batch}, kv_heads, kv_len >= {q_len}, {head_dim}]")));
        }
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(shape("k", k, format!("a number of kv_heads that divides the {heads} heads of q")));
        }
        if v.dims() != k.dims() {
            return Err(shape("v", v, format!("{:?}, as k", k.dims())));
        }
        for (tensor, x) in [("q", q), ("k", k), ("v", v)] {
            if !matches!(x.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16) || x.dtype() != q.dtype() {
                let expected = "f32, bf16, f16 or f64, the same for q, k and v".to_string();
                return Err(Error::DType { op: OP, tensor, got: x.dtype(), expected });
            }
            if !x.device().same_device(q.device()) {
                let expected = format!("{:?}, as q", q.device().location());
                return Err(Error::Device { op: OP, tensor, got: x.device().location(), expected });
            }
        }
        let scale = params.scale.unwrap_or(1. / (head_dim as f64).sqrt());
        if !scale.is_finite() {
            return Err(Error::Param { op: OP, name: "scale", got: scale.to_string(), expected: "a finite number" });
        }
        if let Some(dropout) = params.dropout {
            for (name, p) in [("dropout.weights", dropout.weights), ("dropout.groups", dropout.groups)] {
                if !(0. ..1.).contains(&p) {
                    return Err(Error::Param { op: OP, name, got: p.to_string(), expected: "a probability in [0, 1)" });
                }
            }
        }
        let landmarks = places(&params.landmarks, batch, kv_len)?;
        let (softmax, dropout) = (params.softmax, params.dropout);
        Ok(Self { batch, heads, kv_heads, q_len, kv_len, head_dim, scale, softmax, dropout, landmarks })
    }

    /// Places of the landmarks in row `b`, ascending.
    pub fn landmarks(&self, b: usize) -> &[usize] {
        &self.landmarks[b.min(self.landmarks.len() - 1)]
    }

    /// Checks what the call gave, and the gradient of its output.
    pub fn check_results(&self, q: &Tensor, like_q: [(&'static str, &Tensor); 2], lse: &Tensor) -> Result<()> {
        let sum = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let like_q = like_q.map(|(tensor, x)| (tensor, x, q.dims(), q.dtype()));
        let lse = ("lse", lse, &q.dims()[..3], sum);
        for (tensor, x, dims, dtype) in like_q.into_iter().chain([lse]) {
            if x.dims() != dims {
                return Err(Error::Shape { op: OP, tensor, got: x.dims().to_vec(), expected: format!("{dims:?}") });
            }
            if x.dtype() != dtype {
                return Err(Error::DType { op: OP, tensor, got: x.dtype(), expected: format!("{dtype:?}") });
            }
            if !x.device().same_device(q.device()) {
                let expected = format!("{:?}, as q", q.device().location());
                return Err(Error::Device { op: OP, tensor, got: x.device().location(), expected });
            }
        }
        Ok(())
    }

    pub fn refuse_dropout(&self) -> Result<()> {
        match self.dropout {
            Some(d) if d.weights > 0. || d.groups > 0. => Err(Error::Param {
                op: "reference::landmark_attention",
                name: "dropout",
                got: format!("{d:?}"),
                expected: "none: the reference is deterministic",
            }),
            _ => Ok(()),
        }
    }
}

fn places(landmarks: &Landmarks, batch: usize, kv_len: usize) -> Result<Vec<Vec<usize>>> {
    match landmarks {
        Landmarks::None => Ok(vec![vec![]]),
        &Landmarks::Every(block) if block < 2 => {
            Err(Error::Param { op: OP, name: "block", got: block.to_string(), expected: "at least 2" })
        }
        &Landmarks::Every(block) => Ok(vec![(block - 1..kv_len).step_by(block).collect()]),
        Landmarks::Mask(mask) if mask.dims() != [batch, kv_len] => {
            let expected = format!("[{batch}, {kv_len}]");
            Err(Error::Shape { op: OP, tensor: "landmarks", got: mask.dims().to_vec(), expected })
        }
        Landmarks::Mask(mask) if mask.dtype() != DType::U8 => {
            Err(Error::DType { op: OP, tensor: "landmarks", got: mask.dtype(), expected: "u8".into() })
        }
        Landmarks::Mask(mask) => {
            let rows = mask.to_vec2::<u8>()?;
            let places = |row: Vec<u8>| row.iter().enumerate().filter(|(_, m)| **m != 0).map(|(j, _)| j).collect();
            Ok(rows.into_iter().map(places).collect())
        }
    }
}
