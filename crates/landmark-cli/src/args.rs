//! Types of flags that several commands share.

use clap::Args;
use landmark_data::ExerciseOptions;
use landmark_models::gpt::NegativeRows;

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
