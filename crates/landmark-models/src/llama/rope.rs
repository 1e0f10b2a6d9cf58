//! The rotary frequencies, and the ways in which models stretch them to longer texts.

use std::f64::consts::TAU;

use landmark_attention::{Pairs, Rope};

/// How the frequencies of a model differ from the usual ones: `rope_scaling` of a `config.json`. The formulas are those of
/// `transformers`' `modeling_rope_utils.py`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions are divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with the length of the text, once it is longer than `max_position_embeddings`.
    Dynamic {
        /// How much longer a text the model is asked for, relative to `max_position_embeddings`.
        factor: f64,
    },
    /// LLaMA 3: long waves are stretched, short ones are not, and there is a ramp between.
    Llama3 {
        /// By how much long waves are stretched.
        factor: f64,
        /// Waves that turn fewer times than this in the original window are long.
        low_freq_factor: f64,
        /// Those that turn more often than this are short.
        high_freq_factor: f64,
        /// The window that the model was pretrained with.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al., 2023): the same idea, with a temperature.
    Yarn {
        /// By how much long waves are stretched.
        factor: f64,
        /// The window that the model was pretrained with.
        original_max_position_embeddings: usize,
        /// The factor on queries and keys.
        attention_factor: f64,
        /// Waves that turn more often than this in the original window are short.
        beta_fast: f64,
        /// Those that turn fewer times than this are long.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole channels.
        truncate: bool,
    },
}

impl RopeScaling {
    /// The factor on queries and keys that YaRN's paper proposes, with the ratio of two of them that some models have.
    pub(super) fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
        let of = |mscale: f64| if factor <= 1. { 1. } else { 0.1 * mscale * factor.ln() + 1. };
        match (mscale, mscale_all_dim) {
            (Some(mscale), Some(all)) if mscale != 0. && all != 0. => of(mscale) / of(all),
            _ => of(1.),
        }
    }

    /// The rotary embedding for texts of at most `length` positions, which only [`RopeScaling::Dynamic`] asks for.
    pub(super) fn rope(self, head_dim: usize, theta: f64, max_position_embeddings: usize, length: usize) -> Rope {
        let dim = head_dim as f64;
        let usual = |theta: f64| (0..head_dim / 2).map(move |i| theta.powf(-2. * i as f64 / dim));
        let (frequencies, scale): (Vec<f64>, f64) = match self {
            Self::Default => (usual(theta).collect(), 1.),
            Self::Linear { factor } => (usual(theta).map(|f| f / factor).collect(), 1.),
            Self::Dynamic { factor } => {
                let max = max_position_embeddings as f64;
                let stretch = factor * (length as f64).max(max) / max - (factor - 1.);
                (usual(theta * stretch.powf(dim / (dim - 2.))).collect(), 1.)
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let stretched = |f: f64| {
                    let turns = original_max_position_embeddings as f64 * f / TAU;
                    let short = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    match turns {
                        turns if turns < low_freq_factor => f / factor,
                        turns if turns > high_freq_factor => f,
                        _ => (1. - short) * f / factor + short * f,
                    }
                };
                (usual(theta).map(stretched).collect(), 1.)
            }
            Self::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
            } => {
                // The pair that turns so often in the original window.
                let pair = |turns: f64| {
                    dim * (original_max_position_embeddings as f64 / (turns * TAU)).ln() / (2. * theta.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.), high.min(dim - 1.));
                if low == high {
                    high += 0.001;
                }
                let stretched = |(i, f): (usize, f64)| {
                    let long = ((i as f64 - low) / (high - low)).clamp(0., 1.);
                    f / factor * long + f * (1. - long)
                };
                (usual(theta).enumerate().map(stretched).collect(), attention_factor)
            }
        };
        // As Hugging Face keeps them, in models of any dtype.
        let frequencies = frequencies.into_iter().map(|f| f as f32 as f64).collect();
        Rope::with_frequencies(frequencies, Pairs::Halves).scaled(scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: [f64; 4] = [1., 0.031_622_78, 1e-3, 1.778_279_4e-4];

    const YARN: RopeScaling = RopeScaling::Yarn {
        factor: 4.,
        original_max_position_embeddings: 32_768,
        attention_factor: 1.,
        beta_fast: 32.,
        beta_slow: 1.,
        truncate: true,
    };

    /// Pairs 0, 6, 12 and 15 of 16, from `ROPE_INIT_FUNCTIONS` of transformers 5.24 (theta 10,000, max_position_embeddings 2048).
    #[test]
    fn frequencies_are_those_of_transformers() {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.,
            low_freq_factor: 1.,
            high_freq_factor: 4.,
            original_max_position_embeddings: 16_384,
        };
        let cases = [
            (RopeScaling::Default, 2048, USUAL),
            (RopeScaling::Linear { factor: 2.5 }, 2048, [0.4, 0.012_649_112, 4.000_000_2e-4, 7.113_117_3e-5]),
            (RopeScaling::Dynamic { factor: 2. }, 2048, USUAL),
            (RopeScaling::Dynamic { factor: 2. }, 5000, [1., 0.018_379_828, 3.378_180_6e-4, 4.579_874_4e-5]),
            (llama3, 2048, [1., 0.031_622_78, 5.938_818_2e-4, 2.222_849_3e-5]),
            (YARN, 2048, [1., 0.031_622_78, 5.714_285_6e-4, 4.445_698_5e-5]),
        ];
        for (scaling, length, expected) in cases {
            let rope = scaling.rope(32, 10_000., 2048, length);
            for (pair, expected) in [0, 6, 12, 15].into_iter().zip(expected) {
                let got = rope.frequencies()[pair];
                assert!((got / expected - 1.).abs() < 1e-6, "{scaling:?}, pair {pair}: {got}, expected {expected}");
            }
        }
    }

    #[test]
    fn yarn_has_a_temperature() {
        assert!((RopeScaling::yarn_attention_factor(4., None, None) - 1.138_629_436_111_989).abs() < 1e-12);
        assert_eq!(RopeScaling::yarn_attention_factor(0.5, None, None), 1.);
        let both = RopeScaling::yarn_attention_factor(40., Some(1.), Some(0.5));
        assert!((both - 1.368_887_945_411_393_6 / 1.184_443_972_705_696_8).abs() < 1e-9, "{both}");
    }
}
