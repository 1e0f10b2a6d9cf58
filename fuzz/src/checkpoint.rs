//! Checkpoints of training: the folder of one, with other bytes in the place of one of its files.
//!
//! The first byte says which file, the second whether the checksums are made right again.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use candle_core::{DType, Device, Var};
use landmark_train::checkpoint::EXPERIMENT;
use landmark_train::{Method, Optimizer};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::place;

const ITERATION: usize = 3;
const SUMS: &str = "SHA256SUMS";

type Files = Vec<(String, Vec<u8>)>;

fn optimizer() -> Optimizer {
    let var = |shape: &[usize]| Var::ones(shape, DType::F32, &Device::Cpu).expect("a parameter");
    let parameters = BTreeMap::from([("bias".to_string(), var(&[3])), ("weight".to_string(), var(&[2, 3]))]);
    let method = Method::AdamW { beta1: 0.9, beta2: 0.95 };
    Optimizer::new(&parameters, method, 0.1, |_, var| var.rank() == 2, None).expect("an optimizer")
}

fn make() -> Files {
    let folder = place::folder("checkpoint-whole");
    let fill = |folder: &std::path::Path| optimizer().save(&folder.join("optimizer.safetensors"));
    let state = json!({"seed": 7, "evaluations": [{"loss": 1.5}]});
    let path = EXPERIMENT.save(&folder, ITERATION, state, fill).expect("a checkpoint can be written");
    place::files(&path)
}

fn with_files<T>(work: impl FnOnce(&Files) -> T) -> T {
    thread_local! {
        static FILES: OnceCell<Files> = const { OnceCell::new() };
    }
    FILES.with(|files| work(files.get_or_init(make)))
}

/// See the module.
pub fn run(bytes: &[u8]) -> bool {
    let Some((&[number, is_sealed], bytes)) = bytes.split_first_chunk::<2>() else { return false };
    let mut files = with_files(Clone::clone);
    let Some((_, whole)) = files.get_mut(usize::from(number)) else { return false };
    *whole = bytes.to_vec();
    if is_sealed == 1 {
        let others = files.iter().filter(|(name, _)| name != SUMS);
        let line = |(name, bytes): &(String, Vec<u8>)| {
            let sum: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{sum}  {name}\n")
        };
        let sums: String = others.map(line).collect();
        files.retain(|(name, _)| name != SUMS);
        files.push((SUMS.into(), sums.into_bytes()));
    }
    let folder = place::folder("checkpoint");
    place::fill(&folder, &[]);
    place::fill(&EXPERIMENT.path(&folder, ITERATION), &files);
    let Ok(Some(found)) = EXPERIMENT.latest::<Value>(&folder) else { return false };
    optimizer().load(&found.path.join("optimizer.safetensors")).is_ok()
}

pub fn seeds() -> Vec<Vec<u8>> {
    with_files(|files| {
        let each =
            |sealed: u8| (0u8..).zip(files).map(move |(number, (_, bytes))| [&[number, sealed][..], bytes].concat());
        each(0).chain(each(1)).collect()
    })
}
