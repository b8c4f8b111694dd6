//! Gold answers in a row's column.

use serde_json::Value;

use crate::dataset::Row;
use crate::reward::ColumnError;

/// The texts of which each is a right answer: a text, a number, or a list of them.
pub(super) fn texts(columns: &Row, column: &str) -> Result<Vec<String>, ColumnError> {
    let bad = || ColumnError::of(columns, column, "a text, a number, or a list of them");
    let texts = match columns.get(column) {
        Some(Value::Array(alternatives)) if !alternatives.is_empty() => alternatives.iter().map(text).collect(),
        Some(value) => text(value).map(|text| vec![text]),
        None => None,
    };
    texts.ok_or_else(bad)
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}
