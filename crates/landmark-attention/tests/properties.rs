//! The fused operation against the reference, on shapes that nobody chose, and what must hold of any of them.

use candle_core::{D, DType, Device, Tensor, Var};
use landmark_attention::{
    Dropout, LandmarkParams, Landmarks, Softmax, landmark_attention, landmark_attention_backward,
    landmark_attention_with_lse,
};
use landmark_attention::{reference, retrieval};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// A call of the operation; numbers come from `seed`.
#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    kv_heads: usize,
    group: usize,
    q_len: usize,
    history: usize,
    head_dim: usize,
    landmarks: Places,
    softmax: Softmax,
    seed: u64,
}

#[derive(Debug, Clone)]
enum Places {
    None,
    Every(usize),
    /// Each place is a landmark with this chance in 256, in each row anew; 0 gives rows without any.
    Random(u8),
}

fn case() -> impl Strategy<Value = Case> {
    let places = prop_oneof![
        1 => Just(Places::None),
        3 => (2usize..80).prop_map(Places::Every),
        4 => (0u8..100).prop_map(Places::Random),
    ];
    let softmax = prop_oneof![6 => Just(Softmax::Grouped), 1 => Just(Softmax::NoMem), 1 => Just(Softmax::IgnoreMem)];
    let q_len = prop_oneof![2 => 1usize..8, 4 => 8usize..150, 1 => 150usize..260];
    let history = prop_oneof![1 => Just(0usize), 1 => 0usize..200];
    let head_dim = prop_oneof![3 => 1usize..9, 2 => 8usize..70].prop_map(|d| if d < 9 { 8 * d } else { d });
    (1usize..3, 1usize..3, 1usize..4, q_len, history, head_dim, places, softmax, any::<u64>()).prop_map(
        |(batch, kv_heads, group, q_len, history, head_dim, landmarks, softmax, seed)| Case {
            batch,
            kv_heads,
            group,
            q_len,
            history,
            head_dim,
            landmarks,
            softmax,
            seed,
        },
    )
}

/// SplitMix64: numbers that depend on the case alone.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn tensor(&mut self, shape: (usize, usize, usize, usize)) -> Tensor {
        let n = shape.0 * shape.1 * shape.2 * shape.3;
        let xs: Vec<f64> = (0..n).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64 * 4. - 2.).collect();
        Tensor::from_vec(xs, shape, &Device::Cpu).unwrap()
    }
}

impl Case {
    fn inputs(&self) -> ([Tensor; 4], LandmarkParams) {
        let mut numbers = Numbers(self.seed);
        let (q_heads, kv_len) = (self.kv_heads * self.group, self.q_len + self.history);
        let q = (self.batch, q_heads, self.q_len, self.head_dim);
        let k = (self.batch, self.kv_heads, kv_len, self.head_dim);
        let tensors = [numbers.tensor(q), numbers.tensor(k), numbers.tensor(k), numbers.tensor(q)];
        let landmarks = match self.landmarks {
            Places::None => Landmarks::None,
            Places::Every(block) => Landmarks::Every(block),
            Places::Random(chance) => {
                let mask: Vec<u8> =
                    (0..self.batch * kv_len).map(|_| (numbers.next() as u8) < chance).map(u8::from).collect();
                Landmarks::Mask(Tensor::from_vec(mask, (self.batch, kv_len), &Device::Cpu).unwrap())
            }
        };
        (tensors, LandmarkParams { softmax: self.softmax, ..LandmarkParams::new(landmarks) })
    }
}

type Op = fn(&Tensor, &Tensor, &Tensor, &LandmarkParams) -> landmark_attention::Result<Tensor>;

/// Output, dq, dk, dv in f64.
fn run(op: Op, [q, k, v, dout]: &[Tensor; 4], params: &LandmarkParams, dtype: DType) -> [Tensor; 4] {
    let var = |x: &Tensor| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
    let (q, k, v) = (var(q), var(k), var(v));
    let out = op(&q, &k, &v, params).unwrap();
    let grads = (&out * dout.to_dtype(dtype).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
    [out.clone(), grads.get(&q).unwrap().clone(), grads.get(&k).unwrap().clone(), grads.get(&v).unwrap().clone()]
        .map(|x| x.to_dtype(DType::F64).unwrap())
}

fn largest(x: &Tensor) -> f64 {
    x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
}

fn off(a: &Tensor, b: &Tensor) -> f64 {
    let difference = largest(&(a - b).unwrap());
    if difference.is_nan() { f64::INFINITY } else { difference }
}

fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

#[test]
fn fused_equals_reference() {
    runner(640)
        .run(&case(), |case| {
            let (tensors, params) = case.inputs();
            let expected = run(reference::landmark_attention, &tensors, &params, DType::F64);
            let exact = run(landmark_attention, &tensors, &params, DType::F64);
            let single = run(landmark_attention, &tensors, &params, DType::F32);
            for (i, name) in ["out", "dq", "dk", "dv"].iter().enumerate() {
                let size = 1. + largest(&expected[i]);
                prop_assert!(
                    off(&exact[i], &expected[i]) <= 1e-11 * size,
                    "{name} in f64: {}",
                    off(&exact[i], &expected[i])
                );
                prop_assert!(
                    off(&single[i], &expected[i]) <= 1e-5 * size,
                    "{name} in f32: {}",
                    off(&single[i], &expected[i])
                );
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn long_blocks_and_wide_heads() {
    for (block, kv_len, q_len, head_dim) in
        [(4096, 5000, 200, 8), (2, 700, 700, 8), (300, 1000, 1000, 256), (1000, 2500, 130, 40)]
    {
        let case = Case {
            batch: 1,
            kv_heads: 1,
            group: 1,
            q_len,
            history: kv_len - q_len,
            head_dim,
            landmarks: Places::Every(block),
            softmax: Softmax::Grouped,
            seed: 7,
        };
        let (tensors, params) = case.inputs();
        let expected = run(reference::landmark_attention, &tensors, &params, DType::F64);
        let got = run(landmark_attention, &tensors, &params, DType::F32);
        for (got, expected) in got.iter().zip(&expected) {
            assert!(off(got, expected) <= 1e-5 * (1. + largest(expected)), "block {block}: {}", off(got, expected));
        }
    }
}

#[test]
fn half_types_are_computed_in_f32() {
    runner(40)
        .run(&case(), |case| {
            let (tensors, params) = case.inputs();
            for dtype in [DType::BF16, DType::F16] {
                let rounded = tensors.clone().map(|x| x.to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap());
                let expected = run(reference::landmark_attention, &rounded, &params, DType::F64);
                let got = run(landmark_attention, &rounded, &params, dtype);
                for (got, expected) in got.iter().zip(&expected) {
                    prop_assert!(
                        off(got, expected) <= 2e-2 * (1. + largest(expected)),
                        "{dtype:?}: {}",
                        off(got, expected)
                    );
                }
            }
            Ok(())
        })
        .unwrap();
}

/// Without candle's graph the gradients are the graph's.
#[test]
fn gradients_without_a_graph() {
    runner(40)
        .run(&case(), |case| {
            let (tensors, params) = case.inputs();
            for dtype in [DType::F64, DType::F32] {
                let [_, graph @ ..] = run(landmark_attention, &tensors, &params, dtype);
                let [q, k, v, dout] = tensors.each_ref().map(|x| x.to_dtype(dtype).unwrap());
                let (out, lse) = landmark_attention_with_lse(&q, &k, &v, &params).unwrap();
                let direct = landmark_attention_backward([&q, &k, &v], &params, &out, &lse, &dout).unwrap();
                for (direct, graph) in direct.iter().zip(&graph) {
                    prop_assert_eq!(direct.dtype(), dtype);
                    prop_assert_eq!(off(&direct.to_dtype(DType::F64).unwrap(), graph), 0.);
                }
            }
            Ok(())
        })
        .unwrap();
}

/// Strided inputs, as a model's projections are, give what contiguous ones give.
#[test]
fn strides_do_not_matter() {
    let mut numbers = Numbers(3);
    let qkv = numbers.tensor((2, 70, 3, 4 * 16)).reshape((2, 70, 3 * 4, 16)).unwrap();
    let part = |i: usize| qkv.narrow(2, 4 * i, 4).unwrap().transpose(1, 2).unwrap();
    let params = LandmarkParams::new(Landmarks::Every(9));
    let strided = landmark_attention(&part(0), &part(1), &part(2), &params).unwrap();
    let [q, k, v] = [0, 1, 2].map(|i| part(i).contiguous().unwrap());
    assert_eq!(off(&strided, &landmark_attention(&q, &k, &v, &params).unwrap()), 0.);
}

#[test]
fn weights_sum_to_one() {
    runner(64)
        .run(&case(), |case| {
            let block = 2 + case.seed as usize % 60;
            let (mut tensors, _) = case.inputs();
            tensors[2] = tensors[2].ones_like().unwrap();
            let params = LandmarkParams::new(Landmarks::Every(block));
            let out = landmark_attention(&tensors[0], &tensors[1], &tensors[2], &params).unwrap();
            prop_assert!(off(&out, &out.ones_like().unwrap()) < 1e-12);
            Ok(())
        })
        .unwrap();
}

/// A block whose landmark gets weight 0 can be left out: what makes retrieval exact in the limit.
#[test]
fn a_block_of_weight_zero_can_be_left_out() {
    let (block, blocks, q_len) = (7, 6, 30);
    let mut numbers = Numbers(5);
    let q = numbers.tensor((1, 2, q_len, 16));
    let (k, v) =
        (numbers.tensor((1, 2, block * blocks + q_len, 16)), numbers.tensor((1, 2, block * blocks + q_len, 16)));
    // Channel 0 is 1 in all queries; the landmark of block 2 has -1e6 there.
    let q = Tensor::cat(&[&q.narrow(3, 0, 1).unwrap().ones_like().unwrap(), &q.narrow(3, 1, 15).unwrap()], 3).unwrap();
    let landmark = 3 * block - 1;
    let channels: Vec<f64> = (0..32).map(|c| if c % 16 == 0 { -1e6 } else { 0. }).collect();
    let low = Tensor::from_vec(channels, (1, 2, 1, 16), &Device::Cpu).unwrap();
    let end = landmark + 1;
    let rest = k.dims()[2] - end;
    let k = Tensor::cat(&[&k.narrow(2, 0, landmark).unwrap(), &low, &k.narrow(2, end, rest).unwrap()], 2).unwrap();
    let without =
        |x: &Tensor| Tensor::cat(&[&x.narrow(2, 0, 2 * block).unwrap(), &x.narrow(2, end, rest).unwrap()], 2).unwrap();
    let params = LandmarkParams::new(Landmarks::Every(block));
    let all = landmark_attention(&q, &k, &v, &params).unwrap();
    let fewer = landmark_attention(&q, &without(&k), &without(&v), &params).unwrap();
    assert!(off(&all, &fewer) < 1e-14);
}

/// Parts of an attention that were computed apart are joined by their log-sum-exps.
#[test]
fn log_sum_exp_joins_parts() {
    let mut numbers = Numbers(11);
    let q = numbers.tensor((2, 3, 1, 8));
    let (k, v) = (numbers.tensor((2, 3, 40, 8)), numbers.tensor((2, 3, 40, 8)));
    let params = LandmarkParams::new(Landmarks::None);
    let part = |from: usize, n: usize| {
        landmark_attention_with_lse(&q, &k.narrow(2, from, n).unwrap(), &v.narrow(2, from, n).unwrap(), &params)
            .unwrap()
    };
    let (whole, whole_lse) = part(0, 40);
    let ((a, lse_a), (b, lse_b)) = (part(0, 15), part(15, 25));
    let (joined, joined_lse) = retrieval::join((&a, &lse_a), (&b, &lse_b)).unwrap();
    assert!(off(&joined, &whole) < 1e-14 && off(&joined_lse, &whole_lse) < 1e-14);
    let scores = q.matmul(&k.t().unwrap()).unwrap().affine(1. / 8f64.sqrt(), 0.).unwrap();
    let expected = scores.exp().unwrap().sum(D::Minus1).unwrap().log().unwrap();
    assert!(off(&whole_lse, &expected) < 1e-13);
}

/// A landmark that opens the text has nothing to attend to: zeros, and no gradient, never NaN.
#[test]
fn a_query_without_candidates_gets_zeros() {
    let mut numbers = Numbers(2);
    let tensors = [(); 4].map(|()| numbers.tensor((1, 1, 6, 8)));
    let mask = Tensor::new(&[[1u8, 1, 0, 0, 1, 0]], &Device::Cpu).unwrap();
    let params = LandmarkParams::new(Landmarks::Mask(mask));
    let [out, dq, dk, dv] = run(landmark_attention, &tensors, &params, DType::F32);
    assert_eq!(largest(&out.narrow(2, 0, 1).unwrap()), 0.);
    for x in [&out, &dq, &dk, &dv] {
        assert!(largest(x).is_finite());
    }
}

/// Dropout: the gradient is that of the very draw, the same draw comes back, and on average nothing changes.
#[test]
fn dropout() {
    let case = Case {
        batch: 1,
        kv_heads: 2,
        group: 2,
        q_len: 24,
        history: 4,
        head_dim: 8,
        landmarks: Places::Every(5),
        softmax: Softmax::Grouped,
        seed: 1,
    };
    let (tensors, params) = case.inputs();
    let with = |weights: f32, groups: f32, seed: u64| LandmarkParams {
        dropout: Some(Dropout { weights, groups, seed }),
        ..params.clone()
    };
    for (weights, groups) in [(0.3, 0.), (0., 0.4), (0.2, 0.3)] {
        let params = with(weights, groups, 9);
        let value = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let out = landmark_attention(q, k, v, &params).unwrap();
            (out * &tensors[3]).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
        };
        let grads = run(landmark_attention, &tensors, &params, DType::F64);
        for (i, grad) in grads[1..].iter().enumerate() {
            let mut direction = Numbers(4 + i as u64);
            let (b, h, t, d) = tensors[i].dims4().unwrap();
            let direction = direction.tensor((b, h, t, d));
            let step = |sign: f64| {
                let mut moved = [tensors[0].clone(), tensors[1].clone(), tensors[2].clone()];
                moved[i] = (&moved[i] + (&direction * (sign * 1e-5)).unwrap()).unwrap();
                value(&moved[0], &moved[1], &moved[2])
            };
            let slope = (step(1.) - step(-1.)) / 2e-5;
            let expected = (grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            assert!((slope - expected).abs() < 1e-6 * (1. + expected.abs()), "{slope} and {expected}");
        }
        assert_eq!(off(&grads[0], &run(landmark_attention, &tensors, &params, DType::F64)[0]), 0.);
    }
    let plain = landmark_attention(&tensors[0], &tensors[1], &tensors[2], &params).unwrap();
    let mut sum = plain.zeros_like().unwrap();
    let draws = 3000;
    for seed in 0..draws {
        let params = with(0.1, 0.2, seed);
        sum = (sum + landmark_attention(&tensors[0], &tensors[1], &tensors[2], &params).unwrap()).unwrap();
    }
    let mean = (sum / draws as f64).unwrap();
    assert!(off(&mean, &plain) < 0.1, "{}", off(&mean, &plain));
}

#[test]
fn wrong_calls_are_named() {
    let x = |shape: (usize, usize, usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let params = LandmarkParams::new(Landmarks::None);
    let error = |q: &Tensor, k: &Tensor, v: &Tensor, params: &LandmarkParams| {
        landmark_attention(q, k, v, params).unwrap_err().to_string()
    };
    let (q, k) = (x((1, 4, 8, 16)), x((1, 2, 8, 16)));
    assert!(error(&x((1, 3, 8, 16)), &k, &k, &params).contains("kv_heads that divides the 3 heads"));
    assert!(error(&q, &x((1, 2, 7, 16)), &k, &params).contains("k has shape [1, 2, 7, 16]"));
    assert!(error(&q, &k, &x((1, 2, 9, 16)), &params).contains("v has shape [1, 2, 9, 16], expected [1, 2, 8, 16]"));
    assert!(error(&q, &k.to_dtype(DType::F64).unwrap(), &k, &params).contains("k has dtype F64"));
    let ints = x((1, 4, 8, 16)).to_dtype(DType::U32).unwrap();
    assert!(error(&ints, &ints, &ints, &params).contains("q has dtype U32"));
    assert!(error(&q, &k, &k, &LandmarkParams::new(Landmarks::Every(1))).contains("block is 1, expected at least 2"));
    let mask = Tensor::zeros((1, 9), DType::U8, &Device::Cpu).unwrap();
    assert!(error(&q, &k, &k, &LandmarkParams::new(Landmarks::Mask(mask))).contains("landmarks has shape [1, 9]"));
    let dropout = Some(Dropout { weights: 1., groups: 0., seed: 0 });
    assert!(error(&q, &k, &k, &LandmarkParams { dropout, ..params.clone() }).contains("dropout.weights is 1"));
    let scale = Some(f64::NAN);
    assert!(error(&q, &k, &k, &LandmarkParams { scale, ..params.clone() }).contains("scale is NaN"));
    let lse = Tensor::zeros((1, 4, 8), DType::F32, &Device::Cpu).unwrap();
    let error = |out: &Tensor, lse: &Tensor, dout: &Tensor| {
        landmark_attention_backward([&q, &k, &k], &params, out, lse, dout).unwrap_err().to_string()
    };
    assert!(error(&k, &lse, &q).contains("out has shape [1, 2, 8, 16], expected [1, 4, 8, 16]"));
    assert!(error(&q, &q, &q).contains("lse has shape [1, 4, 8, 16], expected [1, 4, 8]"));
    assert!(error(&q, &lse, &q.to_dtype(DType::BF16).unwrap()).contains("dout has dtype BF16, expected F32"));
}
