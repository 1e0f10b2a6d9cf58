//! Tokens per second of training on this machine: forward, backward and a plain AdamW step on random tokens. The peer in PyTorch
//! is `benches/gpt_torch.py`.
//!
//! `train_speed [landmark|base|none] [steps]`: attention through landmarks after every 50 tokens, dense attention, or none
//! at all (what the rest of the model costs).

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore};
use landmark_attention::Attend;
use landmark_models::gpt::{Gpt, GptConfig, Variant, WindowAttention};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 8;
const TIME: usize = 512;

/// Values pass through: the cost of a model without attention.
struct NoAttention;

impl Attend for NoAttention {
    fn attend(&mut self, _layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        (q + k)? + v
    }
}

/// AdamW with betas 0.9 and 0.95, in place over slices.
struct AdamW {
    state: BTreeMap<String, (Vec<f32>, Vec<f32>)>,
    step: i32,
}

impl AdamW {
    fn step(&mut self, parameters: &BTreeMap<String, Var>, gradients: &GradStore) -> Result<()> {
        self.step += 1;
        let (c1, c2) = (1. - 0.9f32.powi(self.step), 1. - 0.95f32.powi(self.step));
        for (name, parameter) in parameters {
            let gradient: Vec<f32> =
                gradients.get(parameter).expect("every parameter has a gradient").flatten_all()?.to_vec1()?;
            let mut values: Vec<f32> = parameter.flatten_all()?.to_vec1()?;
            let zeros = || (vec![0.; values.len()], vec![0.; values.len()]);
            let (m, v) = self.state.entry(name.clone()).or_insert_with(zeros);
            for (((p, g), m), v) in values.iter_mut().zip(gradient).zip(m).zip(v) {
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.95 * *v + 0.05 * g * g;
                *p -= 1e-3 * ((*m / c1) / ((*v / c2).sqrt() + 1e-8) + 1e-3 * *p);
            }
            parameter.set(&Tensor::from_vec(values, parameter.shape(), parameter.device())?)?;
        }
        Ok(())
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let kind = args.next().unwrap_or("landmark".into());
    let steps: usize = args.next().map_or(Ok(10), |steps| steps.parse())?;
    let config = GptConfig {
        model: if kind == "landmark" { Variant::Landmark } else { Variant::BaseRotary },
        vocab_size: 8192,
        landmark_id: 8191,
        n_embd: 256,
        n_head: 4,
        n_layer: 4,
        sequence_length: TIME,
        ..GptConfig::default()
    };
    let model = Gpt::init(&config, 0, DType::F32, &Device::Cpu)?;
    let random = |i: usize| (i as u32).wrapping_mul(0x9e37_79b9).rotate_left(13).wrapping_mul(0x85eb_ca6b) >> 16;
    let token = |i: usize| if kind == "landmark" && i % TIME % 51 == 50 { 8191 } else { random(i) % 8191 };
    let ids = Tensor::from_iter((0..BATCH * TIME).map(token), &Device::Cpu)?.reshape((BATCH, TIME))?;
    let targets = Tensor::from_iter((1..=BATCH * TIME).map(token), &Device::Cpu)?.reshape((BATCH, TIME))?;
    let mut optimizer = AdamW { state: BTreeMap::new(), step: 0 };
    let mut seconds = Vec::new();
    for step in 0..steps + 3 {
        let start = Instant::now();
        let mut attention: Box<dyn Attend> = match kind.as_str() {
            "none" => Box::new(NoAttention),
            _ => Box::new(WindowAttention::new(&config, &ids, Some(step as u64))?),
        };
        let loss = model.loss(&model.hidden(&ids, &mut *attention, None)?, &targets, None)?;
        let forward = start.elapsed();
        let gradients = loss.backward()?;
        let backward = start.elapsed();
        optimizer.step(model.parameters(), &gradients)?;
        seconds.push(start.elapsed().as_secs_f64());
        let [f, b, o] = [forward, backward - forward, start.elapsed() - backward].map(|d| d.as_secs_f64() * 1e3);
        println!(
            "step {step}: loss {:.4}, forward {f:.0} ms, backward {b:.0} ms, optimizer {o:.0} ms",
            loss.to_scalar::<f32>()?
        );
    }
    let warm = &mut seconds[3..];
    warm.sort_by(f64::total_cmp);
    println!("{{\"tok_s\": {:.1}}}", (BATCH * TIME) as f64 / warm[steps / 2]);
    Ok(())
}
