//! With the feature `cuda`: compiles the kernels of `src/ops/cuda` with nvcc and links them.

use landmark_nvcc::{GENERAL, compile};

fn main() {
    compile(
        "landmark_layers",
        "src/ops/cuda",
        &[("layers", GENERAL), ("loss", GENERAL), ("norm", GENERAL), ("tune", GENERAL)],
    );
}
