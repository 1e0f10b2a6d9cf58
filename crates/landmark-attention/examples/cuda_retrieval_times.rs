//! Times of retrieval and of a decoding step on a GPU: `cargo run --release -p landmark-attention --features cuda --example
//! cuda_retrieval_times`.

use candle_core::{DType, Device, Tensor};
use landmark_attention::retrieval::{Blocks, Kept, Selection, SlotQueries, attend, select};
use landmark_attention::{LandmarkParams, Landmarks, landmark_attention_with_lse};

const SELECTIONS: [Selection; 3] = [Selection::PerTokenAndHead, Selection::MaxOverHeads, Selection::MaxOverTokens];

fn main() -> candle_core::Result<()> {
    let device = Device::new_cuda(0)?;
    let time = |f: &dyn Fn() -> Tensor| {
        for _ in 0..3 {
            f();
        }
        device.synchronize().unwrap();
        let mut runs: Vec<f64> = (0..9)
            .map(|_| {
                let start = std::time::Instant::now();
                let n = 4;
                for _ in 0..n {
                    f();
                }
                device.synchronize().unwrap();
                start.elapsed().as_secs_f64() * 1e3 / n as f64
            })
            .collect();
        runs.sort_by(f64::total_cmp);
        runs[runs.len() / 2]
    };
    let random = |shape: &[usize], dtype| Tensor::randn(0f32, 1., shape, &device).unwrap().to_dtype(dtype).unwrap();
    println!(
        "heads (kv) x head_dim, queries, blocks of 64 tokens, dtype: select ms by token, heads, tokens; attend ms"
    );
    for (heads, kv_heads, d) in [(6, 6, 64), (32, 32, 128), (32, 8, 128)] {
        for len in [2_000, 20_000, 200_000] {
            for dtype in [DType::F32, DType::BF16] {
                // Blocks of two tokens where those of 64 would not fit.
                let block = if len > 20_000 { 2 } else { 64 };
                let k = 4;
                let gigabytes = (2 * kv_heads * len * block * d * dtype.size_in_bytes()) as f64 / 1e9;
                if gigabytes > 45. {
                    continue;
                }
                let keys = Tensor::zeros((1, kv_heads, len, block, d), dtype, &device).unwrap();
                let landmarks = random(&[1, kv_heads, len, d], dtype);
                for t in [255, 1] {
                    let queries = random(&[k + 1, 1, heads, t, d], dtype);
                    let queries = SlotQueries { queries: &queries, newest: k, scale: 0.1 };
                    let kept = Kept::Ring { keys: &keys, values: &keys };
                    let blocks = Blocks { kept, landmarks: Some(&landmarks), first: 0, len, lengths: None };
                    let chosen = select(queries, blocks, k, Selection::default()).unwrap();
                    let selects = SELECTIONS.map(|selection| time(&|| select(queries, blocks, k, selection).unwrap()));
                    let attend = time(&|| attend(queries, blocks, &chosen).unwrap().out);
                    let flops = 2. * (heads * t * len * d) as f64;
                    println!(
                        "{heads} ({kv_heads}) x {d}, {t}, {len} of {block}, {dtype:?}: {:.3} {:.3} {:.3}; {attend:.3}   ({:.1} TFLOP/s, {:.0} GB/s)",
                        selects[0],
                        selects[1],
                        selects[2],
                        flops / selects[0] / 1e9,
                        (kv_heads * len * d * dtype.size_in_bytes()) as f64 / selects[0] / 1e6
                    );
                }
            }
        }
    }
    println!("a decode step of the operation, heads (kv) x kv_len, head_dim 128, bf16, blocks of 64: ms");
    for (heads, kv_heads) in [(32, 32), (32, 8), (8, 8)] {
        for kv_len in [1_000, 16_000, 128_000] {
            let [k, v] = [(); 2].map(|()| random(&[1, kv_heads, kv_len, 128], DType::BF16));
            let params = LandmarkParams::new(Landmarks::Every(64));
            let step = |batch: usize| {
                let q = random(&[batch, heads, 1, 128], DType::BF16);
                let [k, v] = [&k, &v].map(|x| x.broadcast_as((batch, kv_heads, kv_len, 128)).unwrap());
                time(&|| landmark_attention_with_lse(&q, &k, &v, &params).unwrap().0)
            };
            println!("{heads} ({kv_heads}) x {kv_len}: {:.3}, a batch of 8: {:.3}", step(1), step(8));
        }
    }
    Ok(())
}
