//! The configuration of a GPT, as a checkpoint's `config.json` has it.

use landmark_attention::{Pairs, Rope};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The base of the rotary frequencies.
const ROPE_BASE: f64 = 10_000.;

/// Which model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// A plain transformer: dense causal attention, no notion of landmarks.
    #[serde(alias = "base")]
    BaseRotary,
    /// Attention through landmarks, as [`SoftmaxFunc`] says.
    Landmark,
    /// The same with a context-miss token: one more learned token in front, whose key a query can choose over all landmarks.
    LandmarkWithCmt,
}

/// How scores become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SoftmaxFunc {
    /// The grouped softmax of landmark attention. `mem` is another name for it: in the original it named an earlier
    /// implementation of the same function.
    #[serde(alias = "mem")]
    MemOpt,
    /// A plain softmax to which landmarks are tokens like any other.
    #[serde(rename = "nomem")]
    NoMem,
    /// A plain softmax over the ordinary tokens.
    IgnoreMem,
}

/// Where the model believes its tokens to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionalEncoder {
    /// Rotary, at the places in the window.
    Rotary,
    /// Rotary, jumping ahead by a random distance at each landmark in training: see [`GptConfig::pos_jump_on_mem`].
    RotaryMemJump,
}

/// How the residual stream is normalised before it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// LayerNorm, as the authors have it.
    #[default]
    Layer,
    /// RMSNorm, as LLaMA has it.
    Rms,
}

/// The feed-forward half of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MlpKind {
    /// Four times as wide as the stream, with GELU, as the authors have it.
    #[default]
    Gelu,
    /// Gated, 8/3 as wide in multiples of 64, with SiLU, as LLaMA has it.
    Swiglu,
}

/// Where the landmarks of the training data are, and where those of a text are that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// After every `mem_freq` tokens.
    #[default]
    Regular,
    /// At the ends of sentences, and after `mem_freq` tokens at the latest; so are the others.
    Sentence,
    /// After empty lines.
    Paragraph,
    /// At line ends.
    Line,
    /// After items of a program.
    Code,
}

/// A GPT: sizes, kind of attention, and what is random in training. All fields without an `Option` are required in JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GptConfig {
    /// Which model.
    pub model: Variant,
    /// Entries of the vocabulary, the landmark among them.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Heads of a layer; they divide the width into an even number of channels each.
    pub n_head: usize,
    /// Layers.
    pub n_layer: usize,
    /// The training window: the most tokens, landmarks included, that the model sees at once.
    pub sequence_length: usize,
    /// How scores become weights; the base model always takes the plain softmax.
    pub softmax_func: SoftmaxFunc,
    /// Where the model believes its tokens to be.
    pub positional_encoder: PositionalEncoder,
    /// With `rotary_mem_jump`: the position after a landmark is ahead by a random `0..n` (training only).
    pub pos_jump_on_mem: Option<u64>,
    /// Ordinary tokens between landmarks in the training data, or the most of them; none for a model that was trained without.
    pub mem_freq: Option<usize>,
    /// Where the landmarks are.
    #[serde(default)]
    pub landmarks: Placement,
    /// The landmark's token id.
    pub landmark_id: u32,
    /// Probability that training drops an attention weight, or an element of a layer's output.
    pub dropout: f64,
    /// Probability that training hides a whole earlier block from a query.
    pub group_dropout: Option<f64>,
    /// Whether linear maps and normalisations have biases.
    pub bias: bool,
    /// How the stream is normalised.
    #[serde(default)]
    pub norm: Norm,
    /// The feed-forward half of a layer.
    #[serde(default)]
    pub mlp: MlpKind,
    /// Whether queries and keys are normalised head by head (RMSNorm) before they are rotated.
    #[serde(default)]
    pub qk_norm: bool,
    /// With a context-miss token: the probability, for each landmark of a training window, that it opens only by a context
    /// miss. `None`: nothing is controlled.
    pub under_rem_score_prob: Option<f64>,
    /// With a context-miss token: a query whose weight on it is below this retrieves nothing. For the landmark cache; inside the
    /// window nothing is retrieved.
    pub rem_cutoff: Option<f64>,
}

impl Default for GptConfig {
    /// The model of the paper's language-modelling runs.
    fn default() -> Self {
        Self {
            model: Variant::Landmark,
            vocab_size: 50_304,
            n_embd: 1024,
            n_head: 8,
            n_layer: 12,
            sequence_length: 512,
            softmax_func: SoftmaxFunc::MemOpt,
            positional_encoder: PositionalEncoder::Rotary,
            pos_jump_on_mem: None,
            mem_freq: Some(50),
            landmarks: Placement::Regular,
            landmark_id: 50_260,
            dropout: 0.,
            group_dropout: None,
            bias: false,
            norm: Norm::Layer,
            mlp: MlpKind::Gelu,
            qk_norm: false,
            under_rem_score_prob: None,
            rem_cutoff: None,
        }
    }
}

impl GptConfig {
    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.n_embd / self.n_head
    }

    /// Width between up and down of the feed-forward half.
    pub fn n_hidden(&self) -> usize {
        match self.mlp {
            MlpKind::Gelu => 4 * self.n_embd,
            MlpKind::Swiglu => (8 * self.n_embd / 3).next_multiple_of(64),
        }
    }

    /// The rotary embedding of the heads.
    pub fn rope(&self) -> Rope {
        Rope::new(self.head_dim(), ROPE_BASE, Pairs::Interleaved)
    }

    /// Checks every field against its range and the others.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field, got: String, expected: &str| Err(Error::Config { field, got, expected: expected.into() });
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("n_embd", self.n_embd),
            ("n_head", self.n_head),
            ("n_layer", self.n_layer),
            ("sequence_length", self.sequence_length),
        ];
        if let Some((field, size)) = sizes.into_iter().find(|(_, size)| *size == 0 || *size > 1 << 31) {
            return wrong(field, size.to_string(), "between 1 and 2^31");
        }
        // The names of all layers' parameters are in memory before one of them is looked for.
        if self.n_layer > 1 << 14 {
            return wrong("n_layer", self.n_layer.to_string(), "between 1 and 16384");
        }
        if !self.n_embd.is_multiple_of(2 * self.n_head) {
            let expected = format!("a multiple of 2 * n_head = {}", 2 * self.n_head);
            return wrong("n_embd", self.n_embd.to_string(), &expected);
        }
        let landmarks = self.model != Variant::BaseRotary;
        if landmarks && self.landmark_id as usize >= self.vocab_size {
            let expected = format!("below vocab_size = {}", self.vocab_size);
            return wrong("landmark_id", self.landmark_id.to_string(), &expected);
        }
        if self.bias && self.norm == Norm::Rms {
            return wrong("norm", "rms".into(), "layer with bias, as RMSNorm has none");
        }
        if let Some(mem_freq) = self.mem_freq.filter(|mem_freq| !(1..=1 << 31).contains(mem_freq)) {
            return wrong("mem_freq", mem_freq.to_string(), "between 1 and 2^31");
        }
        if self.landmarks != Placement::Regular && self.mem_freq.is_none() {
            let expected =
                "regular, since there are no landmarks without mem_freq, which is the most tokens of a block";
            return wrong("landmarks", format!("{:?}", self.landmarks), expected);
        }
        if self.pos_jump_on_mem.is_some_and(|n| n > 1 << 32) {
            return wrong("pos_jump_on_mem", format!("{:?}", self.pos_jump_on_mem), "at most 2^32");
        }
        if self.pos_jump_on_mem.is_some_and(|n| n > 0) && self.positional_encoder != PositionalEncoder::RotaryMemJump {
            let expected = "none, since positional_encoder does not jump";
            return wrong("pos_jump_on_mem", format!("{:?}", self.pos_jump_on_mem), expected);
        }
        for (field, p) in [("dropout", Some(self.dropout)), ("group_dropout", self.group_dropout)] {
            if p.is_some_and(|p| !(0. ..1.).contains(&p)) {
                return wrong(field, format!("{p:?}"), "a probability in [0, 1)");
            }
        }
        for (field, p) in [("under_rem_score_prob", self.under_rem_score_prob), ("rem_cutoff", self.rem_cutoff)] {
            if p.is_some_and(|p| !(0. ..=1.).contains(&p)) {
                return wrong(field, format!("{p:?}"), "a probability in [0, 1]");
            }
            if p.is_some_and(|p| p > 0.) && self.model != Variant::LandmarkWithCmt {
                return wrong(field, format!("{p:?}"), "none, since the model has no context-miss token");
            }
        }
        if self.model == Variant::LandmarkWithCmt {
            for (field, p) in [("dropout", self.dropout), ("group_dropout", self.group_dropout.unwrap_or(0.))] {
                if p > 0. {
                    return wrong(field, p.to_string(), "0 with a context-miss token: its attention has no dropout");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_the_authors_names_and_refuses_unknown_keys() {
        let config = GptConfig::default();
        let mut json = serde_json::to_value(&config).unwrap();
        assert_eq!(json["model"], "landmark");
        assert_eq!((&json["softmax_func"], &json["landmarks"]), (&"mem_opt".into(), &"regular".into()));
        assert_eq!(serde_json::from_value::<GptConfig>(json.clone()).unwrap(), config);
        json["model"] = "base".into();
        json["softmax_func"] = "mem".into();
        let aliased: GptConfig = serde_json::from_value(json.clone()).unwrap();
        assert_eq!((aliased.model, aliased.softmax_func), (Variant::BaseRotary, SoftmaxFunc::MemOpt));
        for (variant, name) in [(SoftmaxFunc::NoMem, "nomem"), (SoftmaxFunc::IgnoreMem, "ignore_mem")] {
            assert_eq!(serde_json::to_value(variant).unwrap(), name);
        }
        json["landmarks"] = "sentence".into();
        assert_eq!(serde_json::from_value::<GptConfig>(json.clone()).unwrap().landmarks, Placement::Sentence);
        // Checkpoints from before there was a choice.
        json.as_object_mut().unwrap().remove("landmarks");
        for option in ["norm", "mlp", "qk_norm"] {
            json.as_object_mut().unwrap().remove(option);
        }
        let old = serde_json::from_value::<GptConfig>(json.clone()).unwrap();
        assert_eq!(
            (old.landmarks, old.norm, old.mlp, old.qk_norm),
            (Placement::Regular, Norm::Layer, MlpKind::Gelu, false)
        );
        json["n_heads"] = 3.into();
        assert!(serde_json::from_value::<GptConfig>(json).unwrap_err().to_string().contains("n_heads"));
    }

    #[test]
    fn validate_names_the_field() {
        type Change = fn(&mut GptConfig);
        let cases: [(&str, Change); 15] = [
            ("norm", |c| (c.norm, c.bias) = (Norm::Rms, true)),
            ("vocab_size", |c| c.vocab_size = 0),
            ("n_embd", |c| c.n_embd = 1000),
            ("landmark_id", |c| c.landmark_id = 50_304),
            ("n_layer", |c| c.n_layer = 1 << 20),
            ("mem_freq", |c| c.mem_freq = Some(0)),
            ("mem_freq", |c| c.mem_freq = Some(usize::MAX)),
            ("landmarks", |c| (c.mem_freq, c.landmarks) = (None, Placement::Line)),
            ("pos_jump_on_mem", |c| c.pos_jump_on_mem = Some(10)),
            ("dropout", |c| c.dropout = 1.),
            ("dropout", |c| c.dropout = f64::NAN),
            ("group_dropout", |c| c.group_dropout = Some(-0.1)),
            ("under_rem_score_prob", |c| c.under_rem_score_prob = Some(0.5)),
            ("rem_cutoff", |c| (c.model, c.rem_cutoff) = (Variant::LandmarkWithCmt, Some(1.5))),
            ("group_dropout", |c| (c.model, c.group_dropout) = (Variant::LandmarkWithCmt, Some(0.5))),
        ];
        GptConfig::default().validate().unwrap();
        for (expected, change) in cases {
            let mut config = GptConfig::default();
            change(&mut config);
            assert!(matches!(config.validate(), Err(Error::Config { field, .. }) if field == expected), "{expected}");
        }
    }
}
