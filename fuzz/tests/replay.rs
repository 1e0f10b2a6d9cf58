//! Every input of the corpora, and every seed, comes to its end.

use std::fs;
use std::path::Path;

fn replay(name: &str) {
    let target = landmark_fuzz::target(name).unwrap();
    for (i, seed) in (target.seeds)().iter().enumerate() {
        assert!((target.run)(seed), "seed {i} is refused");
    }
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(corpus).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        // Shown if the test fails: which input it was.
        println!("{}", file.display());
        (target.run)(&fs::read(file).unwrap());
    }
}

macro_rules! replay {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*

        #[test]
        fn all_targets_are_here() {
            assert_eq!([$(stringify!($name)),*], landmark_fuzz::TARGETS.map(|target| target.name));
        }
    };
}

replay!(request template session model gguf tokens tokenizer prepare);
