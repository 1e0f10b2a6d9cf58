//! Reading golden files and comparing with them.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

/// The tensors of one golden file.
pub struct Golden(HashMap<String, Tensor>);

/// A file among the golden ones.
pub fn golden_file(name: &str) -> PathBuf {
    std::env::var_os("LANDMARK_GOLDEN_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"))
        .join(name)
}

impl Golden {
    pub fn read(name: &str) -> Self {
        let path = golden_file(&format!("{name}.safetensors"));
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu);
        Self(tensors.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("the golden file has no {name}"))
    }

    /// Token ids as u32; a negative one, no target in the golden files, becomes `IGNORE`.
    pub fn ids(&self, name: &str) -> Tensor {
        let ids = self.get(name);
        let values = ids.flatten_all().unwrap().to_vec1::<i64>().unwrap();
        let values = values.into_iter().map(|id| u32::try_from(id).unwrap_or(landmark_models::IGNORE));
        Tensor::from_iter(values, &Device::Cpu).unwrap().reshape(ids.shape()).unwrap()
    }

    /// The tensors named `prefix...`, by the rest of their names.
    pub fn under(&self, prefix: &str, dtype: DType) -> HashMap<String, Tensor> {
        let named = self.0.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?, t)));
        named.map(|(name, t)| (name.to_string(), t.to_dtype(dtype).unwrap())).collect()
    }
}

/// Fails if an element of `got` is further than `tolerance` from `expected`.
pub fn assert_close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), expected.dims(), "{what}: shape");
    let flat = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let worst = flat(got)
        .into_iter()
        .zip(flat(expected))
        .map(|(g, e)| (g - e).abs())
        .fold(0., |worst, error| if error.is_nan() { f64::INFINITY } else { f64::max(worst, error) });
    assert!(worst <= tolerance, "{what}: off by {worst:e}, more than {tolerance:e}");
}
