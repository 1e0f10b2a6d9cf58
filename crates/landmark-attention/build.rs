//! With the feature `cuda`: compiles the kernels of `src/cuda` with nvcc and links them.

use landmark_nvcc::{GENERAL, HOPPER, compile};

fn main() {
    let general = ["api", "f32", "f16", "bf16", "outside", "retrieval", "rope"].map(|unit| (unit, GENERAL));
    compile("landmark_kernels", "src/cuda", &[&general[..], &[("hopper", HOPPER)]].concat());
}
