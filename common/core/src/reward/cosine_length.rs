//! The reward `cosine_length`: open-r1's `get_cosine_scaled_reward`, from "Demystifying Long Chain-of-Thought Reasoning"
//! (arXiv 2502.03373). It differs from that Python where
//! - length is in tokens, as in the paper, and not in characters,
//! - beyond `max_length` the reward stays where it was there, and does not swing back with the cosine.

use std::f64::consts::PI;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Answer, ColumnError, Judge, Outcome, RewardError, RewardFunction, RewardSpec, options};
use crate::dataset::Row;

/// Right answers are worth the more the shorter they are, and wrong ones the less the shorter they are.
#[derive(Debug)]
struct CosineLength {
    options: Options,
    correct: RewardFunction,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Options {
    /// Of a wrong answer without tokens.
    min_value_wrong: f64,
    /// Of a wrong answer of `max_length`.
    max_value_wrong: f64,
    /// Of a right answer of `max_length`.
    min_value_correct: f64,
    /// Of a right answer without tokens.
    max_value_correct: f64,
    /// Tokens from which on length makes no difference.
    max_length: u32,
    /// The reward function that says what is right: all that it scores above 0. Its weight has no meaning.
    correct: RewardSpec,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            min_value_wrong: -1.0,
            max_value_wrong: -0.5,
            min_value_correct: 0.5,
            max_value_correct: 1.0,
            max_length: 1000,
            correct: RewardSpec::default(),
        }
    }
}

pub(super) fn make(options: Map<String, Value>) -> Result<Arc<dyn Judge>, String> {
    let options: Options = options::parse(options)?;
    if options.correct.function.is_empty() {
        return Err("`correct` must say what is right, as {\"function\": \"equation\"}".to_owned());
    }
    if options.max_length == 0 {
        return Err("`max_length` must be at least 1".to_owned());
    }
    let correct = RewardFunction::new(&options.correct).map_err(|error| format!("`correct`: {error}"))?;
    Ok(Arc::new(CosineLength { options, correct }))
}

impl Judge for CosineLength {
    fn check_columns(&self, columns: &Row) -> Result<(), ColumnError> {
        self.correct.check_columns(columns).map_err(|error| match error {
            RewardError::Columns { error, .. } => error,
            other => unreachable!("only columns are checked, not {other}"),
        })
    }

    fn judge(&self, answer: &Answer<'_>, columns: &Row) -> Outcome {
        let verdict = self.correct.score(answer, columns);
        if let Outcome::Timeout | Outcome::Crash = verdict {
            return verdict;
        }
        let Options { min_value_wrong, max_value_wrong, min_value_correct, max_value_correct, .. } = self.options;
        let (at_zero, at_max) = if verdict.score() > 0.0 {
            (max_value_correct, min_value_correct)
        } else {
            (min_value_wrong, max_value_wrong)
        };
        let progress = (answer.num_tokens as f64 / f64::from(self.options.max_length)).min(1.0);
        let cosine = (progress * PI).cos();
        Outcome::Score((at_max + 0.5 * (at_zero - at_max) * (1.0 + cosine)) as f32)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judge(spec: Value) -> Result<RewardFunction, String> {
        RewardFunction::new(&serde_json::from_value(spec).unwrap()).map_err(|error| error.to_string())
    }

    // Expected values: open-r1's cosine_scaled_reward, of as many characters.
    #[test]
    fn length_counts_against_right_answers_and_for_wrong_ones() {
        let function = judge(json!({"function": "cosine_length", "correct": {"function": "format"}})).unwrap();
        let score = |text, num_tokens| function.score(&Answer { num_tokens, ..Answer::of(text) }, &Row::new()).score();
        let right = "</think>\n<answer></answer>";
        for (num_tokens, of_right, of_wrong) in [
            (0, 1.0, -1.0),
            (100, 0.987_764_1, -0.987_764_1),
            (250, 0.926_776_7, -0.926_776_7),
            (500, 0.75, -0.75),
            (1000, 0.5, -0.5),
            // The cosine itself would be back at 1 and -1.
            (2000, 0.5, -0.5),
        ] {
            assert_eq!((score(right, num_tokens), score("", num_tokens)), (of_right, of_wrong), "{num_tokens} tokens");
        }
    }

    #[test]
    fn what_is_right_is_another_function_s_matter() {
        let function = judge(json!({
            "function": "cosine_length", "max_length": 10, "max_value_correct": 2,
            "correct": {"function": "equation"},
        }));
        let function = function.unwrap();
        let columns = json!({"target": 3, "nums": [1, 2]}).as_object().unwrap().clone();
        assert_eq!(function.score(&Answer::of("<answer>1+2</answer>"), &columns), Outcome::Score(2.0));
        assert_eq!(function.score(&Answer::of("<answer>2-1</answer>"), &columns), Outcome::Score(-1.0));
        assert_eq!(function.score(&Answer::of("<answer>1+2</answer>"), &Row::new()), Outcome::Crash);
        let error = function.check_columns(&Row::new()).unwrap_err().to_string();
        assert!(error.starts_with("reward cosine_length: needs the column \"target\""), "{error}");
    }

    #[test]
    fn a_spec_must_say_what_is_right() {
        let error = |spec| judge(spec).unwrap_err();
        assert!(error(json!({"function": "cosine_length"})).contains("`correct` must say what is right"));
        let unknown = error(json!({"function": "cosine_length", "correct": {"function": "equations"}}));
        assert!(
            unknown.contains("`correct`: \"equations\" is no reward function; did you mean \"equation\"?"),
            "{unknown}"
        );
        let zero = json!({"function": "cosine_length", "max_length": 0, "correct": {"function": "format"}});
        assert!(error(zero).contains("`max_length` must be at least 1"));
    }
}
