//! The reward `multiple_choice`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{boxed, clip, extract};
use crate::dataset::Row;
use crate::reward::{Answer, ColumnError, Judge, Outcome};

/// How far behind `answer` a letter may stand.
const MAX_DISTANCE: usize = 20;
/// Occurrences of `answer` that are looked at, from the last one backwards.
const MAX_ANCHORS: usize = 64;

/// 1 where the completion chooses the letter in a column.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::reward) struct MultipleChoice {
    /// The gold letter, `A` to `Z`, or the text of an option.
    column: String,
    /// The list of options' texts, the first of which is `A`; needed where the gold answer is a text.
    options_column: String,
}

impl Default for MultipleChoice {
    fn default() -> Self {
        Self { column: "answer".to_owned(), options_column: "options".to_owned() }
    }
}

impl Judge for MultipleChoice {
    fn check_columns(&self, columns: &Row) -> Result<(), ColumnError> {
        self.gold(columns).map(drop)
    }

    fn judge(&self, answer: &Answer<'_>, columns: &Row) -> Outcome {
        let Ok(gold) = self.gold(columns) else { return Outcome::Crash };
        match chosen(extract::tail(answer.text)) {
            Some(letter) if letter == gold => Outcome::Score(1.0),
            Some(_) => Outcome::Wrong,
            None => Outcome::Unparsable,
        }
    }
}

impl MultipleChoice {
    fn gold(&self, columns: &Row) -> Result<char, ColumnError> {
        let bad = || ColumnError::of(columns, &self.column, "a letter from A to Z, or the text of an option");
        let gold = columns.get(&self.column).and_then(Value::as_str).ok_or_else(bad)?;
        if let Some(letter) = bare(gold) {
            return Ok(letter);
        }
        let options = columns.get(&self.options_column).and_then(Value::as_array);
        let at = options.and_then(|options| options.iter().position(|option| option.as_str() == Some(gold)));
        at.and_then(|at| u8::try_from(at).ok()).filter(|at| *at < 26).map(|at| char::from(b'A' + at)).ok_or_else(bad)
    }
}

/// The letter in the last box, else in the last `<answer>`, else behind the last `answer is` or `answer:` that has one,
/// else the last one in parentheses.
fn chosen(text: &str) -> Option<char> {
    if let Some(boxed) = boxed::last(text) {
        return leading(boxed);
    }
    if let Some((before, _)) = text.rsplit_once("</answer>") {
        return before.rsplit_once("<answer>").and_then(|(_, answer)| leading(answer));
    }
    let anchors = text.rmatch_indices("nswer").take(MAX_ANCHORS);
    let anchored = anchors.map(|(at, anchor)| &text[at + anchor.len()..]).find_map(behind_anchor);
    anchored.or_else(|| last_in_parentheses(text)).or_else(|| bare(text))
}

fn behind_anchor(after: &str) -> Option<char> {
    let after = clip::head(after, MAX_DISTANCE);
    let after = after.trim_start().strip_prefix("is").or_else(|| after.trim_start().strip_prefix(':'))?;
    leading(after.trim_start_matches(':'))
}

fn last_in_parentheses(text: &str) -> Option<char> {
    let bytes = text.as_bytes();
    bytes.windows(3).rev().find_map(|window| match window {
        [b'(', letter @ b'A'..=b'Z', b')'] => Some(char::from(*letter)),
        _ => None,
    })
}

/// The letter that `text` begins with, whatever of markup is before it; the letter of no word.
fn leading(text: &str) -> Option<char> {
    let markup = ["\\text", "\\textbf", "\\mathrm", "\\mathbf"];
    let mut text = text.trim_start();
    while let Some(rest) = markup
        .iter()
        .rev()
        .find_map(|command| text.strip_prefix(command))
        .or_else(|| text.strip_prefix(['(', '{', '*', '$', '[', ' ', '"']))
    {
        text = rest;
    }
    let mut letters = text.chars();
    let letter = letters.next().filter(char::is_ascii_uppercase)?;
    let ends = letters.next().is_none_or(|next| !next.is_alphanumeric() && next != '\'');
    // `A man ...` is no choice of A.
    let is_word = letter == 'A' && text[1..].strip_prefix(' ').is_some_and(|rest| rest.starts_with(char::is_lowercase));
    (ends && !is_word).then_some(letter)
}

/// The letter, where there is nothing else but punctuation.
fn bare(text: &str) -> Option<char> {
    let text = text.trim();
    let inner = text.trim_matches(['(', ')', '.', '*', '{', '}']);
    match inner.as_bytes() {
        [letter @ b'A'..=b'Z'] => Some(char::from(*letter)),
        _ => None,
    }
}
