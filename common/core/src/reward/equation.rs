//! The reward `equation` of the mini-R1 recipe.
//!
//! Its Python takes the first `re.search(r"<answer>(.*?)<\/answer>", c)`, strips it, wants the sorted integers of
//! `re.findall(r"\d+", ...)` to be the sorted `nums` (so that `1.5` uses a 1 and a 5), refuses all but
//! `^[\d+\-*/().\s]+$`, and wants `abs(float(eval(...)) - float(target)) < 1e-5`; every exception scores 0.

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

/// 1 where the first `<answer>` is an equation that uses each of the column `nums` once and equals `target`.
#[derive(Debug, Default)]
pub(super) struct Equation;

impl Judge for Equation {
    fn check_columns(&self, columns: &Row) -> Result<(), ColumnError> {
        Puzzle::from_columns(columns).map(drop)
    }

    fn judge(&self, answer: &Answer<'_>, columns: &Row) -> Outcome {
        Puzzle::from_columns(columns).map_or(Outcome::Crash, |puzzle| puzzle.score(answer.text))
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

    fn score(&self, completion: &str) -> Outcome {
        let short = first_answer(completion).filter(|answer| answer.len() <= MAX_EQUATION_BYTES);
        let Some(equation) = short.map(python_strip).filter(|equation| equation.chars().all(is_allowed)) else {
            return Outcome::Unparsable;
        };
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
    let bytes = completion.as_bytes();
    let mut opened = None;
    for (at, &byte) in bytes.iter().enumerate() {
        match (byte, opened) {
            (b'\n', _) => opened = None,
            (b'<', None) if bytes[at..].starts_with(OPEN) => opened = Some(at + OPEN.len()),
            (b'<', Some(start)) if bytes[at..].starts_with(CLOSE) => return Some(&completion[start..at]),
            _ => {}
        }
    }
    None
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
