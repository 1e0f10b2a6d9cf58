//! How a model reads the tokens of a batch: the reference's `--optimization_process`.

use crate::error::Result;
use crate::model::{Read, Training};
use candle_core::{Device, Tensor};
use landmark_attention::Dropout;
use landmark_data::{Batch, IGNORE};
use landmark_memory::XlCache;
use landmark_models::gpt::{Gpt, WindowAttention};
use landmark_models::ops::Recording;
use serde::{Deserialize, Serialize};

/// How a model reads a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Process {
    /// Each row is one window.
    #[default]
    Landmark,
    /// Each row is a longer piece of text, read window by window. A window also sees the last tokens before it, whose keys and
    /// values no gradient passes through (Dai et al., 2019). Every window has its own loss, and the gradients of all add up,
    /// as the reference's `train_xl` has it.
    TransformerXl {
        /// Tokens of a row. The last window is shorter where windows do not fill it.
        total_sequence_length: usize,
        /// Tokens before a window that it sees. More than `sequence_length` are those of several windows.
        mem_cache_size: usize,
    },
}

impl Process {
    /// Runs a model over a batch, for a training step or to evaluate it. `each` is given every window that has targets, in order.
    pub(crate) fn read(
        &self,
        model: &Gpt,
        batch: &Batch,
        training: Option<Training>,
        mut each: impl FnMut(Read) -> Result<()>,
    ) -> Result<()> {
        let config = model.config();
        let length = batch.sequence_length;
        let &Self::TransformerXl { mem_cache_size, .. } = self else {
            let window = Window::new(batch, 0, length)?;
            let negatives = training.as_ref().and_then(|training| Some((training.negatives?, batch.exercises)));
            let seed = training.as_ref().map(|training| training.seed);
            let mut attention = WindowAttention::with_negatives(config, &window.ids, seed, negatives)?;
            let recording = training.map(|training| Recording::start(&training.rounded));
            let hidden = model.hidden(&window.ids, &mut attention, seed)?;
            return each(Read { hidden, targets: window.targets, weights: window.weights, recording });
        };
        let mut cache = XlCache::new(config.n_layer, mem_cache_size, config.rope());
        for (index, from) in (0..length).step_by(config.sequence_length).enumerate() {
            let window = Window::new(batch, from, length.min(from + config.sequence_length))?;
            let seed = training.as_ref().map(|training| mix(training.seed, index as u64));
            let weights = config.dropout as f32;
            cache.set_dropout(seed.filter(|_| weights > 0.).map(|seed| Dropout { weights, groups: 0., seed }));
            let recording = training.as_ref().map(|training| Recording::start(&training.rounded));
            let hidden = model.hidden(&window.ids, &mut cache, seed)?;
            if window.has_targets {
                each(Read { hidden, targets: window.targets, weights: window.weights, recording })?;
            }
        }
        Ok(())
    }
}

/// Columns of a batch, on the CPU, where ids are checked.
pub(crate) struct Window {
    pub ids: Tensor,
    pub targets: Tensor,
    pub weights: Option<Tensor>,
    has_targets: bool,
}

impl Window {
    pub fn new(batch: &Batch, from: usize, to: usize) -> Result<Self> {
        fn columns<T: Copy>(batch: &Batch, of: &[T], from: usize, to: usize) -> Vec<T> {
            of.chunks(batch.sequence_length).flat_map(|row| &row[from..to]).copied().collect()
        }
        let ids = |of: &[u32]| columns(batch, of, from, to);
        let (ids, targets) = (ids(&batch.inputs), ids(&batch.targets));
        let has_targets = targets.iter().any(|&target| target != IGNORE);
        let shape = (batch.rows, to - from);
        let weights = batch.weights.as_ref().map(|weights| columns(batch, weights, from, to));
        let weights = weights.map(|weights| Tensor::from_vec(weights, shape, &Device::Cpu)).transpose()?;
        let tensor = |ids: Vec<u32>| Tensor::from_vec(ids, shape, &Device::Cpu);
        Ok(Self { ids: tensor(ids)?, targets: tensor(targets)?, weights, has_targets })
    }
}

/// A seed out of a seed and a number, by SplitMix64: neighbours come out unrelated.
pub(crate) fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
