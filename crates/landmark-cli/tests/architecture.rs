//! ARCHITECTURE.md names the crates that there are, and the dependencies that they have.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn architecture_md_is_true() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let documented: BTreeSet<(String, BTreeSet<String>)> = text
        .split("\n### ")
        .skip(1)
        .map(|section| {
            let name = section.lines().next().unwrap().to_string();
            let depends = section.lines().find_map(|line| line.strip_prefix("Depends on: ")).unwrap_or_default();
            let ours = depends.trim_end_matches('.').split(", ").filter(|word| word.starts_with("landmark-"));
            (name, ours.map(str::to_string).collect())
        })
        .collect();
    let actual: BTreeSet<(String, BTreeSet<String>)> = fs::read_dir(root.join("crates"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let manifest = fs::read_to_string(entry.path().join("Cargo.toml")).unwrap();
            let section = manifest.split("[dependencies]").nth(1).unwrap();
            let section = section.split("\n[").next().unwrap();
            let ours = section.lines().filter_map(|line| line.split(['.', ' ']).next());
            let ours = ours.filter(|name| name.starts_with("landmark-")).map(str::to_string).collect();
            (entry.file_name().into_string().unwrap(), ours)
        })
        .collect();
    assert_eq!(documented, actual);
}

/// Every source file says what it is, and none outgrows what one can read.
#[test]
fn source_files_are_introduced_and_short() {
    fn check(folder: &Path) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                check(&path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                // The tests beside a module are introduced by it.
                let introduced = text.starts_with("//!") || path.ends_with("tests.rs");
                assert!(introduced, "{} does not begin with what it is", path.display());
                assert!(text.lines().count() <= 600, "{} is over 600 lines", path.display());
            }
        }
    }
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    check(&crates);
    check(&crates.join("../fuzz"));
}
