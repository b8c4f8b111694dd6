//! Signs of reflection in a completion: the "aha moment" of DeepSeek-R1-Zero (arXiv 2501.12948), counted.
//!
//! What counts says how a text reads, not how it was thought: base models write such words before any training, and reflection
//! need not lead to a right answer ("There May Not be Aha Moment in R1-Zero-like Training", which counts words as well).

use std::iter::Sum;

/// What one completion, or the sum of several, shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reflection {
    /// Markers, none within another.
    pub num_reflections: usize,
    /// Markers, or runs of them, between two results that differ: the last before and the first after. A result is the number
    /// after `=`, or the beginning of an `<answer>` or a `\boxed{}`, compared as text. A marker between two steps of one
    /// calculation is taken for a correction too, and a correction in words is missed.
    pub num_self_corrections: usize,
}

/// Words and phrases in lower case; a space stands for one character that is neither letter nor digit. They are
/// - the keywords of oat-zero (`analysis/eval_self_reflect.py`) and understand-r1-zero (`analysis/keyword_count.py`), with the
///   forms that those find as parts of words,
/// - of the words that DeepSeek-R1's authors count, those that seldom mean anything else: `wait`, `retry`, `verify` and
///   `however`, which Open-Reasoner-Zero counts too, with `alternatively`; not `but`, `error`, `wrong`, `check`,
/// - `aha`, `hmm`, `let me check`.
const MARKERS: &[&str] = &[
    "aha",
    "alternatively",
    "check again",
    "checking again",
    "double check",
    "double checking",
    "go over the steps",
    "hmm",
    "hmmm",
    "however",
    "let me check",
    "let s check",
    "re check",
    "re checking",
    "re evaluate",
    "re evaluating",
    "re evaluation",
    "re examine",
    "re examining",
    "re think",
    "re thinking",
    "reanalyze",
    "reanalyzing",
    "reassess",
    "reassessing",
    "recheck",
    "rechecking",
    "reconsider",
    "reconsidering",
    "reevaluate",
    "reevaluating",
    "reevaluation",
    "reexamine",
    "reexamining",
    "rethink",
    "rethinking",
    "retry",
    "retrying",
    "think again",
    "try again",
    "trying again",
    "verify",
    "verifying",
    "wait",
];

/// Longest result that is compared, in characters.
const MAX_RESULT: usize = 64;

impl Reflection {
    /// Counts in time linear in `text`.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let mut found = Self::default();
        let (mut last, mut doubted) = (None, None);
        let (mut was_in_word, mut skip_to) = (false, 0);
        for (at, c) in text.char_indices() {
            let starts_word = c.is_alphanumeric() && !was_in_word;
            was_in_word = c.is_alphanumeric();
            if at < skip_to {
                continue;
            }
            let rest = &text[at..];
            if starts_word && let Some(length) = marker(rest) {
                found.num_reflections += 1;
                doubted = last;
                skip_to = at + length;
            } else if let Some((result, length)) = result(rest) {
                found.num_self_corrections += usize::from(doubted.take().is_some_and(|doubted| doubted != result));
                last = Some(result);
                skip_to = at + length;
            }
        }
        found
    }
}

impl Sum for Reflection {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), |sum, one| Self {
            num_reflections: sum.num_reflections + one.num_reflections,
            num_self_corrections: sum.num_self_corrections + one.num_self_corrections,
        })
    }
}

/// The length of the marker at the start of `text`, which is the start of a word: there is one at most.
fn marker(text: &str) -> Option<usize> {
    MARKERS.iter().find_map(|marker| starts_with(text, marker))
}

/// The length of `marker` at the start of `text`, where a word ends with it.
fn starts_with(text: &str, marker: &str) -> Option<usize> {
    let mut rest = text.chars();
    for expected in marker.chars() {
        let c = rest.next()?;
        let is_expected = if expected == ' ' { !c.is_alphanumeric() } else { c.eq_ignore_ascii_case(&expected) };
        if !is_expected {
            return None;
        }
    }
    let length = text.len() - rest.as_str().len();
    (!rest.next().is_some_and(char::is_alphanumeric)).then_some(length)
}

/// The result that begins with `text`, and how much of the text it is.
fn result(text: &str) -> Option<(&str, usize)> {
    if let Some(right) = text.strip_prefix('=') {
        let number = right.trim_start_matches(' ');
        let end = number.find(|c: char| !c.is_ascii_digit() && !"-.,".contains(c)).unwrap_or(number.len());
        let (number, rest) = number.split_at(end);
        let goes_on = rest.trim_start_matches(' ').starts_with(['+', '-', '*', '/', '^', '(']);
        let number = number.trim_end_matches(['.', ',']);
        let is_number = !goes_on && number.contains(|c: char| c.is_ascii_digit());
        return is_number.then(|| (number, text.len() - rest.len()));
    }
    let inside = text.strip_prefix("<answer>").or_else(|| text.strip_prefix("\\boxed{"))?;
    let end = inside.char_indices().take(MAX_RESULT).find(|(_, c)| "<}\n".contains(*c)).map(|(at, _)| at);
    let end = end.or_else(|| inside.char_indices().nth(MAX_RESULT).map(|(at, _)| at)).unwrap_or(inside.len());
    Some((inside[..end].trim(), text.len() - inside.len() + end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, num_reflections: usize, num_self_corrections: usize) {
        assert_eq!(Reflection::of(text), Reflection { num_reflections, num_self_corrections }, "{text:?}");
    }

    #[test]
    fn markers_are_whole_words_in_any_case() {
        check("Wait, wait. Wait. That's an aha moment I can flag here. Let's reevaluate this.", 5, 0);
        check("await, waiting, waiter, ahas, aWait, wait2, 3wait, Überwait", 0, 0);
        check("HMM... Re-evaluate; double-check and double check", 4, 0);
        check("let me check again, let's check, let\u{2019}s check", 3, 0);
        check("the wait", 1, 0);
        check("", 0, 0);
    }

    #[test]
    fn a_marker_counts_once_and_none_within_it() {
        check("verify again", 1, 0);
        check("re-check again", 1, 0);
        check("go over the steps", 1, 0);
        check("try again try", 1, 0);
        check("let me try again", 1, 0);
        for marker in MARKERS {
            check(&marker.to_uppercase(), 1, 0);
        }
    }

    #[test]
    fn another_result_after_a_marker_is_a_correction() {
        check("3 * 4 = 12. Wait, 3 + 4 = 7.", 1, 1);
        check("3 * 4 = 12. Let me check: 3 * 4 = 12.", 1, 0);
        check("f(7) = 3(7) - 2 = 21 - 2 = 19$, but wait! This is incorrect. f(n) = n^2 - 1, f(7) = 48", 1, 1);
        check("<answer>1 + 2 = 3</answer> Wait, <answer>1 + 2 = 3</answer>", 1, 0);
        check("<answer>1 + 2</answer> Hmm, wait. <answer>2 + 2</answer>", 2, 1);
        check("\\boxed{12}. However, \\boxed{ 13 }. Aha, \\boxed{13}.", 2, 1);
        check("= 1, = 2, = 3", 0, 0);
        check("wait, = 1, = 2", 1, 0);
        check("= 1 wait = 2 = 3 wait = 2", 2, 2);
        check("= -1 wait = - wait = x wait = 1", 3, 1);
        check("= 1,000. wait = 1,000", 1, 0);
    }

    #[test]
    fn hostile_texts_take_linear_time() {
        let megabyte = 1_000_000;
        let hostile = [
            "<answer>".repeat(megabyte / 8),
            "\\boxed{".repeat(megabyte / 7),
            "= ".repeat(megabyte / 2),
            "=".to_owned() + &" ".repeat(megabyte),
            "=1".to_owned() + &"1".repeat(megabyte),
            "wait ".repeat(megabyte / 5),
            "let me try ".repeat(megabyte / 11),
            "\u{4e00}".repeat(megabyte / 3),
        ];
        for text in &hostile {
            let start = std::time::Instant::now();
            let found = Reflection::of(text);
            assert!(start.elapsed().as_secs() < 5, "{:?}... took {:?}: {found:?}", &text[..6], start.elapsed());
        }
    }
}
