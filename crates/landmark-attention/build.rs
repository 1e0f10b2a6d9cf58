//! With the feature `cuda`: compiles the kernels of `src/cuda` with nvcc and links them.

use landmark_nvcc::{GENERAL, HOPPER, compile};

fn main() {
    let units = [("api", GENERAL), ("f32", GENERAL), ("f16", GENERAL), ("bf16", GENERAL), ("hopper", HOPPER)];
    compile("landmark_kernels", "src/cuda", &units);
}
