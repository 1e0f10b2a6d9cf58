//! The fused operations: values against candle's own, gradients against finite differences, errors by name.

use candle_core::{DType, Device, Result, Tensor, Var};
use landmark_models::ops::{self, Activation, Dropout, Mlp, NormKind};
use landmark_models::{Error, IGNORE};

const CPU: Device = Device::Cpu;

/// Numbers that look random and are the same every time.
fn values(seed: usize, shape: &[usize]) -> Var {
    let n = shape.iter().product::<usize>();
    let values = (0..n)
        .map(|i| ((i + 1) as f64 * 12.9898 + seed as f64 * 78.233).sin() * 43758.5453)
        .map(|x| x - x.floor() - 0.5);
    Var::from_tensor(&Tensor::from_iter(values, &CPU).unwrap().reshape(shape).unwrap()).unwrap()
}

/// A number that depends on every element of `x` in its own way.
fn weigh(x: &Tensor) -> Result<Tensor> {
    (x * values(999, x.dims()).as_detached_tensor())?.sum_all()
}

/// Compares the gradient of `f` with central differences, for every element of every input.
fn check_gradients(what: &str, inputs: &[&Var], f: impl Fn() -> landmark_models::Result<Tensor>) {
    let grads = f().unwrap().backward().unwrap();
    const H: f64 = 1e-5;
    for (index, input) in inputs.iter().enumerate() {
        let got = grads.get(input).unwrap_or_else(|| panic!("{what}: input {index} has no gradient"));
        let got = got.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let original = input.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (i, got) in got.into_iter().enumerate() {
            let at = |h: f64| {
                let mut moved = original.clone();
                moved[i] += h;
                input.set(&Tensor::from_vec(moved, input.shape(), &CPU).unwrap()).unwrap();
                f().unwrap().to_scalar::<f64>().unwrap()
            };
            let expected = (at(H) - at(-H)) / (2. * H);
            assert!((got - expected).abs() < 1e-8, "{what}: input {index}, element {i}: {got}, expected {expected}");
        }
        input.set(&Tensor::from_vec(original, input.shape(), &CPU).unwrap()).unwrap();
    }
}

#[test]
fn gradient_of_linear() {
    let (x, w, b) = (values(1, &[2, 3, 5]), values(2, &[7, 5]), values(3, &[7]));
    check_gradients("linear", &[&x, &w], || Ok(weigh(&ops::linear(&x, &w, None)?)?));
    check_gradients("linear with bias", &[&x, &w, &b], || Ok(weigh(&ops::linear(&x, &w, Some(&b))?)?));
    // A strided input, and an input used twice.
    let t = values(4, &[5, 3]);
    check_gradients("linear of a transpose", &[&t, &w], || Ok(weigh(&ops::linear(&t.t()?, &w, None)?)?));
    let s = values(5, &[4, 4]);
    check_gradients("linear of itself", &[&s], || Ok(weigh(&ops::linear(&s, &s, None)?)?));
}

#[test]
fn gradient_of_linear_onto() {
    let (x, w, b, residual) = (values(1, &[2, 3, 5]), values(2, &[7, 5]), values(3, &[7]), values(4, &[2, 3, 7]));
    check_gradients("linear_onto", &[&x, &w, &residual], || Ok(weigh(&ops::linear_onto(&x, &w, None, &residual)?)?));
    check_gradients("linear_onto with bias", &[&x, &w, &b, &residual], || {
        Ok(weigh(&ops::linear_onto(&x, &w, Some(&b), &residual)?)?)
    });
    // Of a weight that does not learn no gradient is computed, and the others' are right.
    let frozen = w.as_detached_tensor();
    check_gradients("linear_onto, frozen", &[&x, &residual], || {
        Ok(weigh(&ops::linear_onto(&x, &frozen, None, &residual)?)?)
    });
    let short = residual.narrow(2, 0, 6).unwrap();
    assert!(matches!(ops::linear_onto(&x, &w, None, &short), Err(Error::Shape { tensor: "residual", .. })));
}

#[test]
fn gradient_of_heads() {
    let x = values(1, &[2, 3, 12]);
    check_gradients("split_heads", &[&x], || Ok(weigh(&ops::split_heads(&x, 3)?)?));
    let expected = x.reshape((2, 3, 3, 4)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
    assert_eq!(bits(&ops::split_heads(&x, 3).unwrap()), bits(&expected));
    let o = values(2, &[2, 3, 4, 5]);
    check_gradients("join_heads", &[&o], || Ok(weigh(&ops::join_heads(&o)?)?));
    assert_eq!(bits(&ops::join_heads(&ops::split_heads(&x, 3).unwrap()).unwrap()), bits(&x));
    assert!(matches!(ops::split_heads(&x, 5), Err(Error::Shape { tensor: "x", .. })));
    assert!(matches!(ops::join_heads(&x), Err(Error::Shape { tensor: "o", .. })));
}

#[test]
fn gradient_of_swiglu() {
    let (gate, up) = (values(1, &[2, 3, 7]), values(2, &[2, 3, 7]));
    check_gradients("swiglu", &[&gate, &up], || Ok(weigh(&ops::swiglu(&gate, &up)?)?));
    assert!(matches!(ops::swiglu(&gate, &values(3, &[2, 3, 6])), Err(Error::Shape { tensor: "up", .. })));
}

#[test]
fn gradient_of_norm() {
    let (x, w, b) = (values(1, &[3, 2, 37]), values(2, &[37]), values(3, &[37]));
    check_gradients("rms_norm", &[&x, &w], || {
        Ok(weigh(&ops::norm(&x, NormKind::Rms { eps: 1e-5 }, &w, None, x.dtype())?)?)
    });
    let rms = NormKind::Rms { eps: 0.1 };
    check_gradients("rms_norm of large eps", &[&x, &w], || Ok(weigh(&ops::norm(&x, rms, &w, None, x.dtype())?)?));
    let zeros = Tensor::zeros((1, 37), DType::F64, &CPU).unwrap();
    assert!(ops::norm(&zeros, rms, &w, None, x.dtype()).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap() == 0.);
    check_gradients("layer_norm", &[&x, &w], || Ok(weigh(&ops::norm(&x, NormKind::Layer, &w, None, x.dtype())?)?));
    check_gradients("layer_norm with bias", &[&x, &w, &b], || {
        Ok(weigh(&ops::norm(&x, NormKind::Layer, &w, Some(&b), x.dtype())?)?)
    });
}

#[test]
fn gradient_of_mlp() {
    let (x, residual) = (values(1, &[2, 3, 4]), values(2, &[2, 3, 4]));
    let (up, down, up_bias, down_bias) = (values(3, &[9, 4]), values(4, &[4, 9]), values(5, &[9]), values(6, &[4]));
    let activation = Activation::Gelu;
    let bare =
        Mlp { activation, up: up.as_tensor().clone(), up_bias: None, down: down.as_tensor().clone(), down_bias: None };
    let biased = Mlp {
        up_bias: Some(up_bias.as_tensor().clone()),
        down_bias: Some(down_bias.as_tensor().clone()),
        ..bare.clone()
    };
    let dropout = Some(Dropout { p: 0.4, seed: 3 });
    check_gradients("mlp", &[&x, &residual, &up, &down], || Ok(weigh(&ops::mlp(&x, &bare, &residual, None)?)?));
    check_gradients("mlp with biases and dropout", &[&x, &residual, &up, &down, &up_bias, &down_bias], || {
        Ok(weigh(&ops::mlp(&x, &biased, &residual, dropout)?)?)
    });
    let (gated_up, gated_bias) = (values(7, &[18, 4]), values(8, &[18]));
    let gated = Mlp {
        activation: Activation::Swiglu,
        up: gated_up.as_tensor().clone(),
        up_bias: Some(gated_bias.as_tensor().clone()),
        ..bare.clone()
    };
    check_gradients("swiglu", &[&x, &residual, &gated_up, &down, &gated_bias], || {
        Ok(weigh(&ops::mlp(&x, &gated, &residual, None)?)?)
    });
    let odd = Mlp { up: values(9, &[17, 4]).as_tensor().clone(), up_bias: None, ..gated };
    assert!(matches!(ops::mlp(&x, &odd, &residual, None), Err(Error::Shape { tensor: "up", .. })));
    // Without a gradient to come the GELU is taken in place.
    let detached = Mlp {
        activation,
        up: up.as_detached_tensor(),
        up_bias: None,
        down: down.as_detached_tensor(),
        down_bias: None,
    };
    let got = ops::mlp(&x.as_detached_tensor(), &detached, &residual.as_detached_tensor(), None).unwrap();
    let expected = ops::mlp(&x, &bare, &residual, None).unwrap();
    assert_eq!(bits(&got), bits(&expected));
}

#[test]
fn gradient_of_the_projections_around_attention() {
    let (x, w, b) = (values(1, &[2, 3, 4]), values(2, &[12, 4]), values(3, &[12]));
    let all = |b: Option<&Tensor>| -> landmark_models::Result<Tensor> {
        let [q, k, v] = ops::project_heads(&x, &w, b, 2)?;
        Ok(((weigh(&q)? + weigh(&k.sqr()?)?)? + weigh(&(v * 3.)?)?)?)
    };
    check_gradients("project_heads", &[&x, &w], || all(None));
    check_gradients("project_heads with bias", &[&x, &w, &b], || all(Some(&b)));
    check_gradients("project_heads, only k used", &[&x, &w], || Ok(weigh(&ops::project_heads(&x, &w, None, 2)?[1])?));

    let (o, w, b, residual) = (values(4, &[2, 2, 3, 2]), values(5, &[4, 4]), values(6, &[4]), values(7, &[2, 3, 4]));
    let dropout = Some(Dropout { p: 0.4, seed: 3 });
    check_gradients("merge_heads", &[&o, &residual, &w], || {
        Ok(weigh(&ops::merge_heads(&o, &w, None, &residual, None)?)?)
    });
    check_gradients("merge_heads with bias and dropout", &[&o, &residual, &w, &b], || {
        Ok(weigh(&ops::merge_heads(&o, &w, Some(&b), &residual, dropout)?)?)
    });
}

#[test]
fn gradient_of_embedding_and_dropout() {
    let w = values(1, &[70, 3]);
    let tokens = Tensor::new(&[[0u32, 69, 5], [5, 64, 5]], &CPU).unwrap();
    check_gradients("embedding", &[&w], || Ok(weigh(&ops::embedding(&w, &tokens)?)?));
    let x = values(2, &[4, 33]);
    check_gradients("dropout", &[&x], || Ok(weigh(&ops::dropout(&x, Dropout { p: 0.3, seed: 7 })?)?));
}

#[test]
fn gradient_of_cross_entropy() {
    let (x, w) = (values(1, &[2, 3, 4]), values(2, &[11, 4]));
    let targets = Tensor::new(&[[3u32, IGNORE, 0], [10, 3, IGNORE]], &CPU).unwrap();
    check_gradients("cross_entropy", &[&x, &w], || ops::cross_entropy(&x, &w, &targets, None));
    let weights = Tensor::new(&[[0.5f32, 7., 2.], [0., 1., 1.]], &CPU).unwrap();
    check_gradients("weighed", &[&x, &w], || ops::cross_entropy(&x, &w, &targets, Some(&weights)));
    let flat = weights.flatten_all().unwrap();
    let of = |targets: &[u32], weights: Option<&Tensor>| {
        let x = x.flatten(0, 1).unwrap();
        let loss = ops::cross_entropy(&x, &w, &Tensor::new(targets, &CPU).unwrap(), weights).unwrap();
        loss.to_scalar::<f64>().unwrap()
    };
    let one = |place: usize, target: u32| {
        let mut targets = [IGNORE; 6];
        targets[place] = target;
        of(&targets, None)
    };
    let weighed = of(&[3, IGNORE, 0, 10, 3, IGNORE], Some(&flat));
    assert!((weighed - (0.5 * one(0, 3) + 2. * one(2, 0) + one(4, 3)) / 3.5).abs() < 1e-12);
    let negative = (weights.neg()).unwrap();
    let wrong = ops::cross_entropy(&x, &w, &targets, Some(&negative));
    assert!(matches!(wrong, Err(Error::Value { name: "weights", .. })));
    check_gradients("half of it", &[&x, &w], || Ok((ops::cross_entropy(&x, &w, &targets, None)? * 0.5)?));
    // Many rows of a large vocabulary: several chunks.
    let (x, w) = (values(3, &[700, 2]), values(4, &[9000, 2]));
    let targets = Tensor::from_iter((0..700u32).map(|i| if i % 5 == 0 { IGNORE } else { i * 12 }), &CPU).unwrap();
    let loss = ops::cross_entropy(&x, &w, &targets, None).unwrap();
    let grads = loss.backward().unwrap();
    let scores = ops::token_scores(&x, &w, &targets).unwrap();
    let logits = x.matmul(&w.t().unwrap()).unwrap();
    let log_sum = logits.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap();
    let counted: Vec<u32> = (0..700).filter(|i| i % 5 != 0).collect();
    let rows = Tensor::new(counted.as_slice(), &CPU).unwrap();
    let log_p = logits.broadcast_sub(&log_sum).unwrap().index_select(&rows, 0).unwrap();
    let picked = targets.index_select(&rows, 0).unwrap().unsqueeze(1).unwrap();
    let expected = log_p.gather(&picked, 1).unwrap().mean_all().unwrap().neg().unwrap();
    let plain = expected.backward().unwrap();
    let number = |x: &Tensor| x.to_scalar::<f64>().unwrap();
    assert!((number(&loss) - number(&expected)).abs() < 1e-12);
    for input in [&x, &w] {
        let off = (grads.get(input).unwrap() - plain.get(input).unwrap()).unwrap().abs().unwrap().max_all().unwrap();
        assert!(number(&off) < 1e-12);
    }
    let mean = scores.iter().flatten().map(|s| s.loss).sum::<f64>() / counted.len() as f64;
    assert!((mean - number(&loss)).abs() < 1e-12);
    assert_eq!(scores.iter().filter(|s| s.is_none()).count(), 140);
    let best = logits.argmax(1).unwrap().to_vec1::<u32>().unwrap();
    let wanted = targets.to_vec1::<u32>().unwrap();
    for (i, score) in scores.iter().enumerate() {
        assert!(score.is_none_or(|s| s.correct == (best[i] == wanted[i])));
    }
    // The same value without a gradient to come.
    let detached = ops::cross_entropy(&x.as_detached_tensor(), &w.as_detached_tensor(), &targets, None).unwrap();
    assert!((number(&detached) - number(&loss)).abs() < 1e-12);
}

#[test]
fn f32_agrees_with_f64() {
    let f32 = |x: &Var| Var::from_tensor(&x.to_dtype(DType::F32).unwrap()).unwrap();
    let (x, w, v) = (values(1, &[130, 64]), values(2, &[96, 64]), values(3, &[64]));
    let targets = Tensor::from_iter((0..130u32).map(|i| i % 96), &CPU).unwrap();
    let run = |x: &Var, w: &Var, v: &Var| {
        let normal = ops::norm(x, NormKind::Layer, v, None, x.dtype()).unwrap();
        let mlp = Mlp {
            activation: Activation::Gelu,
            up: w.as_tensor().clone(),
            up_bias: None,
            down: w.t().unwrap().contiguous().unwrap(),
            down_bias: None,
        };
        let hidden = ops::mlp(&normal, &mlp, x, Some(Dropout { p: 0.1, seed: 1 })).unwrap();
        let loss = ops::cross_entropy(&hidden, w, &targets, None).unwrap();
        let grads = loss.backward().unwrap();
        [loss, grads.get(x).unwrap().clone(), grads.get(w).unwrap().clone(), grads.get(v).unwrap().clone()]
    };
    let got = run(&f32(&x), &f32(&w), &f32(&v));
    for (got, expected) in got.iter().zip(run(&x, &w, &v)) {
        let off = (got.to_dtype(DType::F64).unwrap() - &expected).unwrap().abs().unwrap().flatten_all().unwrap();
        assert!(off.max(0).unwrap().to_scalar::<f64>().unwrap() < 2e-6, "{off}");
    }
}

fn bits(x: &Tensor) -> Vec<u64> {
    x.flatten_all().unwrap().to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
}

#[test]
fn dropout_draws_by_seed_and_place() {
    let x = Tensor::ones((200, 500), DType::F32, &CPU).unwrap();
    let draw = |seed| {
        let y = ops::dropout(&x, Dropout { p: 0.25, seed }).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let drawn = draw(1);
    assert_eq!(drawn, draw(1));
    assert_ne!(drawn, draw(2));
    let dropped = drawn.iter().filter(|y| **y == 0.).count() as f64 / drawn.len() as f64;
    assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
    assert!(drawn.iter().all(|y| *y == 0. || (y - 4. / 3.).abs() < 1e-6));
}

#[test]
fn errors_name_the_argument() {
    let (x, w) = (values(1, &[3, 4]), values(2, &[5, 4]));
    let narrow = values(3, &[5, 3]);
    let ids = |ids: &[u32]| Tensor::new(ids, &CPU).unwrap();
    let shape = |result: landmark_models::Result<Tensor>, name: &str| {
        assert!(matches!(result, Err(Error::Shape { tensor, .. }) if tensor == name), "{name}");
    };
    shape(ops::linear(&x, &narrow, None), "w");
    shape(ops::linear(&x, &w, Some(&narrow)), "bias");
    shape(ops::linear(&Tensor::zeros((0, 4), DType::F64, &CPU).unwrap(), &w, None), "x");
    shape(ops::norm(&x, NormKind::Layer, &narrow, None, x.dtype()), "w");
    shape(ops::cross_entropy(&x, &w, &ids(&[1, 2]), None), "targets");
    shape(ops::project_heads(&x, &w, None, 2).map(|[q, _, _]| q), "x");
    shape(ops::project_heads(&x.unsqueeze(0).unwrap(), &w, None, 2).map(|[q, _, _]| q), "w");
    shape(ops::merge_heads(&x, &w, None, &x, None), "o");
    let value = |result: landmark_models::Result<Tensor>, wrong: &str| {
        assert!(matches!(result, Err(Error::Value { name, .. }) if name == wrong), "{wrong}");
    };
    value(ops::embedding(&w, &ids(&[0, 5])), "tokens");
    value(ops::cross_entropy(&x, &w, &ids(&[1, 2, 5]), None), "targets");
    value(ops::cross_entropy(&x, &w, &ids(&[IGNORE, IGNORE, IGNORE]), None), "targets");
    value(ops::dropout(&x, Dropout { p: 1., seed: 0 }), "dropout.p");
    let dtype = |result: landmark_models::Result<Tensor>, name: &str| {
        assert!(matches!(result, Err(Error::DType { tensor, .. }) if tensor == name), "{name}");
    };
    dtype(ops::linear(&x, &w.to_dtype(DType::F32).unwrap(), None), "w");
    dtype(ops::linear(&x.to_dtype(DType::BF16).unwrap(), &w, None), "x");
    dtype(ops::embedding(&w, &x), "tokens");
}
