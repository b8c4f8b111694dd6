//! Reward functions: what a completion is worth, judged from its text and its prompt's columns.
//!
//! Model output is hostile input. Every function here runs in time linear in the completion, with bounded depth and
//! bounded numbers, and never executes anything.

mod cosine_length;
mod equation;
mod exact_match;
mod expression;
mod external;
mod format;
mod language_consistency;
mod math;
mod options;
mod overlong;
mod pattern;
mod reasoning_steps;
mod repetition_penalty;
mod spec;
mod tag_count;
mod think_answer_format;
mod think_format;

use std::fmt;
use std::sync::Arc;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

pub use external::{EXTERNAL, ExternalJudge, ExternalOptions, ExternalReward};
pub use overlong::soft_overlong_punishment;
pub use spec::RewardSpec;

use crate::dataset::Row;
use crate::nearest::hint;

/// A finished completion, as reward functions see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer<'a> {
    /// What follows the prompt.
    pub text: &'a str,
    pub num_tokens: usize,
    /// It did not end by itself.
    pub is_truncated: bool,
}

/// What makes a reward function: a pure function of a completion and its row's columns.
pub trait Judge: fmt::Debug + Send + Sync {
    /// Whether `columns` are what [`Judge::judge`] needs, by default none.
    ///
    /// # Errors
    /// The first column that is missing or of the wrong type.
    fn check_columns(&self, _columns: &Row) -> Result<(), ColumnError> {
        Ok(())
    }

    /// What `answer` is worth. Columns that [`Judge::check_columns`] refuses are a crash.
    fn judge(&self, answer: &Answer<'_>, columns: &Row) -> Outcome;
}

/// A reward function with its options and its name in metrics.
#[derive(Debug, Clone)]
pub struct RewardFunction {
    name: String,
    judge: Arc<dyn Judge>,
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
    #[error("{name:?} is no reward function{hint}; there are {}, {}", names().join(", "), EXTERNAL.join(", "))]
    UnknownFunction { name: String, hint: String },
    #[error("reward {name}: a {function} is asked by trainers alone, never by a generator")]
    External { name: String, function: String },
    #[error("reward {function}: {reason}")]
    Options { function: String, reason: String },
    #[error("reward {name}: {error}")]
    Columns { name: String, error: ColumnError },
}

/// Why a row cannot be judged.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ColumnError {
    #[error("needs the column {column:?}; the row has {columns:?}{hint}")]
    Missing { column: String, columns: Vec<String>, hint: String },
    #[error("column {column:?} must be {expected}, got {value}")]
    Bad { column: String, expected: &'static str, value: String },
}

/// Makes a judge from its options.
type Make = fn(Map<String, Value>) -> Result<Arc<dyn Judge>, String>;

/// Every function by its name in configurations.
const FUNCTIONS: &[(&str, Make)] = &[
    ("format", options::none::<format::Format>),
    ("equation", options::parsed::<equation::Equation>),
    ("math_accuracy", options::parsed::<math::MathAccuracy>),
    ("gsm8k_answer", options::parsed::<math::Gsm8kAnswer>),
    ("multiple_choice", options::parsed::<math::MultipleChoice>),
    ("think_format", options::parsed::<think_format::ThinkFormat>),
    ("think_answer_format", options::parsed::<think_answer_format::ThinkAnswerFormat>),
    ("tag_count", options::none::<tag_count::TagCount>),
    ("reasoning_steps", options::none::<reasoning_steps::ReasoningSteps>),
    ("cosine_length", cosine_length::make),
    ("soft_overlong", overlong::make),
    ("repetition_penalty", repetition_penalty::make),
    ("language_consistency", options::parsed::<language_consistency::LanguageConsistency>),
    ("regex", pattern::make),
    ("exact_match", options::parsed::<exact_match::ExactMatch>),
];

/// The names of all functions.
#[must_use]
pub fn names() -> Vec<&'static str> {
    FUNCTIONS.iter().map(|(name, _)| *name).collect()
}

impl RewardFunction {
    /// # Errors
    /// Names that are none, and options that the function does not have or cannot use.
    pub fn new(spec: &RewardSpec) -> Result<Self, RewardError> {
        let name = spec.function.as_str();
        let Some((_, make)) = FUNCTIONS.iter().find(|(known, _)| *known == name) else {
            return Err(if spec.is_external() {
                RewardError::External { name: spec.name().to_owned(), function: name.to_owned() }
            } else {
                let hint = hint(name, names().into_iter().chain(EXTERNAL));
                RewardError::UnknownFunction { name: name.to_owned(), hint }
            });
        };
        let bad = |reason| RewardError::Options { function: name.to_owned(), reason };
        Ok(Self { name: spec.name().to_owned(), judge: make(spec.options.clone()).map_err(bad)? })
    }

    /// The name in metrics.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether `columns` are what this function needs; for validation before a run.
    ///
    /// # Errors
    /// Names the first column that is missing or of the wrong type.
    pub fn check_columns(&self, columns: &Row) -> Result<(), RewardError> {
        self.judge.check_columns(columns).map_err(|error| RewardError::Columns { name: self.name.clone(), error })
    }

    /// Judges a completion. Columns that [`Self::check_columns`] refuses are a crash.
    #[must_use]
    pub fn score(&self, answer: &Answer<'_>, columns: &Row) -> Outcome {
        self.judge.judge(answer, columns)
    }
}

impl<'a> Answer<'a> {
    /// A text whose tokens nobody counted.
    #[must_use]
    pub fn of(text: &'a str) -> Self {
        Self { text, num_tokens: 0, is_truncated: false }
    }
}

impl ColumnError {
    /// What is wrong with `column`, which a function needs and cannot use.
    pub(crate) fn of(columns: &Row, column: &str, expected: &'static str) -> Self {
        match columns.get(column) {
            Some(value) => Self::Bad { column: column.to_owned(), expected, value: value.to_string() },
            None => Self::Missing {
                column: column.to_owned(),
                columns: columns.keys().cloned().collect(),
                hint: hint(column, columns.keys().map(String::as_str)),
            },
        }
    }
}

impl Outcome {
    /// 1, or wrong.
    fn verdict(is_right: bool) -> Self {
        if is_right { Self::Score(1.0) } else { Self::Wrong }
    }

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
