//! Times the fused operation.
use candle_core::{Device, Tensor, Var};
use landmark_attention::{LandmarkParams, Landmarks, landmark_attention};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for t in [512usize, 2048, 8192] {
        for block in [0, 51, 64] {
            let x = || Var::from_tensor(&Tensor::randn(0f32, 1., (1, 8, t, 64), &Device::Cpu)?);
            let (q, k, v) = (x()?, x()?, x()?);
            let params = LandmarkParams::new(if block == 0 { Landmarks::None } else { Landmarks::Every(block) });
            let (mut fwd, mut both) = (vec![], vec![]);
            for _ in 0..if t > 4096 { 4 } else { 9 } {
                let s = Instant::now();
                let _ = landmark_attention(&q.detach(), &k.detach(), &v.detach(), &params)?;
                fwd.push(s.elapsed().as_secs_f64() * 1e3);
                let s = Instant::now();
                let out = landmark_attention(&q, &k, &v, &params)?;
                let _ = out.backward()?;
                both.push(s.elapsed().as_secs_f64() * 1e3);
            }
            fwd.sort_by(f64::total_cmp);
            both.sort_by(f64::total_cmp);
            println!(
                "T {t} block {block}: forward {:.1} ms, with backward {:.1} ms",
                fwd[fwd.len() / 2],
                both[both.len() / 2]
            );
        }
    }
    Ok(())
}
