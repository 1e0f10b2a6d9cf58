//! Which weights fall: a hash of the seed and the place, so that forward and backward agree and nothing is stored.
//! `cuda/dropout.cuh` draws the same.

use super::lanes::Real;
use crate::Dropout;

/// The draw of one head of one row.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    dropout: Dropout,
    key: u32,
}

impl Draw {
    /// The draw of head `head` of row `row`; `None` if nothing can fall.
    pub fn new(dropout: Option<Dropout>, row: usize, head: usize) -> Option<Self> {
        let dropout = dropout.filter(|d| d.weights > 0. || d.groups > 0.)?;
        let key = mix(dropout.seed as u32 ^ mix((dropout.seed >> 32) as u32 ^ mix(row as u32 ^ mix(head as u32))));
        Some(Self { dropout, key })
    }

    /// Multiplies weights `[keys, row]` of queries `first..` by 0 or `1 / (1 - p)`.
    pub fn weights<T: Real>(&self, weights: &mut [T], row: usize, first: usize, keys: std::ops::Range<usize>) {
        if self.dropout.weights == 0. {
            return;
        }
        let (threshold, kept) = Dropout::threshold(self.dropout.weights);
        for (weights, j) in weights.chunks_exact_mut(row).zip(keys) {
            let key = mix(self.key ^ mix(j as u32));
            for (i, weight) in weights.iter_mut().enumerate() {
                let keep = mix(key ^ (first + i) as u32) >= threshold;
                *weight = *weight * if keep { T::cast(kept) } else { T::default() };
            }
        }
    }

    /// Multiplies the shares that queries `first..` give to the block of landmark `landmark` by 0 or `1 / (1 - p)`. The
    /// query's own block is never dropped, nor scaled, as in the authors' code.
    pub fn block<T: Real>(&self, shares: &mut [T], first: usize, landmark: usize) {
        if self.dropout.groups == 0. {
            return;
        }
        let (threshold, kept) = Dropout::threshold(self.dropout.groups);
        let key = mix(!self.key ^ mix(landmark as u32));
        for (i, share) in shares.iter_mut().enumerate() {
            let keep = mix(key ^ (first + i) as u32) >= threshold;
            *share = *share * if keep { T::cast(kept) } else { T::default() };
        }
    }
}

/// The finaliser of MurmurHash3: every bit of the input reaches every bit of the output.
#[inline(always)]
fn mix(mut x: u32) -> u32 {
    x = (x ^ 0x9e37_79b9) ^ (x >> 16);
    x = x.wrapping_mul(0x85eb_ca6b);
    x ^= x >> 13;
    x = x.wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}
