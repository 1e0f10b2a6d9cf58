//! Transformer-XL training against a computation without a cache: one pass over all the tokens, with a mask under which each
//! sees the same, and no gradient where a cache would be.

use candle_core::{D, DType, Device, Tensor};
use landmark_attention::{Attend, Rope};
use landmark_data::{Batch, IGNORE};
use landmark_models::gpt::{Gpt, GptConfig, Variant, WindowAttention};
use landmark_train::{Anneal, Method, Process, Settings, Trainer, evaluate};

const ROWS: usize = 2;
const WINDOW: usize = 6;

fn settings(total_sequence_length: usize, mem_cache_size: usize) -> Settings {
    let model = GptConfig {
        model: Variant::BaseRotary,
        vocab_size: 40,
        landmark_id: 39,
        n_embd: 16,
        n_head: 2,
        n_layer: 3,
        sequence_length: WINDOW,
        mem_freq: None,
        ..GptConfig::default()
    };
    Settings {
        optimization_process: Process::TransformerXl { total_sequence_length, mem_cache_size },
        opt: Method::Sgd,
        weight_decay: 0.,
        scheduler: Anneal::None,
        lr: 0.5,
        ..Settings::of(model)
    }
}

/// Weights large enough for attention to prefer something.
fn model(settings: &Settings) -> Gpt {
    let model = Gpt::init(&settings.model, 4, DType::F64, &Device::Cpu).unwrap();
    for (name, var) in model.parameters() {
        if !name.contains("ln") {
            var.set(&(var.as_tensor() * 10.).unwrap()).unwrap();
        }
    }
    model
}

fn batch(total: usize) -> Batch {
    let ids: Vec<u32> = (0..(ROWS * (total + 1)) as u32).map(|i| (i * i * 7 + i / 3) % 38).collect();
    let row = |from: usize| move |row: &[u32]| row[from..from + total].to_vec();
    let inputs: Vec<u32> = ids.chunks(total + 1).flat_map(row(0)).collect();
    let mut targets: Vec<u32> = ids.chunks(total + 1).flat_map(row(1)).collect();
    targets[1] = IGNORE;
    Batch { inputs, targets, weights: None, exercises: 0, rows: ROWS, sequence_length: total }
}

/// Attention over whole rows in which token i sees itself, those before it in its window, and `cache` tokens before that.
struct Direct {
    cache: usize,
    rope: Rope,
}

impl Attend for Direct {
    fn attend(&mut self, _: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        let (.., total, dim) = q.dims4()?;
        let rotation = self.rope.at(&(0..total as i64).collect::<Vec<_>>());
        let (q, k, v) = (rotation.apply(q)?, rotation.apply(k)?, v.contiguous()?);
        let mask = |f: &dyn Fn(usize, usize, usize) -> bool| {
            let cells = (0..total).flat_map(|i| (0..total).map(move |j| (i, j)));
            let cells = cells.map(|(i, j)| f(i, j, i / WINDOW * WINDOW) as u8).collect();
            Tensor::from_vec(cells, (total, total), &Device::Cpu)?.broadcast_as((ROWS, 2, total, total))
        };
        let own = mask(&|_, j, window| j >= window)?;
        let seen = mask(&|i, j, window| j <= i && j + self.cache >= window)?;
        let (q, scale) = (q.contiguous()?, 1. / (dim as f64).sqrt());
        let scores = |k: &Tensor| q.matmul(&k.t()?.contiguous()?)? * scale;
        let scores = own.where_cond(&scores(&k)?, &scores(&k.detach())?)?;
        let nothing = Tensor::full(f64::NEG_INFINITY, scores.shape(), &Device::Cpu)?;
        let scores = seen.where_cond(&scores, &nothing)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let zeros = weights.zeros_like()?;
        let part = |own_part: bool, v: &Tensor| {
            let (a, b) = if own_part { (&weights, &zeros) } else { (&zeros, &weights) };
            own.where_cond(a, b)?.matmul(v)
        };
        part(true, &v)? + part(false, &v.detach())?
    }
}

fn largest(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// A step, and the evaluation of the model before it, for rows of one window, whole and broken windows, and caches that hold less
/// than a window, one, several, and everything.
#[test]
fn a_step_is_that_of_one_pass_in_which_each_token_sees_the_same() {
    for (total, cache) in [(6, 4), (12, 6), (24, 4), (24, 6), (24, 10), (24, 100), (21, 6), (20, 5)] {
        let settings = settings(total, cache);
        let (model, batch) = (model(&settings), batch(total));
        let ids = Tensor::from_slice(&batch.inputs, (ROWS, total), &Device::Cpu).unwrap();
        let targets = Tensor::from_slice(&batch.targets, (ROWS, total), &Device::Cpu).unwrap();
        let hidden = model.hidden(&ids, &mut Direct { cache, rope: settings.model.rope() }, None).unwrap();
        let losses: Vec<Tensor> = (0..total)
            .step_by(WINDOW)
            .map(|from| {
                let part = |x: &Tensor| x.narrow(1, from, WINDOW.min(total - from)).unwrap().contiguous().unwrap();
                model.loss(&part(&hidden), &part(&targets), None).unwrap()
            })
            .collect();
        let mean = losses.iter().map(|loss| loss.to_scalar::<f64>().unwrap()).sum::<f64>() / losses.len() as f64;
        let sum = losses.into_iter().reduce(|a, b| (a + b).unwrap()).unwrap();
        let gradients = sum.backward().unwrap();
        let expected: Vec<Tensor> = model
            .parameters()
            .values()
            .map(|var| (var.as_tensor() - (gradients.get(var).unwrap() * settings.lr).unwrap()).unwrap())
            .collect();

        let evaluation = evaluate(&model, &settings, [batch.clone()]).unwrap();
        assert!((evaluation.loss - mean).abs() < 1e-11, "{total} {cache}: {} is not {mean}", evaluation.loss);
        let mut trainer = Trainer::new(&settings, model).unwrap();
        let step = trainer.step([batch]).unwrap();
        assert!((step.loss - mean).abs() < 1e-11, "{total} {cache}: {} is not {mean}", step.loss);
        assert_eq!(step.tokens, ROWS * total);
        for ((name, var), expected) in trainer.model().parameters().iter().zip(expected) {
            let off = largest(var.as_tensor(), &expected);
            assert!(off < 1e-9, "{total} {cache}: {name} is off by {off:e}");
        }
    }
}

/// Where nothing is before a window, Transformer-XL is plain training: dropout aside, the same bits.
#[test]
fn rows_of_one_window_are_plain_training() {
    let settings = settings(WINDOW, 9);
    let plain = Settings { optimization_process: Process::Landmark, ..settings.clone() };
    let weights = |settings: &Settings| {
        let mut trainer = Trainer::new(settings, model(settings)).unwrap();
        let losses: Vec<f64> = (0..3).map(|_| trainer.step([batch(WINDOW)]).unwrap().loss).collect();
        let weights = trainer.model().parameters().values().map(|var| var.flatten_all().unwrap().to_vec1::<f64>());
        (losses, weights.collect::<candle_core::Result<Vec<_>>>().unwrap())
    };
    assert_eq!(weights(&settings), weights(&plain));
}

/// The cache is read: what was before the window changes its loss, and without a cache it does not.
#[test]
fn a_window_sees_what_was_before_it() {
    let settings = settings(2 * WINDOW, WINDOW);
    let model = model(&settings);
    let mut batch = batch(2 * WINDOW);
    // Only the second window of each row counts.
    for row in batch.targets.chunks_mut(2 * WINDOW) {
        row[..WINDOW].fill(IGNORE);
    }
    let mut other = batch.clone();
    other.inputs[2] = (other.inputs[2] + 1) % 38;
    let loss = |batch: &Batch| evaluate(&model, &settings, [batch.clone()]).unwrap().loss;
    assert!((loss(&batch) - loss(&other)).abs() > 1e-6);
    let alone = Tensor::from_vec(
        batch.inputs.chunks(2 * WINDOW).flat_map(|row| row[WINDOW..].to_vec()).collect(),
        (ROWS, WINDOW),
        &Device::Cpu,
    )
    .unwrap();
    let targets: Vec<u32> = batch.targets.chunks(2 * WINDOW).flat_map(|row| row[WINDOW..].to_vec()).collect();
    let targets = Tensor::from_vec(targets, (ROWS, WINDOW), &Device::Cpu).unwrap();
    let mut window = WindowAttention::new(model.config(), &alone, None).unwrap();
    let hidden = model.hidden(&alone, &mut window, None).unwrap();
    let without: f64 = model.loss(&hidden, &targets, None).unwrap().to_scalar().unwrap();
    assert!((loss(&batch) - without).abs() > 1e-6);
}

#[test]
fn what_cannot_be_is_named() {
    type Change = fn(&mut Settings);
    let xl = |total_sequence_length, mem_cache_size| Process::TransformerXl { total_sequence_length, mem_cache_size };
    let cases: [(&str, Process, Change); 4] = [
        ("--total_sequence_length: 5 is less", xl(5, 6), |_| {}),
        ("--mem_cache_size: 0 is too small", xl(12, 0), |_| {}),
        ("--optimization_process: transformer_xl", xl(12, 6), |s| s.model.model = Variant::LandmarkWithCmt),
        ("--optimization_process: transformer_xl", xl(12, 6), |s| {
            (s.model.model, s.model.mem_freq) = (Variant::Landmark, Some(3));
        }),
    ];
    for (expected, optimization_process, change) in cases {
        let mut settings = Settings { optimization_process, ..settings(12, 6) };
        change(&mut settings);
        let error = settings.check().unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let mut settings = settings(12, 6);
    settings.model.model = Variant::Landmark;
    settings.check().unwrap();
}
