//! What training asks of a model, and of the description that it is made from.

use crate::checkpoint::Checkpoints;
use crate::error::Result;
use crate::settings::Settings;
use candle_core::{DType, Device, Tensor, Var};
use landmark_data::{Batch, Border};
use landmark_models::gpt::NegativeRows;
use landmark_models::ops::{Recording, Rounded, TokenScore};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::path::Path;

/// A model that learns.
pub trait Model: Sized {
    /// What it is made from.
    type Recipe: Recipe<Model = Self>;

    /// What learns, by name.
    fn parameters(&self) -> &BTreeMap<String, Var>;

    /// Whether weight decay applies to a parameter.
    fn decays(name: &str, var: &Var) -> bool;

    /// The type of the activations.
    fn activations(&self) -> DType;

    /// The same, keeping the inputs of layers alone between forward and backward, if that is asked for.
    fn with_activation_checkpointing(self, on: bool) -> Self;

    /// The same parameters in a model that leaves no graph: for evaluation.
    fn detached(&self) -> Self;

    /// Runs over a batch, for a training step or to evaluate it. `each` is given every window that has targets, in order.
    fn read(
        &self,
        settings: &Settings<Self::Recipe>,
        batch: &Batch,
        training: Option<Training>,
        each: impl FnMut(Read) -> Result<()>,
    ) -> Result<()>;

    /// The mean cross entropy of `targets` `[B, T]` under hidden states `[B, T, C]`, by `weights` `[B, T]` if there are any.
    fn loss(&self, hidden: &Tensor, targets: &Tensor, weights: Option<&Tensor>) -> Result<Tensor>;

    /// Loss and accuracy target by target.
    fn token_scores(&self, hidden: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>>;

    /// Writes into a checkpoint's folder all that [`Recipe::load`] needs, and who runs the model.
    fn save(&self, folder: &Path) -> Result<()>;

    /// Writes into the folder of a finished run what belongs there beside its checkpoints.
    fn finish(&self, _folder: &Path) -> Result<()> {
        Ok(())
    }
}

/// The part of the settings that describes a model.
pub trait Recipe: Clone + PartialEq + Serialize + DeserializeOwned {
    /// What is made from it.
    type Model: Model<Recipe = Self>;

    /// How the run's checkpoints are named.
    const CHECKPOINTS: Checkpoints;

    /// Refuses values that no run can have, by the name of the flag.
    fn check(settings: &Settings<Self>) -> Result<()>;

    /// How the rows of a batch are laid out.
    fn rows(settings: &Settings<Self>) -> Rows;

    /// The model that a run begins with: with the weights of the one in the folder `from`, if one is given.
    fn init(settings: &Settings<Self>, from: Option<&Path>, device: &Device) -> Result<Self::Model>;

    /// The model of a checkpoint.
    fn load(settings: &Settings<Self>, folder: &Path, device: &Device) -> Result<Self::Model>;
}

/// How the rows of a batch are laid out.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Positions of a row, landmarks included.
    pub length: usize,
    /// The flag that says so.
    pub flag: &'static str,
    /// Ordinary tokens of a block, or the most of them at borders; `None`: no landmarks.
    pub mem_freq: Option<usize>,
    /// The landmark's token.
    pub landmark_id: u32,
    /// Rows of the model's embedding, where they are not what the tokenizer says.
    pub vocab_size: Option<usize>,
    /// Where landmarks are, if not at regular places.
    pub border: Option<Border>,
    /// Whether the token after an end of text is no target.
    pub texts_apart: bool,
}

/// What a training step is read with.
pub struct Training {
    /// Of all that is random in it.
    pub seed: u64,
    /// Rows whose landmarks others see.
    pub negatives: Option<NegativeRows>,
    /// The parameters in the activations' type, if the optimizer keeps them.
    pub rounded: Rounded,
}

/// What a model made of a window.
pub struct Read {
    /// Hidden states `[B, T, C]`.
    pub hidden: Tensor,
    /// `[B, T]`.
    pub targets: Tensor,
    /// `[B, T]`, if the batch has any.
    pub weights: Option<Tensor>,
    /// The way back, in a training step.
    pub recording: Option<Recording>,
}
