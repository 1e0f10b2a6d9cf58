//! The authors' numbers for the operation: outputs and all gradients, reference and fused.

use candle_core::{DType, Device, Tensor, Var};
use landmark_attention::{LandmarkParams, Landmarks, landmark_attention, reference};

fn golden(case: &str) -> std::collections::HashMap<String, Tensor> {
    let dir = std::env::var("LANDMARK_GOLDEN_DIR")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").to_string());
    let file = std::path::Path::new(&dir).join(format!("{case}.safetensors"));
    candle_core::safetensors::load(&file, &Device::Cpu).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

fn assert_near(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    let difference = (got.to_dtype(DType::F64).unwrap() - expected).unwrap().abs().unwrap();
    let largest = difference.flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
    assert!(largest <= tolerance, "{what}: off by {largest:e}, more than {tolerance:e}");
}

fn check(case: &str) {
    let golden = golden(case);
    type Op = fn(&Tensor, &Tensor, &Tensor, &LandmarkParams) -> landmark_attention::Result<Tensor>;
    let ops: [(&str, Op); 2] = [("reference", reference::landmark_attention), ("fused", landmark_attention)];
    for (name, op) in ops {
        for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
            let input = |name: &str| Var::from_tensor(&golden[name].to_dtype(dtype).unwrap()).unwrap();
            let (q, k, v) = (input("q"), input("k"), input("v"));
            let params = LandmarkParams::new(Landmarks::Mask(golden["is_landmark"].clone()));
            let out = op(&q, &k, &v, &params).unwrap();
            assert_near(&format!("{case} {name} {dtype:?} out"), &out, &golden["out"], tolerance);
            let grads =
                (&out * golden["dout"].to_dtype(dtype).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
            for (var, grad) in [(&q, "dq"), (&k, "dk"), (&v, "dv")] {
                let what = format!("{case} {name} {dtype:?} {grad}");
                assert_near(&what, grads.get(var).unwrap(), &golden[grad], tolerance);
            }
        }
    }
}

macro_rules! cases {
    ($($case:ident),* $(,)?) => {$(
        #[test]
        fn $case() {
            check(stringify!($case));
        }
    )*};
}

cases!(
    op_regular_block8,
    op_regular_block51_tail,
    op_block64_d64,
    op_gqa_block16,
    op_history_block16,
    op_decode_one_query,
    op_irregular_landmarks,
    op_no_landmarks,
);
