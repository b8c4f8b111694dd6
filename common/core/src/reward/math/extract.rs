//! Where the answer is in a completion.

use serde::{Deserialize, Serialize};

use super::token::MAX_BYTES;
use super::{boxed, clip, environment, plain};
use crate::text::python_strip;

/// An answer stands at the end: as much of a completion is looked at.
const MAX_TAIL: usize = 1 << 18;
/// What may stand between `answer is` and the answer.
const MAX_DISTANCE: usize = 50;
/// Occurrences of an anchor that are looked at, from the last one backwards.
const MAX_ANCHORS: usize = 64;
const ANCHORS: &[&str] = &["answer is", "answer:"];

/// How the answer is found in a completion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Extract {
    /// The last `\boxed{..}` with those that answer together with it, unless a `final answer is` follows; else in
    /// `<answer>..</answer>`; else behind the last `answer is` or `answer:`; else the last formula or number.
    #[default]
    Auto,
    /// The last `\boxed{..}`, else the last `\fbox{..}`.
    Boxed,
    /// What follows the last `<answer>`, where `</think> <answer>` and `</answer>` are there to the letter; of it the
    /// last `\boxed{..}`, if there is one.
    AnswerTag,
    /// As `auto`, but a number outside formulas is no answer.
    Latex,
}

impl Extract {
    /// What may be the answer, the likeliest first; of several, the first that can be read is.
    pub(super) fn candidates(self, completion: &str) -> Vec<String> {
        match self {
            Self::Auto => anywhere(completion, true),
            Self::Latex => anywhere(completion, false),
            Self::Boxed => boxed::last(tail(completion)).map(str::to_owned).into_iter().collect(),
            Self::AnswerTag => answer_tag(tail(completion)).into_iter().collect(),
        }
    }
}

pub(super) fn tail(text: &str) -> &str {
    clip::tail(text, MAX_TAIL)
}

fn answer_tag(text: &str) -> Option<String> {
    if !(text.contains("</think> <answer>") && text.contains("</answer>")) {
        return None;
    }
    let (_, answer) = text.rsplit_once("<answer>")?;
    match answer.contains("\\boxed") {
        true => boxed::last(answer).map(str::to_owned),
        false => Some(python_strip(&answer.replace("</answer>", "")).to_owned()),
    }
}

fn anywhere(completion: &str, with_numbers: bool) -> Vec<String> {
    let text = tail(completion);
    if let Some((content, end)) = boxed::last_together(text) {
        // A final answer that is said behind the box replaces it.
        let said = text[end..].rsplit_once("inal answer is").map(|(_, after)| anchored(after, with_numbers));
        let boxed = content + plain::percent_after(&text[end..]);
        return said.into_iter().flatten().chain([boxed]).collect();
    }
    if let Some(tagged) = text.rfind("</answer>").and_then(|end| text[..end].rsplit_once("<answer>")) {
        // Behind the tag, the whole is the answer, unless it is said in words.
        let (_, answer) = tagged;
        let answer = clip::head(answer, MAX_BYTES);
        return [vec![answer.to_owned()], near(answer, with_numbers)].concat();
    }
    let anchored = last_anchor(text).map(|after| anchored(after, with_numbers)).unwrap_or_default();
    [anchored, near(text, with_numbers)].concat()
}

/// What follows the last `answer is`.
fn last_anchor(text: &str) -> Option<&str> {
    let ends = |anchor: &&str| {
        let mut end = text.len();
        // The letters before it may be of either case.
        std::iter::from_fn(|| {
            end = text[..end].rfind(&anchor[1..])?;
            Some(end)
        })
        .take(MAX_ANCHORS)
        .find(|at| text[..*at].ends_with(['a', 'A']))
        .map(|at| at + anchor.len() - 1)
    };
    ANCHORS.iter().filter_map(ends).max().map(|end| &text[end..])
}

/// The first number or, if that is in a formula or there is none, the first formula soon after an anchor.
fn anchored(after: &str, with_numbers: bool) -> Vec<String> {
    let near = clip::head(after, MAX_BYTES);
    let environments = environment::all(near);
    let soon = clip::head(near, MAX_DISTANCE);
    let formula = environments.first().filter(|formula| formula.start <= MAX_DISTANCE);
    match (formula, plain::numbers(soon).next().filter(|_| with_numbers)) {
        (Some(formula), Some(number)) if (formula.start..formula.end).contains(&number.start) => {
            vec![environment::joined_from(near, &environments)]
        }
        (_, Some(number)) => {
            // Of `2 + 3 = 5`, the answer is 5.
            let line = near[number.start..].lines().next().unwrap_or_default();
            let line = clip::head(line, MAX_DISTANCE);
            let value = line.rsplit_once('=').map_or(line, |(_, value)| value);
            plain::numbers(value).next().map(|number| number.read(value)).into_iter().collect()
        }
        (Some(_), None) => vec![environment::joined_from(near, &environments)],
        (None, None) => Vec::new(),
    }
}

/// The last formula and the last number, whichever ends last first.
fn near(text: &str, with_numbers: bool) -> Vec<String> {
    let environments = environment::all(text);
    let last_end = environments.last().map_or(0, |found| found.end);
    let formula = environment::joined_to(text, &environments);
    let after = &text[last_end..];
    let is_answer = |number: &plain::Number| with_numbers && !number.is_cut_off(after);
    let number = plain::numbers(after).filter(is_answer).last();
    // A fraction may stand outside a formula, too; its denominator is no answer.
    let fraction = after.rfind("\\frac{").and_then(|at| plain::fraction(after, at));
    match (number, fraction.filter(|_| with_numbers)) {
        (Some(number), Some((fraction, end))) if number.start < end => vec![fraction],
        (number, _) => number.map(|number| number.read(after)).into_iter().chain(formula).collect(),
    }
}
