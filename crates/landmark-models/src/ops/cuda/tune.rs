//! Which of cuBLASLt's algorithms computes a large product: the first that it names, or a faster one that gives the same bits. Times differ
//! from run to run, so a choice by time alone would change what a seed trains; this one changes nothing but the time.

use std::ffi::c_int;
use std::time::Instant;

use candle_core::DType;
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::cuda_backend::{CudaDevice, WrapErr};

use super::gemm::{Key, On, Plan};
use super::{Address, CudaStream_, ElementType, Fresh, run};
use crate::Result;

const OP: &str = "a matrix product";
/// Multiplications below which a product is left alone: trying costs milliseconds, once for each shape.
const WORTH: usize = 1 << 32;
/// The matrices of a trial together, in bytes, above which it would weigh on the memory of a training step.
const MOST: usize = 512 << 20;
/// Calls that are timed together, and how often: the fastest time counts.
const CALLS: usize = 5;
const ROUNDS: usize = 3;
/// How much faster another algorithm must be.
const GAIN: f64 = 0.98;

/// Puts the fastest algorithm of those with the bits of the plan's first into the plan.
pub(super) fn choose(
    plan: &mut Plan,
    others: &[sys::cublasLtMatmulAlgo_t],
    key: &Key,
    on: On,
    device: &CudaDevice,
) -> Result<()> {
    let [m, n, k] = key.sizes;
    let [factors, product] = key.types.map(ElementType::bytes);
    let [b, a, out] = key.elements();
    if others.is_empty()
        || m.saturating_mul(n).saturating_mul(k) < WORTH
        || (b + a) * factors + 3 * out * product > MOST
    {
        return Ok(());
    }
    // A GPU without the memory for a trial keeps the first.
    let Ok(trial) = Trial::new(plan, key, on, device) else { return Ok(()) };
    let first = plan.algorithm;
    trial.run(&first, trial.expected.address)?;
    let (mut best, mut best_time) = (first, trial.time(&first)? * GAIN);
    for other in others {
        // The GPU may refuse one after all.
        if trial.run(other, trial.out.address).is_err() || !trial.is_as_expected()? {
            continue;
        }
        let time = trial.time(other)?;
        if time < best_time && trial.is_as_expected()? {
            (best, best_time) = (*other, time);
        }
    }
    drop(trial);
    plan.algorithm = best;
    Ok(())
}

/// A product of matrices of noise: those at hand may hold zeros, of which all algorithms make the same.
struct Trial<'a> {
    plan: &'a Plan,
    on: On,
    device: &'a CudaDevice,
    adds: bool,
    factors: [Fresh; 2],
    added: Option<Fresh>,
    expected: Fresh,
    out: Fresh,
    /// Of a product.
    halfwords: i64,
}

impl<'a> Trial<'a> {
    fn new(plan: &'a Plan, key: &Key, on: On, device: &'a CudaDevice) -> Result<Self> {
        let [b, a, elements] = key.elements();
        let [factors, product] = key.types;
        let noise = |elements: usize, of: ElementType, seed: u32| -> Result<Fresh> {
            let x = Fresh::new(device, elements, of.dtype())?;
            run(OP, device, |stream| {
                // SAFETY: so many elements of this type, that nobody else has.
                unsafe { landmark_noise(x.address, of, elements as i64, seed, stream) }
            })?;
            Ok(x)
        };
        let halfwords = (elements * product.bytes() / size_of::<u16>()) as i64;
        // What lies between the rows is the same in both, and stays so.
        let zeros = || -> Result<Fresh> {
            let x = Fresh::new(device, elements, product.dtype())?;
            is_same(device, x.address, x.address, halfwords)?;
            Ok(x)
        };
        Ok(Self {
            plan,
            on,
            device,
            adds: key.adds,
            factors: [noise(b, factors, 1)?, noise(a, factors, 2)?],
            added: if key.adds { Some(noise(elements, product, 3)?) } else { None },
            expected: zeros()?,
            out: zeros()?,
            halfwords,
        })
    }

    fn run(&self, algorithm: &sys::cublasLtMatmulAlgo_t, out: Address) -> Result<()> {
        let [b, a] = self.factors.each_ref().map(|factor| factor.address);
        let added = self.added.as_ref().map_or(out, |added| added.address);
        // SAFETY: live matrices of the plan's sizes, aligned better than any that it was made for.
        unsafe { self.plan.run(algorithm, [b, a, added, out], 1., self.adds, self.on) }
    }

    /// Whether the last product, into `out`, has the bits of `expected`. Then `out` is cleared.
    fn is_as_expected(&self) -> Result<bool> {
        is_same(self.device, self.expected.address, self.out.address, self.halfwords)
    }

    /// Seconds of [`CALLS`] calls.
    fn time(&self, algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<f64> {
        let stream = self.device.cuda_stream();
        let mut fastest = f64::INFINITY;
        for _ in 0..ROUNDS {
            stream.synchronize().w()?;
            let start = Instant::now();
            for _ in 0..CALLS {
                self.run(algorithm, self.out.address)?;
            }
            stream.synchronize().w()?;
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        Ok(fastest)
    }
}

/// Whether two matrices of so many halfwords have the same bits. Then the second is cleared.
fn is_same(device: &CudaDevice, a: Address, b: Address, halfwords: i64) -> Result<bool> {
    let differs = Fresh::new(device, (), DType::U32)?;
    run(OP, device, |stream| {
        // SAFETY: the callers' matrices, and a number.
        unsafe { landmark_differs(a, b, halfwords, differs.address, stream) }
    })?;
    Ok(differs.tensor().to_scalar::<u32>()? == 0)
}

unsafe extern "C" {
    fn landmark_noise(x: Address, dtype: ElementType, n: i64, seed: u32, stream: *mut CudaStream_) -> c_int;
    fn landmark_differs(a: Address, b: Address, n: i64, differs: Address, stream: *mut CudaStream_) -> c_int;
}
