//! What chips are said to do.

/// Dense bf16 products with sums in f32, in TFLOP/s, by the beginning of the driver's name for the chip: the datasheets of NVIDIA, halved where
/// they count sparsity, and its white papers on the GA102 and AD102 for GeForce. The longest name that fits counts.
const DENSE_BF16: &[(&str, f64)] = &[
    ("NVIDIA A10", 125.),
    ("NVIDIA A100", 312.),
    ("NVIDIA A30", 165.),
    ("NVIDIA A40", 149.7),
    ("NVIDIA A800", 312.),
    ("NVIDIA B200", 2250.),
    ("NVIDIA GH200", 989.4),
    ("NVIDIA GeForce RTX 3090", 71.),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA H100 PCIe", 756.),
    ("NVIDIA H200", 989.4),
    ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA L4", 121.),
    ("NVIDIA L40", 181.),
    ("NVIDIA L40S", 362.),
    ("NVIDIA RTX 6000 Ada", 364.2),
    ("NVIDIA RTX A6000", 154.8),
];

/// The chip's dense bf16 peak in TFLOP/s, where it is known.
pub fn dense_bf16(name: &str) -> Option<f64> {
    let whole_words =
        |known: &str| name.strip_prefix(known).is_some_and(|rest| !rest.starts_with(char::is_alphanumeric));
    let fitting = DENSE_BF16.iter().filter(|(known, _)| whole_words(known));
    fitting.max_by_key(|(known, _)| known.len()).map(|&(_, peak)| peak)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_counts() {
        assert_eq!(dense_bf16("NVIDIA H100 80GB HBM3"), Some(989.4));
        assert_eq!(dense_bf16("NVIDIA H200"), Some(989.4));
        assert_eq!(dense_bf16("NVIDIA H200 NVL"), Some(835.5));
        assert_eq!(dense_bf16("NVIDIA A100-SXM4-80GB"), Some(312.));
        assert_eq!(dense_bf16("NVIDIA A10G"), None);
        assert_eq!(dense_bf16("NVIDIA T4"), None);
    }
}
