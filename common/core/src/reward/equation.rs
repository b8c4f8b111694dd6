//! The reward `equation` of the mini-R1 recipe.
//!
//! Its Python takes the first `re.search(r"<answer>(.*?)<\/answer>", c)`, strips it, wants the sorted integers of
//! `re.findall(r"\d+", ...)` to be the sorted `nums` (so that `1.5` uses a 1 and a 5), refuses all but
//! `^[\d+\-*/().\s]+$`, and wants `abs(float(eval(...)) - float(target)) < 1e-5`; every exception scores 0.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::expression::{self, EvalError};
use super::{Answer, ColumnError, Judge, Outcome};
use crate::dataset::Row;
use crate::text::{is_python_space, python_strip};

/// Longest equation that is looked at; nothing that solves a puzzle comes near.
const MAX_EQUATION_BYTES: usize = 1 << 14;

const TOLERANCE: f64 = 1e-5;

const OPEN: &[u8] = b"<answer>";
const CLOSE: &[u8] = b"</answer>";

/// 1 where an `<answer>` is an equation that uses each of the column `nums` once and equals `target`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Equation {
    which: Which,
    /// What any other answer is worth.
    wrong_score: f32,
}

/// The answer that counts, of several.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Which {
    /// The first, as in the mini-R1 recipe.
    #[default]
    First,
    /// The last of the last line, as in TinyZero (`verl/utils/reward_score/countdown.py`), where other answers are worth 0.1.
    LastOfLastLine,
}

impl Judge for Equation {
    fn check_columns(&self, columns: &Row) -> Result<(), ColumnError> {
        Puzzle::from_columns(columns).map(drop)
    }

    fn judge(&self, answer: &Answer<'_>, columns: &Row) -> Outcome {
        let Ok(puzzle) = Puzzle::from_columns(columns) else { return Outcome::Crash };
        let found = match self.which {
            Which::First => first_answer(answer.text),
            Which::LastOfLastLine => last_answer(answer.text),
        };
        match found.map_or(Outcome::Unparsable, |equation| puzzle.score(equation)) {
            Outcome::Wrong | Outcome::Unparsable if found.is_some() && self.wrong_score != 0.0 => {
                Outcome::Score(self.wrong_score)
            }
            outcome => outcome,
        }
    }
}

/// What an equation must use and reach.
#[derive(Debug, Clone, PartialEq)]
struct Puzzle {
    target: f64,
    /// Sorted.
    numbers: Vec<i64>,
}

impl Puzzle {
    /// Reads `target`, a number or its text, and `nums`, a list of integers.
    fn from_columns(columns: &Row) -> Result<Self, ColumnError> {
        let bad = |column, expected| ColumnError::of(columns, column, expected);
        let target = columns.get("target").and_then(number).ok_or_else(|| bad("target", "a number or its text"))?;
        let numbers = columns.get("nums").and_then(integers).ok_or_else(|| bad("nums", "a list of integers"))?;
        Ok(Self { target, numbers })
    }

    fn score(&self, answer: &str) -> Outcome {
        let equation = python_strip(answer);
        if answer.len() > MAX_EQUATION_BYTES || !equation.chars().all(is_allowed) {
            return Outcome::Unparsable;
        }
        match expression::evaluate(equation, self.numbers.len()) {
            Err(EvalError::Syntax) => Outcome::Unparsable,
            _ if !self.is_made_of_the_numbers(equation) => Outcome::Wrong,
            Err(EvalError::Arithmetic) => Outcome::Wrong,
            // The comparison is the reference's, on doubles.
            Ok(value) if (value.to_f64() - self.target).abs() < TOLERANCE => Outcome::Score(1.0),
            Ok(_) => Outcome::Wrong,
        }
    }

    fn is_made_of_the_numbers(&self, equation: &str) -> bool {
        let digit_runs = equation.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty());
        // A run too long for an i64 is none of the numbers.
        let Ok(mut used) = digit_runs.map(str::parse).collect::<Result<Vec<i64>, _>>() else { return false };
        used.sort_unstable();
        used == self.numbers
    }
}

/// The inside of the first `<answer>...</answer>` that lies within one line, in one pass.
fn first_answer(completion: &str) -> Option<&str> {
    completion.get(answer_range(completion)?)
}

fn answer_range(completion: &str) -> Option<Range<usize>> {
    let bytes = completion.as_bytes();
    let mut opened = None;
    for (at, &byte) in bytes.iter().enumerate() {
        match (byte, opened) {
            (b'\n', _) => opened = None,
            (b'<', None) if bytes[at..].starts_with(OPEN) => opened = Some(at + OPEN.len()),
            (b'<', Some(start)) if bytes[at..].starts_with(CLOSE) => return Some(start..at),
            _ => {}
        }
    }
    None
}

/// The inside of the last `<answer>...</answer>` of the last line.
fn last_answer(completion: &str) -> Option<&str> {
    let mut line = completion.rsplit('\n').next()?;
    let mut last = None;
    while let Some(range) = answer_range(line) {
        last = line.get(range.clone());
        line = &line[range.end + CLOSE.len()..];
    }
    last
}

/// Other scripts' digits pass the reference's pattern too, but not its `eval`.
fn is_allowed(c: char) -> bool {
    c.is_ascii_digit() || "+-*/().".contains(c) || is_python_space(c)
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => python_strip(text).parse().ok(),
        _ => None,
    }
}

fn integers(value: &Value) -> Option<Vec<i64>> {
    let mut integers = value.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<_>>>()?;
    integers.sort_unstable();
    Some(integers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(completion: &str, expect: Option<&str>) {
        assert_eq!(first_answer(completion), expect, "{completion:?}");
    }

    #[test]
    fn the_last_answer_of_the_last_line_counts() {
        let check =
            |completion: &str, expect: Option<&str>| assert_eq!(last_answer(completion), expect, "{completion:?}");
        check("<answer>1</answer> <answer>2</answer> x", Some("2"));
        check("<answer>1</answer><answer>2", Some("1"));
        check("<answer>1</answer>\n", None);
        check("<answer>1\n</answer>", None);
        check("x\n<answer></answer>", Some(""));
    }

    #[test]
    fn another_answer_may_be_worth_something() {
        let equation = Equation { which: Which::LastOfLastLine, wrong_score: 0.1 };
        let columns = serde_json::json!({"target": 3, "nums": [1, 2]});
        let score = |text: &str| equation.judge(&Answer::of(text), columns.as_object().unwrap());
        assert_eq!(score("<answer>1-2</answer>\n<answer>2+1</answer>"), Outcome::Score(1.0));
        assert_eq!(score("<answer>2-1</answer>"), Outcome::Score(0.1));
        assert_eq!(score("<answer>two</answer>"), Outcome::Score(0.1));
        assert_eq!(score("1+2"), Outcome::Unparsable);
    }

    #[test]
    fn the_first_answer_within_a_line_counts() {
        check("x <answer>1</answer> <answer>2</answer>", Some("1"));
        check("<answer>1\n</answer><answer>2</answer>", Some("2"));
        check("<answer>1<answer>2</answer>", Some("1<answer>2"));
        check("</answer><answer>1", None);
        check("<answer>1\r</answer>", Some("1\r"));
        check("<answer></answer>", Some(""));
        check("", None);
    }
}
