//! The choice of the next token.

use landmark_data::Sampling;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Flags of sampling, shared by the commands that generate.
#[derive(clap::Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// Divides the logits: below 1 likely tokens become likelier; 0 always takes the likeliest token. Left out, as the two below: what the
    /// model's generation_config.json says, or else 0.8
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Sample from the likeliest tokens that together have this probability; 1: from all. Otherwise 0.95
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Sample from this many of the likeliest tokens; 0: from all. Otherwise 40
    #[arg(long, value_name = "N")]
    pub top_k: Option<usize>,
    /// Decides what is sampled: the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

impl SamplingFlags {
    /// Refuses what is no setting.
    pub fn check(&self) -> anyhow::Result<()> {
        if let Some(temperature) = self.temperature.filter(|t| !is_temperature(*t)) {
            anyhow::bail!("--temperature {temperature}: expected a number from 0");
        }
        if let Some(top_p) = self.top_p.filter(|p| !is_share(*p)) {
            anyhow::bail!("--top_p {top_p}: expected a share above 0, at most 1");
        }
        Ok(())
    }
}

fn is_temperature(temperature: f64) -> bool {
    temperature >= 0. && temperature.is_finite()
}

fn is_share(top_p: f64) -> bool {
    top_p > 0. && top_p <= 1.
}

/// Draws tokens; what it draws is a function of the settings, the seed and the logits.
pub struct Sampler {
    temperature: f64,
    top_p: f64,
    top_k: usize,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Draws as the flags say; where they say nothing, as the model's makers do; where these say nothing either, as llama.cpp does.
    pub fn new(flags: &SamplingFlags, makers: Sampling) -> anyhow::Result<Self> {
        flags.check()?;
        let temperature = flags.temperature.or(makers.temperature.filter(|t| is_temperature(*t))).unwrap_or(0.8);
        let top_p = flags.top_p.or(makers.top_p.filter(|p| is_share(*p))).unwrap_or(0.95);
        let top_k = match flags.top_k.or(makers.top_k).unwrap_or(40) {
            0 => usize::MAX,
            top_k => top_k,
        };
        Ok(Self { temperature, top_p, top_k, rng: ChaCha8Rng::seed_from_u64(flags.seed) })
    }

    /// Draws with a temperature and a seed, from all tokens.
    pub fn with(temperature: f64, seed: u64) -> Self {
        Self { temperature, top_p: 1., top_k: usize::MAX, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self::with(0., 0)
    }

    /// A token by its logits, one of those that are `allowed`.
    pub fn sample(&mut self, logits: &[f32], allowed: impl Fn(u32) -> bool) -> anyhow::Result<u32> {
        let mut ranked: Vec<(u32, f64)> =
            (0..).zip(logits).filter(|(id, _)| allowed(*id)).map(|(id, &logit)| (id, f64::from(logit))).collect();
        if ranked.is_empty() || ranked.iter().any(|(_, logit)| !logit.is_finite()) {
            anyhow::bail!("the model gives no probabilities: its logits are not numbers");
        }
        // Ties go to the smaller id, so that a draw does not depend on the sort.
        let by_rank = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        // Of a large vocabulary only what may be drawn is sorted.
        let kept = if self.temperature == 0. { 1 } else { self.top_k };
        if kept < ranked.len() {
            ranked.select_nth_unstable_by(kept - 1, by_rank);
            ranked.truncate(kept);
        }
        ranked.sort_unstable_by(by_rank);
        if self.temperature == 0. {
            return Ok(ranked[0].0);
        }
        let best = ranked[0].1;
        for (_, weight) in &mut ranked {
            *weight = ((*weight - best) / self.temperature).exp();
        }
        let mut total: f64 = ranked.iter().map(|(_, weight)| weight).sum();
        if self.top_p < 1. {
            let (mut sum, enough) = (0., self.top_p * total);
            let kept = ranked.iter().position(|(_, weight)| {
                sum += weight;
                sum >= enough
            });
            ranked.truncate(kept.map_or(ranked.len(), |last| last + 1));
            total = ranked.iter().map(|(_, weight)| weight).sum();
        }
        // 53 bits: a number below 1 that f64 holds exactly.
        let mut point = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        let drawn = ranked.iter().find(|(_, weight)| {
            point -= weight;
            point < 0.
        });
        // Rounding may leave a rest at the very end.
        Ok(drawn.unwrap_or(&ranked[ranked.len() - 1]).0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1., 3., 2., 3., -1.];

    fn shares(temperature: f64, top_p: f64, top_k: Option<usize>) -> [f64; 5] {
        let flags = SamplingFlags {
            temperature: Some(temperature),
            top_p: Some(top_p),
            top_k: Some(top_k.unwrap_or(0)),
            seed: 3,
        };
        let mut sampler = Sampler::new(&flags, Sampling::default()).unwrap();
        let mut counts = [0.; 5];
        for _ in 0..20_000 {
            counts[sampler.sample(&LOGITS, |id| id != 3).unwrap() as usize] += 1. / 20_000.;
        }
        counts
    }

    #[test]
    fn draws_follow_the_softmax_of_what_is_allowed() {
        let weights = LOGITS.map(|logit| f64::from(logit).exp());
        let total = weights.iter().sum::<f64>() - weights[3];
        let drawn = shares(1., 1., None);
        for (id, weight) in weights.into_iter().enumerate() {
            let expected = if id == 3 { 0. } else { weight / total };
            assert!((drawn[id] - expected).abs() < 0.01, "{id}: {} is not {expected}", drawn[id]);
        }
    }

    #[test]
    fn top_k_top_p_and_no_temperature_cut_the_tail() {
        assert!(shares(1., 1., Some(2))[0] == 0. && shares(1., 1., Some(2))[2] > 0.2);
        // The likeliest has two thirds of the probability.
        assert_eq!(shares(1., 0.5, None)[1].round(), 1.);
        assert_eq!(shares(1., 0.5, None)[2], 0.);
        assert!(shares(1., 0.8, None)[2] > 0.2);
        assert_eq!(shares(1., 0.8, None)[0], 0.);
        assert_eq!(shares(0., 1., None)[2], 0.);
        assert_eq!(Sampler::greedy().sample(&LOGITS, |_| true).unwrap(), 1);
    }

    #[test]
    fn flags_come_before_the_makers_settings_and_these_before_the_usual_ones() {
        let none = SamplingFlags { temperature: None, top_p: None, top_k: None, seed: 1 };
        let settings = |flags: &SamplingFlags, makers| {
            let Sampler { temperature, top_p, top_k, .. } = Sampler::new(flags, makers).unwrap();
            (temperature, top_p, top_k)
        };
        assert_eq!(settings(&none, Sampling::default()), (0.8, 0.95, 40));
        let makers = Sampling { temperature: Some(0.6), top_p: Some(0.9), top_k: Some(0) };
        assert_eq!(settings(&none, makers), (0.6, 0.9, usize::MAX));
        let flags = SamplingFlags { temperature: Some(0.), top_k: Some(7), ..none.clone() };
        assert_eq!(settings(&flags, makers), (0., 0.9, 7));
        assert!(Sampler::new(&SamplingFlags { top_p: Some(0.), ..none }, makers).is_err());
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        assert!(Sampler::greedy().sample(&[1., f32::NAN], |_| true).is_err());
        assert!(Sampler::greedy().sample(&[1.], |_| false).is_err());
    }
}
