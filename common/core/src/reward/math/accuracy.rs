//! The reward `math_accuracy`.

use serde::{Deserialize, Serialize};

use super::extract::Extract;
use super::gold;
use super::reading::Reading;
use crate::dataset::Row;
use crate::reward::{Answer, ColumnError, Judge, Outcome};

/// 1 where the answer in the completion is mathematically the one in a column.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::reward) struct MathAccuracy {
    /// The gold answer, or a list of which any is right.
    column: String,
    extract: Extract,
    /// A completion that did not end by itself is unparsable, whatever it says.
    truncated_scores_zero: bool,
}

impl Default for MathAccuracy {
    fn default() -> Self {
        Self { column: "answer".to_owned(), extract: Extract::default(), truncated_scores_zero: false }
    }
}

impl Judge for MathAccuracy {
    fn check_columns(&self, columns: &Row) -> Result<(), ColumnError> {
        gold::texts(columns, &self.column).map(drop)
    }

    fn judge(&self, answer: &Answer<'_>, columns: &Row) -> Outcome {
        let Ok(golds) = gold::texts(columns, &self.column) else { return Outcome::Crash };
        if self.truncated_scores_zero && answer.is_truncated {
            return Outcome::Unparsable;
        }
        let Some(found) = Reading::of_completion(self.extract, answer.text) else { return Outcome::Unparsable };
        let is_right = golds.iter().any(|gold| Reading::of_gold(gold).is_answered_by(&found));
        if is_right { Outcome::Score(1.0) } else { Outcome::Wrong }
    }
}
