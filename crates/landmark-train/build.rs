//! With the feature `cuda`: compiles the optimizer's kernels with nvcc and links them.

use landmark_nvcc::{GENERAL, compile};

fn main() {
    compile("landmark_optimizer", "src/cuda", &[("optimizer", GENERAL)]);
}
