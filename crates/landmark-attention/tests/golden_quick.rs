//! Quick golden check.
use candle_core::*;
use landmark_attention::*;
#[test]
fn quick() {
    for f in std::fs::read_dir("../../tests/golden").unwrap() {
        let p = f.unwrap().path();
        let n = p.file_name().unwrap().to_str().unwrap().to_string();
        if !n.starts_with("op_") {
            continue;
        }
        let t = candle_core::safetensors::load(&p, &Device::Cpu).unwrap();
        let g = |k: &str| Var::from_tensor(&t[k]).unwrap();
        let (q, k, v) = (g("q"), g("k"), g("v"));
        let params = LandmarkParams::new(Landmarks::Mask(t["is_landmark"].clone()));
        for (name, o) in [
            ("ref", reference::landmark_attention(&q, &k, &v, &params).unwrap()),
            ("fused", landmark_attention(&q, &k, &v, &params).unwrap()),
        ] {
            let d =
                |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            let gr = (&o * &t["dout"]).unwrap().sum_all().unwrap().backward().unwrap();
            println!(
                "{n} {name} out {:e} dq {:e} dk {:e} dv {:e}",
                d(&o, &t["out"]),
                d(gr.get(&q).unwrap(), &t["dq"]),
                d(gr.get(&k).unwrap(), &t["dk"]),
                d(gr.get(&v).unwrap(), &t["dv"])
            );
        }
    }
}
