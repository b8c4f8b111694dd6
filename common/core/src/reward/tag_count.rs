//! The reward `tag_count`: open-r1's `tag_count_reward`.

use super::{Answer, Judge, Outcome};
use crate::dataset::Row;

/// 0.25 for every one of the four tags, each with its line breaks, that is there exactly once.
#[derive(Debug, Default)]
pub(super) struct TagCount;

const TAGS: [&str; 4] = ["<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"];

impl Judge for TagCount {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        let is_there_once = |tag: &&&str| answer.text.matches(**tag).take(2).count() == 1;
        Outcome::Score(TAGS.iter().filter(is_there_once).count() as f32 / 4.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values: open-r1's tag_count_reward.
    #[test]
    fn a_quarter_for_each_tag_that_is_there_once() {
        for (completion, expect) in [
            ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1.0),
            // The line break before `<answer>` belongs to `</think>` already.
            ("<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
            ("<think>a</think><answer>b</answer>", 0.0),
            ("<think>\n<think>\na\n</think>\n<answer>\nb\n</answer>", 0.75),
            ("\n</think>\n\n</answer>\n</answer>", 0.25),
            ("", 0.0),
        ] {
            assert_eq!(TagCount.judge(&Answer::of(completion), &Row::new()), Outcome::Score(expect), "{completion:?}");
        }
    }
}
