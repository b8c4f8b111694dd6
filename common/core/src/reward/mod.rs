//! Reward functions: what a completion is worth, judged from its text and its prompt's columns.
//!
//! Model output is hostile input. Every function here runs in time linear in the completion, with bounded depth and
//! bounded numbers, and never executes anything.

mod equation;
mod expression;
mod format;
mod overlong;

use std::fmt;
use std::str::FromStr;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

pub use overlong::soft_overlong_punishment;

use crate::dataset::Row;
use crate::nearest::hint;

/// The built-in reward functions, those of the mini-R1 recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RewardFunction {
    /// 1 where the completion is `...</think>\n<answer>...</answer>`, the opening `<think>` being in the prompt.
    Format,
    /// 1 where the first `<answer>` is an equation that uses each of the column `nums` once and equals `target`.
    Equation,
}

/// What became of one completion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// Judged, and worth this.
    Score(f32),
    /// Readable, and not what was asked.
    Wrong,
    /// Nothing to judge: no answer in it, or not of the form that was asked.
    Unparsable,
    /// The judge took too long. Built-in functions never do; services can.
    Timeout,
    /// The judge failed, for a built-in function because the row's columns are not what it needs.
    Crash,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RewardError {
    #[error("{name:?} is no reward function{hint}; there are {}", RewardFunction::names().join(", "))]
    UnknownFunction { name: String, hint: String },
    #[error("reward {function} needs the column {column:?}; the row has {columns:?}{hint}")]
    MissingColumn { function: RewardFunction, column: &'static str, columns: Vec<String>, hint: String },
    #[error("reward {function}: column {column:?} must be {expected}, got {value}")]
    BadColumn { function: RewardFunction, column: &'static str, expected: &'static str, value: String },
}

impl RewardFunction {
    pub const ALL: [Self; 2] = [Self::Format, Self::Equation];

    /// The name in configurations and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Equation => "equation",
        }
    }

    /// The columns that a row must have for this function.
    #[must_use]
    pub fn required_columns(self) -> &'static [&'static str] {
        match self {
            Self::Format => &[],
            Self::Equation => &["target", "nums"],
        }
    }

    /// Whether `columns` are what this function needs; for validation before a run.
    ///
    /// # Errors
    /// Names the first column that is missing or of the wrong type.
    pub fn check_columns(self, columns: &Row) -> Result<(), RewardError> {
        if let Some(column) = self.required_columns().iter().find(|column| !columns.contains_key(**column)) {
            let hint = hint(column, columns.keys().map(String::as_str));
            return Err(RewardError::MissingColumn {
                function: self,
                column,
                columns: columns.keys().cloned().collect(),
                hint,
            });
        }
        match self {
            Self::Format => Ok(()),
            Self::Equation => equation::Puzzle::from_columns(columns).map(drop),
        }
    }

    /// Judges a completion, the text after the prompt. Columns that [`Self::check_columns`] refuses are a crash.
    #[must_use]
    pub fn score(self, completion: &str, columns: &Row) -> Outcome {
        match self {
            Self::Format => format::score(completion),
            Self::Equation => match equation::Puzzle::from_columns(columns) {
                Ok(puzzle) => puzzle.score(completion),
                Err(_) => Outcome::Crash,
            },
        }
    }

    fn names() -> Vec<&'static str> {
        Self::ALL.iter().map(|function| function.name()).collect()
    }
}

impl FromStr for RewardFunction {
    type Err = RewardError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|function| function.name() == name)
            .ok_or_else(|| RewardError::UnknownFunction { name: name.to_owned(), hint: hint(name, Self::names()) })
    }
}

impl fmt::Display for RewardFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Outcome {
    /// What the completion is worth: 0 for everything but a score.
    #[must_use]
    pub fn score(self) -> f32 {
        match self {
            Self::Score(score) => score,
            Self::Wrong | Self::Unparsable | Self::Timeout | Self::Crash => 0.0,
        }
    }

    /// The name in answers and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Score(_) => "score",
            Self::Wrong => "wrong",
            Self::Unparsable => "unparsable",
            Self::Timeout => "timeout",
            Self::Crash => "crash",
        }
    }
}

/// `{"score": 1.0, "outcome": "score"}`.
impl Serialize for Outcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Outcome", 2)?;
        fields.serialize_field("score", &self.score())?;
        fields.serialize_field("outcome", self.name())?;
        fields.end()
    }
}

#[cfg(test)]
mod tests;
