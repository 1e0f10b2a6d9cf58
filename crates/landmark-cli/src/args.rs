//! Types of flags that several commands share.

use clap::Args;
use landmark_data::ExerciseOptions;
use landmark_models::gpt::NegativeRows;
use std::fmt::Display;
use std::str::FromStr;

/// A flag that takes a value or `None`, as the reference's do. Under this name clap takes it for a value of its own and
/// not for a flag that may be left out.
pub type NoneOr<T> = Option<T>;

/// Reads a value or `None`.
pub fn none_or<T: FromStr<Err: Display>>(text: &str) -> Result<NoneOr<T>, String> {
    if text == "None" { Ok(None) } else { text.parse().map(Some).map_err(|error: T::Err| error.to_string()) }
}

/// Reads a number of bytes: `500MB`, `2GiB`, `4096`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let units = [("", 0, 0), ("K", 3, 10), ("M", 6, 20), ("G", 9, 30), ("T", 12, 40)];
    let factor = units.into_iter().find_map(|(prefix, ten, two)| {
        let of = |ending: &str| unit.trim().eq_ignore_ascii_case(&format!("{prefix}{ending}"));
        let plain = prefix.is_empty() && of("");
        (plain || of("B")).then(|| 10f64.powi(ten)).or_else(|| (!prefix.is_empty() && of("iB")).then(|| 2f64.powi(two)))
    });
    let bytes = number.parse::<f64>().ok().zip(factor).map(|(number, factor)| number * factor);
    // Beyond these, f64 counts no single bytes.
    bytes
        .filter(|bytes| *bytes < 9e15)
        .map(|bytes| bytes as u64)
        .ok_or_else(|| "expected a number of bytes, such as 500MB, 2GiB or 4096".into())
}

/// Reads a truth value, written as in Python or in Rust.
pub fn truth(text: &str) -> Result<bool, String> {
    match text {
        "True" | "true" | "1" => Ok(true),
        "False" | "false" | "0" => Ok(false),
        _ => Err("expected True or False".into()),
    }
}

/// The heading of the flags that train to retrieve.
pub const RETRIEVAL: &str = "Training to retrieve (the paper's own training has none of it)";

/// The flags of retrieval exercises.
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct ExerciseFlags {
    /// The share of a batch's rows into which a retrieval exercise is planted: facts, and later questions about them; landmark train needs
    /// --whole_blocks for it
    #[arg(long, value_name = "SHARE", default_value_t = 0., help_heading = RETRIEVAL)]
    pub exercise_rows: f64,
    /// What the tokens of an answer weigh in the loss; others weigh 1
    #[arg(long, value_name = "N", default_value_t = ExerciseOptions::default().answer_weight, help_heading = RETRIEVAL)]
    pub answer_weight: f64,
    /// The share of exercises with two to five facts
    #[arg(long, value_name = "SHARE", default_value_t = ExerciseOptions::default().several_facts, help_heading = RETRIEVAL)]
    pub several_facts: f64,
    /// The share of exercises that ask two to five times, for each of several facts once, first near, then ever farther away
    #[arg(long, value_name = "SHARE", default_value_t = ExerciseOptions::default().asked_again, help_heading = RETRIEVAL)]
    pub asked_again: f64,
}

impl ExerciseFlags {
    /// The exercises, if there are to be some.
    pub fn options(&self) -> Option<ExerciseOptions> {
        let &Self { exercise_rows, answer_weight, several_facts, asked_again } = self;
        (exercise_rows != 0.).then_some(ExerciseOptions { exercise_rows, answer_weight, several_facts, asked_again })
    }

    /// Flags that mean nothing without exercises: the name, whether it is given in vain, why it is refused.
    pub fn refusals(&self) -> [(&'static str, bool, &'static str); 3] {
        let (none, default) = (self.exercise_rows == 0., ExerciseOptions::default());
        let refusal = |flag, given: f64, default| (flag, none && given != default, "it needs --exercise_rows SHARE");
        [
            refusal("answer_weight", self.answer_weight, default.answer_weight),
            refusal("several_facts", self.several_facts, default.several_facts),
            refusal("asked_again", self.asked_again, default.asked_again),
        ]
    }
}

/// The flags of rows that see landmarks of others.
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct NegativeFlags {
    /// Rows of plain text whose landmarks queries of other rows see as well, without values: they learn to tell thousands of blocks apart
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = RETRIEVAL)]
    pub negative_rows: usize,
    /// The share of the other rows that see them
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, help_heading = RETRIEVAL)]
    pub negative_share: f64,
    /// The blocks that a query is to retrieve in inference, which decides from how far away they are seen
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = RETRIEVAL)]
    pub negative_top_k: usize,
}

impl NegativeFlags {
    /// The rows, if there are to be some.
    pub fn options(&self) -> Option<NegativeRows> {
        let &Self { negative_rows, negative_share, negative_top_k } = self;
        (negative_rows > 0).then_some(NegativeRows { negative_rows, negative_share, negative_top_k })
    }

    /// Flags that mean nothing without such rows, as [`ExerciseFlags::refusals`].
    pub fn refusals(&self) -> [(&'static str, bool, &'static str); 2] {
        let (none, reason) = (self.negative_rows == 0, "it needs --negative_rows N");
        [
            ("negative_share", none && self.negative_share != 0.5, reason),
            ("negative_top_k", none && self.negative_top_k != 4, reason),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_their_units() {
        let read = [("4096", 4096), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5kb", 1500), ("0", 0), ("3B", 3)];
        for (text, expected) in read {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "GB", "-1", "1.2.3", "5 apples", "2G", "1e3", "99999999TB"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
