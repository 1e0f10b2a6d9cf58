//! Attention inside the training window.

use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor};
use landmark_attention::{
    Attend, AttendBackward, Dropout, LandmarkParams, Landmarks, Rope, Rotation, Softmax, landmark_attention,
    landmark_attention_backward, landmark_attention_with_lse, landmark_attention_with_outside, reference,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::config::{GptConfig, PositionalEncoder, SoftmaxFunc, Variant};
use super::negatives::{Distances, NegativeRows, Negatives};
use crate::ops::{self, mix64};
use crate::{Error, Result};

const OP: &str = "WindowAttention";

/// Attention over one batch of whole windows, for training and for evaluation inside the window: what it keeps is a function of the
/// batch's token ids, so there is one for each batch.
#[derive(Debug, Clone)]
pub struct WindowAttention {
    batch: usize,
    time: usize,
    rotation: Rotation,
    params: LandmarkParams,
    seed: u64,
    miss: Option<ContextMiss>,
    negatives: Option<Negatives>,
}

/// What a context-miss token adds.
#[derive(Debug, Clone)]
struct ContextMiss {
    /// Position -1, where the token's key is.
    rotation: Rotation,
    /// `[B, T]` of u8: the landmarks that only a context miss opens.
    controlled: Tensor,
}

impl WindowAttention {
    /// For the windows `ids` `[B, T]` (u32), T at most the configuration's `sequence_length`. With a seed this is a training step, and what is
    /// random in training is drawn from it: attention dropout, jumps of the positions, control by the context-miss token.
    pub fn new(config: &GptConfig, ids: &Tensor, seed: Option<u64>) -> Result<Self> {
        Self::with_negatives(config, ids, seed, None)
    }

    /// [`WindowAttention::new`] for a training step in which rows see the landmarks of others as [`NegativeRows`] says, in a batch whose first
    /// so many rows are exercises.
    pub fn with_negatives(
        config: &GptConfig,
        ids: &Tensor,
        seed: Option<u64>,
        negatives: Option<(NegativeRows, usize)>,
    ) -> Result<Self> {
        config.validate()?;
        let (batch, time) = window(ids, config.sequence_length)?;
        let ids = ops::ids(OP, "ids", ids)?;
        let has_landmarks = config.model != Variant::BaseRotary;
        let is_landmark: Vec<u8> = ids.iter().map(|&id| (has_landmarks && id == config.landmark_id) as u8).collect();
        let softmax = match config.softmax_func {
            _ if !has_landmarks => Softmax::NoMem,
            SoftmaxFunc::MemOpt => Softmax::Grouped,
            SoftmaxFunc::NoMem => Softmax::NoMem,
            SoftmaxFunc::IgnoreMem => Softmax::IgnoreMem,
        };
        let (weights, groups) = (config.dropout as f32, config.group_dropout.unwrap_or(0.) as f32);
        let params = LandmarkParams {
            softmax,
            dropout: seed.filter(|_| weights > 0. || groups > 0.).map(|seed| Dropout {
                weights,
                groups,
                seed: mix64(seed),
            }),
            ..LandmarkParams::new(landmarks(&is_landmark, batch, time)?)
        };
        let rope = config.rope();
        // Positions jump at the tokens, whatever attention makes of them.
        let is_landmark_token: Vec<u8> = ids.iter().map(|&id| (id == config.landmark_id) as u8).collect();
        let rotation = rotation(&rope, positions(config, &is_landmark_token, time, seed));
        let miss = match config.model {
            Variant::LandmarkWithCmt => {
                let controlled = controlled(config, &is_landmark, seed);
                let controlled = Tensor::from_vec(controlled, (batch, time), &Device::Cpu)?;
                Some(ContextMiss { rotation: rope.at(&[-1]), controlled })
            }
            _ => None,
        };
        let negatives = match (negatives, seed) {
            (Some((options, exercises)), Some(seed)) => {
                let of = Distances { rope, window: config.sequence_length, mem_freq: config.mem_freq };
                Negatives::new(&options, &of, &is_landmark, time, exercises, seed)?
            }
            _ => None,
        };
        Ok(Self { batch, time, rotation, params, seed: seed.unwrap_or(0), miss, negatives })
    }

    /// For the windows `ids` of a model that has nothing but landmarks, or not even those: `rope` of their length, a landmark's id, the most
    /// positions of a window; in a training step, by its seed, what rows see of others, of which the first so many are exercises.
    pub(crate) fn with_rope(
        rope: impl FnOnce(usize) -> Rope,
        landmark: Option<u32>,
        longest: usize,
        ids: &Tensor,
        negatives: Option<(NegativeRows, Distances, usize, u64)>,
    ) -> Result<Self> {
        let (batch, time) = window(ids, longest)?;
        let ids = ops::ids(OP, "ids", ids)?;
        let is_landmark: Vec<u8> = ids.iter().map(|&id| (Some(id) == landmark) as u8).collect();
        let rotation = rotation(&rope(time), (0..time as i64).collect());
        let params = LandmarkParams::new(landmarks(&is_landmark, batch, time)?);
        let negatives = match negatives {
            Some((options, of, exercises, seed)) => Negatives::new(&options, &of, &is_landmark, time, exercises, seed)?,
            None => None,
        };
        Ok(Self { batch, time, rotation, params, seed: 0, miss: None, negatives })
    }

    /// The parameters for a layer: each draws its own dropout.
    fn params(&self, layer: usize) -> LandmarkParams {
        let mut params = self.params.clone();
        if let Some(dropout) = &mut params.dropout {
            dropout.seed = mix64(self.seed ^ mix64(layer as u64));
        }
        params
    }
}

impl Attend for WindowAttention {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, heads, rows, dim) = q.dims4()?;
        let expected = (self.batch, self.time + self.miss.is_some() as usize);
        if (batch, rows) != expected {
            let expected = format!("[{}, heads, {}, head_dim], as the ids it was made for", expected.0, expected.1);
            return Err(Error::Shape { op: OP, tensor: "q", got: q.dims().to_vec(), expected }.into());
        }
        let params = self.params(layer);
        let Some(miss) = &self.miss else {
            let (rotated_q, rotated_k) = (self.rotation.apply(q)?, self.rotation.apply(k)?);
            let Some(negatives) = &self.negatives else {
                return Ok(landmark_attention(&rotated_q, &rotated_k, v, &params)?);
            };
            let outside = negatives.outside(q, k, params.scale.unwrap_or(1. / (dim as f64).sqrt()))?;
            return Ok(landmark_attention_with_outside(&rotated_q, &rotated_k, v, &params, &outside)?);
        };
        // Row 0 is the token. It asks for nothing and has no value: its key is one more candidate of every query.
        let rest = |x: &Tensor| x.narrow(2, 1, rows - 1);
        let (q, v) = (self.rotation.apply(&rest(q)?)?, rest(v)?);
        let miss_key = miss.rotation.apply(&k.narrow(2, 0, 1)?)?;
        let scale = params.scale.unwrap_or(1. / (dim as f64).sqrt());
        let score = (q.matmul(&miss_key.t()?)? * scale)?;
        let k = self.rotation.apply(&rest(k)?)?;
        let out = reference::landmark_attention_with_context_miss(
            &q,
            &k,
            &v,
            &params,
            &score,
            &miss.controlled.to_device(q.device())?,
        )?;
        Tensor::cat(&[&Tensor::zeros((batch, heads, 1, dim), out.dtype(), out.device())?, &out], 2)
    }

    fn attend_with_backward(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Option<(Tensor, AttendBackward)>> {
        let plain = self.miss.is_none() && self.negatives.is_none();
        if !plain || (q.dim(0)?, q.dim(2)?) != (self.batch, self.time) {
            return Ok(None);
        }
        let (params, back, v) = (self.params(layer), self.rotation.inverse(), v.clone());
        let (q, k) = (self.rotation.apply(q)?, self.rotation.apply(k)?);
        let (out, lse) = landmark_attention_with_lse(&q, &k, &v, &params)?;
        let result = out.clone();
        let backward = move |dout: &Tensor| -> candle_core::Result<[Tensor; 3]> {
            let [dq, dk, dv] = landmark_attention_backward([&q, &k, &v], &params, &out, &lse, dout)?;
            Ok([back.apply(&dq)?, back.apply(&dk)?, dv])
        };
        Ok(Some((result, Box::new(backward))))
    }

    fn again(&self) -> Option<Box<dyn Attend + Send>> {
        Some(Box::new(self.clone()))
    }
}

/// Batch and time of windows of at most `longest` positions.
fn window(ids: &Tensor, longest: usize) -> Result<(usize, usize)> {
    match *ids.dims() {
        [batch, time] if time <= longest && ids.elem_count() > 0 => Ok((batch, time)),
        _ => {
            let expected = format!("[batch, 1..={longest}], the model's window");
            Err(Error::Shape { op: OP, tensor: "ids", got: ids.dims().to_vec(), expected })
        }
    }
}

/// Where the landmarks stand: at regular places, which is the fast path, if they do in every row.
fn landmarks(is_landmark: &[u8], batch: usize, time: usize) -> Result<Landmarks> {
    let Some(block) = is_landmark.iter().position(|&l| l != 0).map(|first| first % time + 1) else {
        return Ok(Landmarks::None);
    };
    let regular = is_landmark.iter().enumerate().all(|(i, &l)| (l != 0) == (i % time + 1).is_multiple_of(block));
    if regular && block >= 2 {
        return Ok(Landmarks::Every(block));
    }
    Ok(Landmarks::Mask(Tensor::from_vec(is_landmark.to_vec(), (batch, time), &Device::Cpu)?))
}

/// The rotation for these positions. The last one is kept: the windows of a run have the same ones, and a GPU would wait for the sines at every
/// step.
fn rotation(rope: &Rope, positions: Vec<i64>) -> Rotation {
    static LAST: Mutex<Option<(Rope, Vec<i64>, Rotation)>> = Mutex::new(None);
    // What a panic elsewhere left behind is whole.
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    match &*last {
        Some((of, at, rotation)) if (of, at) == (rope, &positions) => rotation.clone(),
        _ => last.insert((rope.clone(), positions.clone(), rope.at(&positions))).2.clone(),
    }
}

/// The positions of the tokens: `[T]` for all rows, or `[B * T]` with the jumps of a training step.
fn positions(config: &GptConfig, is_landmark: &[u8], time: usize, seed: Option<u64>) -> Vec<i64> {
    let jump = config.pos_jump_on_mem.unwrap_or(0);
    let (Some(seed), PositionalEncoder::RotaryMemJump, 1..) = (seed, config.positional_encoder, jump) else {
        return (0..time as i64).collect();
    };
    let mut rng = ChaCha8Rng::seed_from_u64(mix64(seed ^ JUMPS));
    let mut positions = Vec::with_capacity(is_landmark.len());
    for row in is_landmark.chunks(time) {
        let mut ahead = 0;
        for (place, &is_landmark) in row.iter().enumerate() {
            positions.push(place as i64 + ahead);
            if is_landmark != 0 {
                ahead += below(&mut rng, jump) as i64;
            }
        }
    }
    positions
}

/// Which landmarks only a context miss opens.
fn controlled(config: &GptConfig, is_landmark: &[u8], seed: Option<u64>) -> Vec<u8> {
    let (Some(seed), Some(p)) = (seed, config.under_rem_score_prob) else {
        return vec![0; is_landmark.len()];
    };
    let mut rng = ChaCha8Rng::seed_from_u64(mix64(seed ^ CONTROL));
    let mut draw = || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    is_landmark.iter().map(|&l| (l != 0 && draw() < p) as u8).collect()
}

/// Tell the draws of one seed apart.
const JUMPS: u64 = 0x6a75_6d70;
const CONTROL: u64 = 0x6d69_7373;

/// A number below `n`; the bias of the multiplication is under 2^-32.
pub(super) fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    ((rng.next_u64() as u128 * n as u128) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GptConfig {
        let positional_encoder = PositionalEncoder::RotaryMemJump;
        GptConfig {
            positional_encoder,
            pos_jump_on_mem: Some(10),
            landmark_id: 90,
            vocab_size: 96,
            ..GptConfig::default()
        }
    }

    #[test]
    fn landmarks_at_the_same_regular_places_take_the_fast_path() {
        let of = |rows: &[u8], time: usize| landmarks(rows, rows.len() / time, time).unwrap();
        assert!(matches!(of(&[0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0], 7), Landmarks::Every(3)));
        assert!(matches!(of(&[0, 0, 0, 0], 2), Landmarks::None));
        // Other places in the second row; landmarks side by side; the second of the first row missing; at the start.
        for rows in
            [[0, 1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0, 0, 0]]
        {
            assert!(matches!(of(&rows, 4), Landmarks::Mask(_)), "{rows:?}");
        }
        // The first landmark is in the second row.
        assert!(matches!(of(&[0, 0, 0, 1], 2), Landmarks::Mask(_)));
    }

    #[test]
    fn positions_jump_after_landmarks_in_training_alone() {
        let is_landmark = [0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0];
        assert_eq!(positions(&config(), &is_landmark, 6, None), [0, 1, 2, 3, 4, 5]);
        let drawn = positions(&config(), &is_landmark, 6, Some(1));
        assert_eq!(drawn, positions(&config(), &is_landmark, 6, Some(1)));
        assert_ne!(drawn, positions(&config(), &is_landmark, 6, Some(2)));
        for (row, is_landmark) in drawn.chunks(6).zip(is_landmark.chunks(6)) {
            assert_eq!(row[0], 0);
            for i in 1..6 {
                let step = row[i] - row[i - 1];
                assert!(if is_landmark[i - 1] != 0 { (1..=10).contains(&step) } else { step == 1 }, "{drawn:?}");
            }
        }
    }

    #[test]
    fn control_is_a_share_of_the_landmarks() {
        let config = GptConfig { model: Variant::LandmarkWithCmt, under_rem_score_prob: Some(0.3), ..config() };
        let is_landmark: Vec<u8> = (0..10_000).map(|i| (i % 2) as u8).collect();
        let drawn = controlled(&config, &is_landmark, Some(5));
        assert!(drawn.iter().zip(&is_landmark).all(|(c, l)| c <= l));
        let share = drawn.iter().map(|&c| c as f64).sum::<f64>() / 5000.;
        assert!((share - 0.3).abs() < 0.03, "{share}");
        assert!(controlled(&config, &is_landmark, None).iter().all(|&c| c == 0));
    }
}
