//! The reward `exact_match`: whether the answer is the text of a column.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Answer, ColumnError, Judge, Outcome};
use crate::dataset::Row;
use crate::text::{is_python_space, python_strip};

/// 1 where what is extracted from the completion equals the column `column`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ExactMatch {
    /// Holds a text, a number, or true or false.
    column: String,
    ignore_case: bool,
    /// White space around either makes no difference.
    strip: bool,
    extract: Extract,
}

/// What part of a completion is its answer.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Extract {
    #[default]
    None,
    /// The inside of the last `<answer>...</answer>`, over line breaks too.
    AnswerTag,
    /// The last line that is not blank.
    LastLine,
}

impl Default for ExactMatch {
    fn default() -> Self {
        Self { column: "answer".to_owned(), ignore_case: false, strip: true, extract: Extract::None }
    }
}

impl Judge for ExactMatch {
    fn check_columns(&self, columns: &Row) -> Result<(), ColumnError> {
        self.expected(columns).map(drop)
    }

    fn judge(&self, answer: &Answer<'_>, columns: &Row) -> Outcome {
        let Ok(expected) = self.expected(columns) else { return Outcome::Crash };
        let Some(found) = self.extract.from(answer.text) else { return Outcome::Unparsable };
        Outcome::verdict(self.normal(found) == self.normal(&expected))
    }
}

impl ExactMatch {
    fn expected(&self, columns: &Row) -> Result<String, ColumnError> {
        match columns.get(&self.column) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
            _ => Err(ColumnError::of(columns, &self.column, "a text, a number, or true or false")),
        }
    }

    fn normal(&self, text: &str) -> String {
        let text = if self.strip { python_strip(text) } else { text };
        if self.ignore_case { text.to_lowercase() } else { text.to_owned() }
    }
}

impl Extract {
    fn from(self, completion: &str) -> Option<&str> {
        match self {
            Self::None => Some(completion),
            Self::AnswerTag => completion.rsplit_once("<answer>")?.1.split_once("</answer>").map(|(inside, _)| inside),
            Self::LastLine => completion.rsplit('\n').find(|line| !line.chars().all(is_python_space)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::reward::{RewardFunction, RewardSpec};

    #[track_caller]
    fn check(completion: &str, answer: Value, options: Value, expect: Outcome) {
        let spec = RewardSpec { options: options.as_object().unwrap().clone(), ..RewardSpec::of("exact_match") };
        let function = RewardFunction::new(&spec).unwrap();
        let columns = [("answer".to_owned(), answer)].into_iter().collect();
        assert_eq!(function.score(&Answer::of(completion), &columns), expect, "{completion:?} by {options}");
    }

    const RIGHT: Outcome = Outcome::Score(1.0);

    #[test]
    fn all_of_the_completion_by_default() {
        check(" Paris\n", json!("Paris"), json!({}), RIGHT);
        check("paris", json!("Paris"), json!({}), Outcome::Wrong);
        check("paris", json!("Paris"), json!({"ignore_case": true}), RIGHT);
        check(" Paris", json!("Paris"), json!({"strip": false}), Outcome::Wrong);
        check("42", json!(42), json!({}), RIGHT);
        check("true", json!(true), json!({}), RIGHT);
    }

    #[test]
    fn the_last_answer_tag_counts() {
        let options = json!({"extract": "answer_tag"});
        check("<answer>a</answer> no, <answer>\nb </answer> done", json!("b"), options.clone(), RIGHT);
        check("<answer>b</answer> <answer>b", json!("b"), options.clone(), Outcome::Unparsable);
        check("b", json!("b"), options, Outcome::Unparsable);
    }

    #[test]
    fn the_last_line_that_is_not_blank_counts() {
        let options = json!({"extract": "last_line"});
        check("a\n b\n \t\n", json!("b"), options.clone(), RIGHT);
        check("\n \n", json!("b"), options, Outcome::Unparsable);
    }

    #[test]
    fn another_column_may_hold_the_answer() {
        let spec = json!({"function": "exact_match", "column": "label"});
        let function = RewardFunction::new(&serde_json::from_value(spec).unwrap()).unwrap();
        let error = function.check_columns(&json!({"label": [1]}).as_object().unwrap().clone()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "reward exact_match: column \"label\" must be a text, a number, or true or false, got [1]"
        );
        let error = function.check_columns(&json!({"labels": 1}).as_object().unwrap().clone()).unwrap_err();
        assert!(error.to_string().contains("needs the column \"label\""), "{error}");
    }
}
