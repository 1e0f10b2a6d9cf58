//! Probabilities of tokens: of all that the model could have gone on with, as its loss counts them.

use crate::ApiError;
use landmark_data::Tokenizer;

/// A token and how likely it was.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token's text.
    pub token: String,
    /// The logarithm of its probability; none for the first of a text.
    pub logprob: Option<f64>,
    /// The likeliest tokens with theirs, if some are asked for.
    pub top: Option<Vec<(String, f64)>>,
    /// Where its text begins in the choice's, in characters.
    pub offset: usize,
}

impl TokenLogprob {
    /// With what [`logprob`] told, if there was something to tell.
    pub fn new(
        tokenizer: &Tokenizer,
        token: u32,
        known: Option<(f64, Vec<(u32, f64)>)>,
        offset: usize,
    ) -> Result<Self, ApiError> {
        let text = |token: u32| tokenizer.decode(&[token]).map_err(anyhow::Error::from);
        let (logprob, top) = match known {
            None => (None, None),
            Some((logprob, top)) => {
                let top: Vec<(String, f64)> = top
                    .into_iter()
                    .map(|(token, logprob)| Ok((text(token)?, logprob)))
                    .collect::<Result<_, ApiError>>()?;
                (Some(logprob), Some(top))
            }
        };
        Ok(Self { token: text(token)?, logprob, top, offset })
    }
}

/// The logarithm of a token's probability by its logits, and those of the `most` likeliest tokens that are allowed.
pub fn logprob(logits: &[f32], token: u32, most: usize, allowed: impl Fn(u32) -> bool) -> (f64, Vec<(u32, f64)>) {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |largest, &logit| largest.max(logit));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let of = |logit: f32| f64::from(logit - largest) - sum.ln();
    let mut ranked: Vec<(u32, f32)> =
        if most == 0 { Vec::new() } else { (0..).zip(logits.iter().copied()).filter(|(id, _)| allowed(*id)).collect() };
    let by_rank = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if ranked.len() > most {
        ranked.select_nth_unstable_by(most - 1, by_rank);
        ranked.truncate(most);
    }
    ranked.sort_unstable_by(by_rank);
    (of(logits[token as usize]), ranked.into_iter().map(|(id, logit)| (id, of(logit))).collect())
}

#[cfg(test)]
mod tests {

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let logits = [1f32, 3., 2., 3., -1.];
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let (logprob, top) = super::logprob(&logits, 2, 2, |id| id != 3);
        assert!((logprob - (2. - total.ln())).abs() < 1e-6);
        assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!((top[0].1 - (3. - total.ln())).abs() < 1e-6);
        assert!(super::logprob(&logits, 0, 0, |_| true).1.is_empty());
        assert_eq!(super::logprob(&logits, 0, 9, |_| true).1.len(), 5);
    }
}
