//! `landmark plot`: the curves of training runs in one picture.

use crate::curves::{self, Metrics, What};
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const EXAMPLE: &str = "\
Example:
  landmark plot exps/pg19/landmark/* exps/pg19/base_rotary/* --what perplexity --out runs.svg";

/// Flags of `landmark plot`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLE)]
pub struct Args {
    /// The folders of the runs, as `landmark train` names them
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// What to draw
    #[arg(long, value_enum, default_value_t = What::Loss)]
    what: What,
    /// The picture, SVG
    #[arg(long, value_name = "FILE", default_value = "plot.svg")]
    out: PathBuf,
}

/// Draws.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { runs, what, out } = args;
    let names = names(&runs);
    let mut all = Vec::new();
    for (run, name) in runs.iter().zip(&names) {
        all.extend(Metrics::read(run)?.curves(what, (runs.len() > 1).then_some(name)));
    }
    curves::draw(&out, what, &all).with_context(|| format!("--out {}", out.display()))?;
    println!("{} curves of {} runs: {}", all.len(), runs.len(), out.display());
    Ok(ExitCode::SUCCESS)
}

/// What tells the runs apart: their paths without the folders that all have in common.
fn names(runs: &[PathBuf]) -> Vec<String> {
    let shared = (0..).take_while(|&depth| {
        let mut at = runs.iter().map(|run| (run.components().nth(depth), run.components().count() > depth + 1));
        at.next().is_some_and(|(first, deeper)| deeper && at.all(|(other, deeper)| deeper && other == first))
    });
    let shared = shared.count();
    let name = |run: &PathBuf| run.components().skip(shared).collect::<PathBuf>();
    runs.iter().map(|run| Path::display(&name(run)).to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_differs() {
        let of = |paths: &[&str]| names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(of(&["exps/pg19/landmark/a", "exps/pg19/base_rotary/a"]), ["landmark/a", "base_rotary/a"]);
        assert_eq!(of(&["a", "a/b", "c"]), ["a", "a/b", "c"]);
        assert_eq!(of(&["x/run"]), ["run"]);
    }
}
