//! Our side: calls of the public functions on one GPU, timed by its own clock.

use super::{Blocks, IRREGULAR, Shape};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};
use candle_core::{DType, Device, Tensor, Var};
use landmark_attention::{
    LandmarkParams, Landmarks, landmark_attention, landmark_attention_backward, landmark_attention_with_lse,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::sync::Arc;

/// Calls before the clock starts.
const WARM_UP: usize = 3;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// `landmark_attention`.
    Forward,
    /// `landmark_attention_backward`: the operation's gradients.
    Backward,
    /// The same by candle's graph, which also makes the gradient of the output and adds each gradient to zeros.
    Graph,
}

impl Pass {
    /// What to call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Graph => "backward by candle's graph",
        }
    }
}

/// The GPU.
pub struct Gpu {
    device: Device,
    stream: Arc<CudaStream>,
}

impl Gpu {
    /// A GPU that is open.
    pub fn new(device: &Device) -> anyhow::Result<Self> {
        Ok(Self { device: device.clone(), stream: device.as_cuda_device()?.cuda_stream() })
    }

    /// Its number.
    pub fn number(&self) -> usize {
        self.stream.context().ordinal()
    }

    /// What its driver calls it.
    pub fn name(&self) -> anyhow::Result<String> {
        Ok(self.stream.context().name()?)
    }

    /// Mean seconds of calls one behind the other, by the GPU's clock: what the processor does for a call counts where the GPU waits
    /// for it.
    fn seconds<T>(&self, calls: usize, mut call: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<f64> {
        for _ in 0..WARM_UP {
            call()?;
        }
        self.stream.synchronize()?;
        let clock = || self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let begin = clock()?;
        for _ in 0..calls {
            call()?;
        }
        let end = clock()?;
        Ok(f64::from(begin.elapsed_ms(&end)?) / 1e3 / calls as f64)
    }

    /// What a product of large matrices in bf16 reaches: the best of some.
    pub fn matmul_tflops(&self) -> anyhow::Result<f64> {
        const SIZE: usize = 8192;
        let matrix = || Tensor::randn(0f32, 1., (SIZE, SIZE), &self.device)?.to_dtype(DType::BF16);
        let (a, b) = (matrix()?, matrix()?);
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            best = best.min(self.seconds(5, || Ok(a.matmul(&b)?))?);
        }
        Ok(2. * (SIZE as f64).powi(3) / best / 1e12)
    }

    /// The most bytes that were allocated at once while `work` ran, over those before and those of its results. None where the
    /// driver has no memory pools, and does not count.
    fn most_memory<const N: usize>(
        &self,
        work: impl FnOnce() -> anyhow::Result<[Tensor; N]>,
    ) -> anyhow::Result<Option<u64>> {
        if !self.stream.context().has_async_alloc() {
            return Ok(None);
        }
        self.stream.synchronize()?;
        let (before, _) = self.pool(true)?;
        let results = work()?;
        self.stream.synchronize()?;
        let (_, most) = self.pool(false)?;
        let kept: usize = results.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum();
        Ok(Some(most.saturating_sub(before + kept as u64)))
    }

    /// Bytes in use, and the most since the last reset.
    fn pool(&self, reset: bool) -> anyhow::Result<(u64, u64)> {
        use sys::CUmemPool_attribute::{
            CU_MEMPOOL_ATTR_USED_MEM_CURRENT as NOW, CU_MEMPOOL_ATTR_USED_MEM_HIGH as MOST,
        };
        let (mut now, mut most) = (0u64, 0u64);
        // SAFETY: the device is open; both attributes are u64, and the second is reset by writing 0.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.stream.context().cu_device())?;
            if reset {
                result::mem_pool::set_attribute(pool, MOST, (&raw mut most).cast())?;
            }
            result::mem_pool::get_attribute(pool, NOW, (&raw mut now).cast())?;
            result::mem_pool::get_attribute(pool, MOST, (&raw mut most).cast())?;
        }
        Ok((now, most))
    }
}

/// The tensors and parameters of a call.
pub struct Call {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    params: LandmarkParams,
    /// Output and log-sum-exps of the forward pass.
    forward: (Tensor, Tensor),
    /// The output as candle's graph has it.
    graph: Tensor,
}

impl Call {
    /// Random tensors.
    pub fn new(gpu: &Gpu, shape: Shape, blocks: Blocks) -> anyhow::Result<Self> {
        let Shape { batch, heads, length, head_dim } = shape;
        let tensor = || Tensor::randn(0f32, 1., (batch, heads, length, head_dim), &gpu.device)?.to_dtype(DType::BF16);
        let (q, k, v, dout) = (tensor()?, tensor()?, tensor()?, tensor()?);
        let landmarks = match blocks {
            Blocks::Every(block) => Landmarks::Every(block),
            // On the CPU, where the operation reads it.
            Blocks::Irregular => {
                Landmarks::Mask(Tensor::from_vec(irregular(batch, length), (batch, length), &Device::Cpu)?)
            }
        };
        let params = LandmarkParams::new(landmarks);
        let forward = landmark_attention_with_lse(&q, &k, &v, &params)?;
        let [var_q, var_k, var_v] = [&q, &k, &v].map(Var::from_tensor);
        let graph = landmark_attention(var_q?.as_tensor(), var_k?.as_tensor(), var_v?.as_tensor(), &params)?;
        Ok(Self { q, k, v, dout, params, forward, graph })
    }

    fn output(&self) -> anyhow::Result<Tensor> {
        Ok(landmark_attention(&self.q, &self.k, &self.v, &self.params)?)
    }

    fn gradients(&self) -> anyhow::Result<[Tensor; 3]> {
        let (out, lse) = &self.forward;
        Ok(landmark_attention_backward([&self.q, &self.k, &self.v], &self.params, out, lse, &self.dout)?)
    }

    /// Mean seconds of so many calls.
    pub fn seconds(&self, gpu: &Gpu, pass: Pass, calls: usize) -> anyhow::Result<f64> {
        match pass {
            Pass::Forward => gpu.seconds(calls, || self.output()),
            Pass::Backward => gpu.seconds(calls, || self.gradients()),
            Pass::Graph => gpu.seconds(calls, || Ok(self.graph.backward()?)),
        }
    }

    /// The bytes that a forward and a backward pass need beside inputs, outputs and gradients.
    pub fn memory(&self, gpu: &Gpu) -> anyhow::Result<[Option<u64>; 2]> {
        Ok([gpu.most_memory(|| Ok([self.output()?]))?, gpu.most_memory(|| self.gradients())?])
    }
}

/// Landmarks that end blocks of random lengths, others in each row.
fn irregular(batch: usize, length: usize) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let choices = (IRREGULAR.end() - IRREGULAR.start() + 1) as u32;
    let mut mask = vec![0; batch * length];
    for row in mask.chunks_exact_mut(length) {
        let mut next = || IRREGULAR.start() + (random.next_u32() % choices) as usize;
        let mut place = next() - 1;
        while let Some(token) = row.get_mut(place) {
            *token = 1;
            place += next();
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn irregular_landmarks_differ_from_row_to_row() {
        let (batch, length) = (3, 2000);
        let mask = irregular(batch, length);
        let rows: Vec<Vec<usize>> =
            mask.chunks_exact(length).map(|row| (0..length).filter(|&i| row[i] == 1).collect()).collect();
        for row in &rows {
            assert!(IRREGULAR.contains(&(row[0] + 1)) && length - row.last().unwrap() <= *IRREGULAR.end());
            assert!(row.windows(2).all(|pair| IRREGULAR.contains(&(pair[1] - pair[0]))));
        }
        assert!(rows[0] != rows[1] && rows[1] != rows[2]);
    }
}
