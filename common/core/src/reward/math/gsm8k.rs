//! The reward `gsm8k_answer`.
//!
//! Its rules are those that GSM8K's graders share: the gold answer of a row is the number behind `####`, an answer is
//! the number behind `####` (strict) or the last number (flexible), and numbers are compared without `,` and `$`.

use serde::{Deserialize, Serialize};

use super::gold;
use super::plain;
use super::quantity::Quantity;
use super::token::{self, Token};
use crate::dataset::Row;
use crate::reward::{Answer, ColumnError, Judge, Outcome};

const MARK: &str = "####";

/// 1 where the number that the completion ends with is the one that the column ends with.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::reward) struct Gsm8kAnswer {
    /// A solution that ends with `#### 1,234`, or the number alone.
    column: String,
    extract: Extract,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Extract {
    /// The number behind the last `####`.
    Strict,
    /// The last number.
    #[default]
    Flexible,
}

impl Default for Gsm8kAnswer {
    fn default() -> Self {
        Self { column: "answer".to_owned(), extract: Extract::default() }
    }
}

impl Judge for Gsm8kAnswer {
    fn check_columns(&self, columns: &Row) -> Result<(), ColumnError> {
        self.gold(columns).map(drop)
    }

    fn judge(&self, answer: &Answer<'_>, columns: &Row) -> Outcome {
        let Ok(gold) = self.gold(columns) else { return Outcome::Crash };
        let tail = super::extract::tail(answer.text);
        let found = match self.extract {
            Extract::Strict => tail.rsplit_once(MARK).and_then(|(_, after)| first_number(after)),
            Extract::Flexible => plain::numbers(tail).last().map(|number| number.read(tail)),
        };
        match found.as_deref().and_then(value) {
            Some(found) if gold.equals(&found) => Outcome::Score(1.0),
            Some(_) => Outcome::Wrong,
            None => Outcome::Unparsable,
        }
    }
}

impl Gsm8kAnswer {
    fn gold(&self, columns: &Row) -> Result<Quantity, ColumnError> {
        let texts = gold::texts(columns, &self.column)?;
        let number = texts.first().and_then(|text| {
            let (_, after) = text.rsplit_once(MARK).unwrap_or(("", text));
            value(&first_number(after)?)
        });
        number.ok_or_else(|| ColumnError::of(columns, &self.column, "a number, or a text that ends with `#### number`"))
    }
}

/// The number that `text` begins with, but for spaces and a currency sign.
fn first_number(text: &str) -> Option<String> {
    let line = text.trim_start().lines().next()?;
    let line = line.trim_start_matches(['$', '€', '£', ' ']);
    plain::numbers(line).next().filter(|number| number.start == 0).map(|number| number.read(line))
}

/// Of a plain number; a sign before it is part of it, and nothing else is.
fn value(text: &str) -> Option<Quantity> {
    let tokens = token::tokens(text.trim_end_matches('%'))?;
    match tokens.as_slice() {
        [Token::Number { digits, exponent, .. }] => Some(Quantity::decimal(digits, *exponent)),
        [Token::Sign('-'), Token::Number { digits, exponent, .. }] => {
            Some(Quantity::decimal(digits, *exponent).negated())
        }
        _ => None,
    }
}
