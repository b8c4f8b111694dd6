//! An answer as far as it can be read.

use super::equal::equal;
use super::token::{self, Token};
use super::value::{self, Value};
use super::{boxed, extract::Extract};

#[derive(Debug)]
pub(super) struct Reading {
    text: String,
    tokens: Option<Vec<Token>>,
    value: Option<Value>,
}

impl Reading {
    pub(super) fn of(text: &str) -> Self {
        let tokens = token::tokens(text);
        let value = tokens.as_deref().and_then(value::read);
        Self { text: text.split_whitespace().collect(), tokens, value }
    }

    /// A gold answer: the boxed part of it, or all. Where that cannot be read, it may be a sentence with the answer in
    /// it as a formula.
    pub(super) fn of_gold(gold: &str) -> Self {
        if let Some((boxed, _)) = boxed::last_together(gold) {
            return Self::of(&boxed);
        }
        let whole = Self::of(gold);
        match whole.value {
            None => Self::of_completion(Extract::Latex, gold).filter(|found| found.value.is_some()).unwrap_or(whole),
            Some(_) => whole,
        }
    }

    /// The first candidate that can be read, else the first one; `None` where there is no answer.
    pub(super) fn of_completion(extract: Extract, completion: &str) -> Option<Self> {
        let mut first = None;
        for candidate in extract.candidates(completion) {
            let reading = Self::of(&candidate);
            if reading.value.is_some() {
                return Some(reading);
            }
            first = first.or(Some(reading));
        }
        first
    }

    /// Whether `answer` is the same text, the same tokens, or says the same.
    pub(super) fn is_answered_by(&self, answer: &Self) -> bool {
        if self.text == answer.text && !self.text.is_empty() {
            return true;
        }
        let same_tokens = match (&self.tokens, &answer.tokens) {
            (Some(gold), Some(answer)) => gold == answer && !gold.is_empty(),
            _ => false,
        };
        same_tokens || matches!((&self.value, &answer.value), (Some(gold), Some(answer)) if equal(gold, answer))
    }
}
