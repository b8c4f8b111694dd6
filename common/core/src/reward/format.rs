//! The reward `format` of the mini-R1 recipe.
//!
//! Its Python is, for the completion `c` with `<think>` put before it,
//! `re.search(r"^<think>([^<]*(?:<(?!/?think>)[^<]*)*)<\/think>\n<answer>([\s\S]*?)<\/answer>$", c, re.DOTALL)`.
//! The expression looks ahead, which linear-time engines do not, so it is matched by hand.

use super::{Answer, Judge, Outcome};
use crate::dataset::Row;

/// 1 where the completion is `...</think>\n<answer>...</answer>`, the opening `<think>` being in the prompt.
#[derive(Debug, Default)]
pub(super) struct Format;

impl Judge for Format {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        Outcome::verdict(is_well_formed(answer.text))
    }
}

fn is_well_formed(completion: &str) -> bool {
    // Python's `$` also matches before one newline at the very end.
    let completion = completion.strip_suffix('\n').unwrap_or(completion);
    let Some(completion) = completion.strip_suffix("</answer>") else { return false };
    // The thought holds neither think tag, so the first one must be its end.
    let bytes = completion.as_bytes();
    let is_think_tag = |at: usize| bytes[at..].starts_with(b"<think>") || bytes[at..].starts_with(b"</think>");
    let first_tag = (0..bytes.len()).find(|&at| bytes[at] == b'<' && is_think_tag(at));
    first_tag.is_some_and(|at| bytes[at..].starts_with(b"</think>\n<answer>"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(completion: &str, expect: bool) {
        assert_eq!(is_well_formed(completion), expect, "{completion:?}");
    }

    #[test]
    fn thought_newline_answer_is_well_formed() {
        check("a</think>\n<answer>b</answer>", true);
        check("</think>\n<answer></answer>", true);
        check("a <b> </ think> <think</think>\n<answer>b\nc</answer>", true);
    }

    #[test]
    fn one_newline_may_follow_and_nothing_else() {
        check("a</think>\n<answer>b</answer>\n", true);
        check("a</think>\n<answer>b</answer>\n\n", false);
        check("a</think>\n<answer>b</answer> ", false);
    }

    #[test]
    fn the_tags_must_follow_each_other_exactly() {
        check("a</think> <answer>b</answer>", false);
        check("a</think>\n\n<answer>b</answer>", false);
        check("a</think>\n<answer>b", false);
        check("a\n<answer>b</answer>", false);
        check("a</think>\n<answer</answer>", false);
    }

    #[test]
    fn a_thought_holds_no_think_tag_but_an_answer_may_hold_any() {
        check("a<think>b</think>\n<answer>c</answer>", false);
        check("a</think>b</think>\n<answer>c</answer>", false);
        check("a</think>\n<answer>b</answer><answer>c</answer>", true);
        check("a</think>\n<answer><think></think></answer>", true);
    }
}
