//! The learning rate over time: PyTorch's `OneCycleLR` as the reference configures it, a constant, or what the Trainer of `transformers` has.

use serde::{Deserialize, Serialize};

/// The rate starts at the peak divided by this.
const DIV_FACTOR: f64 = 100.;
/// The rate ends at the start divided by this: a fifth of the peak.
const FINAL_DIV_FACTOR: f64 = 0.05;

/// How the learning rate moves from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Anneal {
    /// Half a cosine up to the peak, half a cosine down.
    Cos,
    /// A straight line up to the peak, a straight line down.
    Linear,
    /// The peak, always.
    None,
    /// As the Trainer of `transformers`: a straight line from 0 up to the peak, then what `then` says. The schedule's own warm-up counts for nothing.
    Trainer {
        /// The steps that climb.
        warmup_steps: usize,
        /// How it goes on.
        then: Decay,
    },
}

/// How a learning rate goes on after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// It stays at the peak.
    Constant,
    /// A straight line to 0.
    Linear,
    /// 0.4 of a cosine's period, as the authors have it: it ends near a tenth of the peak.
    Cosine,
}

/// The part of a cosine's period that the rate goes down in.
const CYCLES: f64 = 0.4;

/// The learning rate of every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape of both slopes.
    pub anneal: Anneal,
    /// The highest rate.
    pub peak: f64,
    /// The share of the steps that climb to it, 0 to 1.
    pub warmup: f64,
    /// The number of steps of the run.
    pub steps: usize,
}

impl Schedule {
    /// The rate of step `step`, the first being 0.
    pub fn rate(&self, step: usize) -> f64 {
        let slope = match self.anneal {
            Anneal::Cos => {
                |from: f64, to: f64, part: f64| to + (from - to) / 2. * ((std::f64::consts::PI * part).cos() + 1.)
            }
            Anneal::Linear => |from: f64, to: f64, part: f64| (to - from) * part + from,
            Anneal::None => return self.peak,
            Anneal::Trainer { warmup_steps, then } => return self.peak * self.share(step, warmup_steps, then),
        };
        let start = self.peak / DIV_FACTOR;
        let end = start / FINAL_DIV_FACTOR;
        let (step, last) = (step as f64, self.steps as f64 - 1.);
        // PyTorch counts the warm-up in steps less one and leaves fractions in: the peak may fall between two steps.
        let top = self.warmup * self.steps as f64 - 1.;
        if step <= top {
            slope(start, self.peak, part(step, 0., top))
        } else {
            slope(self.peak, end, part(step, top, last))
        }
    }
}

impl Schedule {
    /// The share of the peak at a step, as the functions of `transformers/optimization.py` have it.
    fn share(&self, step: usize, warmup: usize, then: Decay) -> f64 {
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let rest = self.steps.saturating_sub(warmup).max(1) as f64;
        match then {
            Decay::Constant => 1.,
            Decay::Linear => (self.steps.saturating_sub(step) as f64 / rest).max(0.),
            Decay::Cosine => {
                let progress = (step - warmup) as f64 / rest;
                (0.5 * (1. + (std::f64::consts::PI * CYCLES * 2. * progress).cos())).max(0.)
            }
        }
    }
}

/// How far `step` is on the way between two steps. A way of no length has been gone (PyTorch divides by zero there).
fn part(step: f64, from: f64, to: f64) -> f64 {
    if to > from { (step - from) / (to - from) } else { 1. }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(anneal: Anneal, warmup: f64, steps: usize) -> Schedule {
        Schedule { anneal, peak: 2e-3, warmup, steps }
    }

    #[test]
    fn cosine_is_that_of_the_golden_run() {
        let folder = std::env::var("LANDMARK_GOLDEN_DIR")
            .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").into());
        let path = std::path::Path::new(&folder).join("gpt_train_25_steps.safetensors");
        let golden = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
        let rates = golden["lrs"].to_vec1::<f64>().unwrap();
        let ours = schedule(Anneal::Cos, 0.2, rates.len());
        for (step, rate) in rates.iter().enumerate() {
            assert!((ours.rate(step) - rate).abs() < 1e-12, "step {step}: {} is not {rate}", ours.rate(step));
        }
    }

    #[test]
    fn linear_climbs_and_falls_in_equal_steps() {
        let ours = schedule(Anneal::Linear, 0.2, 50);
        let (start, end) = (2e-5, 4e-4);
        for (step, expected) in
            [(0, start), (3, start + (2e-3 - start) / 3.), (9, 2e-3), (29, 2e-3 - (2e-3 - end) * 0.5), (49, end)]
        {
            assert!((ours.rate(step) - expected).abs() < 1e-15, "step {step}: {} is not {expected}", ours.rate(step));
        }
    }

    /// `OneCycleLR(max_lr=2e-3, total_steps=100, pct_start=0.205, anneal_strategy='linear', cycle_momentum=False, div_factor=1e2,
    /// final_div_factor=0.05)` of PyTorch 2.15; the peak falls between two steps.
    #[test]
    fn linear_is_that_of_pytorch() {
        let recorded = [
            (0, 2e-05),
            (1, 0.00012153846153846153),
            (5, 0.0005276923076923077),
            (19, 0.0019492307692307693),
            (20, 0.0019899371069182392),
            (21, 0.001969811320754717),
            (60, 0.0011849056603773585),
            (99, 0.00039999999999999996),
        ];
        for (step, rate) in recorded {
            assert!((schedule(Anneal::Linear, 0.205, 100).rate(step) - rate).abs() < 1e-15, "step {step}");
        }
    }

    /// `get_cosine_schedule_with_warmup(num_cycles=0.4)`, `get_linear_schedule_with_warmup` and `get_constant_schedule_with_warmup` of
    /// transformers 5.24 with a peak of 2e-3, 3 steps of warm-up and 20 in all.
    #[test]
    fn the_trainers_are_those_of_transformers() {
        let recorded = [
            (Decay::Cosine, [0., 6.666666666666666e-4, 2e-3, 0.0013784110500423103, 0.00028638984558824776]),
            (Decay::Linear, [0., 6.666666666666666e-4, 2e-3, 0.0010588235294117648, 0.00011764705882352942]),
            (Decay::Constant, [0., 6.666666666666666e-4, 2e-3, 2e-3, 2e-3]),
        ];
        for (then, rates) in recorded {
            let ours = schedule(Anneal::Trainer { warmup_steps: 3, then }, 0., 20);
            for (step, rate) in [0, 1, 3, 11, 19].into_iter().zip(rates) {
                assert!((ours.rate(step) - rate).abs() < 1e-15, "{then:?} {step}: {} is not {rate}", ours.rate(step));
            }
        }
    }

    #[test]
    fn no_warmup_and_single_steps_are_finite() {
        assert_eq!(schedule(Anneal::None, 0.02, 10).rate(7), 2e-3);
        // 0.02 of 50 steps is a warm-up of nothing: the first step has the peak.
        assert_eq!(schedule(Anneal::Cos, 0.02, 50).rate(0), 2e-3);
        for warmup in [0., 0.02, 0.5, 1.] {
            for steps in 1..60 {
                for anneal in [Anneal::Cos, Anneal::Linear] {
                    let ours = schedule(anneal, warmup, steps);
                    assert!((0..steps).all(|step| (1e-5..=2e-3 + 1e-12).contains(&ours.rate(step))));
                }
            }
        }
    }
}
