//! What a call of landmark attention is told beside its tensors.

use candle_core::Tensor;

/// Where the landmark tokens stand among the keys.
#[derive(Debug, Clone)]
pub enum Landmarks {
    /// Nowhere: plain causal attention.
    None,
    /// Every `block`-th key is a landmark (keys `block - 1`, `2 * block - 1`, ...): a block is `mem_freq = block - 1`
    /// ordinary tokens and the landmark that closes them. At least 2.
    Every(usize),
    /// A mask `[batch, kv_len]` of u8, not 0 at landmarks: any places, any number in each row.
    Mask(Tensor),
}

/// Which softmax turns scores into weights: the authors' `--softmax_func`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Softmax {
    /// `mem_opt`: landmark attention's grouped softmax (paper, section 3.1).
    #[default]
    Grouped,
    /// `nomem`: plain causal softmax over everything. Landmarks are keys like any other; only a landmark query does not see
    /// itself, as in the authors' code.
    NoMem,
    /// `ignore_mem`: plain causal softmax over the ordinary tokens.
    IgnoreMem,
}

/// Dropout inside the operation, for training. Which weights fall is a function of `seed` and their place alone, so the
/// backward pass draws the same again and nothing is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability that a single attention weight is dropped (the authors' `--dropout`), in `[0, 1)`.
    pub weights: f32,
    /// Probability that a query loses a whole earlier block (the authors' `--group_dropout`), in `[0, 1)`.
    pub groups: f32,
    /// Names the draw.
    pub seed: u64,
}

impl Dropout {
    /// What falls with probability `p` does where its hash is below the first number; what is kept is multiplied by the second.
    pub(crate) fn threshold(p: f32) -> (u32, f64) {
        ((p as f64 * 2f64.powi(32)) as u32, 1. / (1. - p as f64))
    }
}

/// The parameters of [`landmark_attention`](crate::landmark_attention).
#[derive(Debug, Clone)]
pub struct LandmarkParams {
    /// Where the landmarks stand.
    pub landmarks: Landmarks,
    /// Which softmax.
    pub softmax: Softmax,
    /// Factor on the scores; `None` is `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
    /// Dropout, in training.
    pub dropout: Option<Dropout>,
}

impl LandmarkParams {
    /// The grouped softmax with the usual scale and no dropout.
    pub fn new(landmarks: Landmarks) -> Self {
        Self { landmarks, softmax: Softmax::Grouped, scale: None, dropout: None }
    }
}
