//! The reward `think_format`: TRL's `think_format_reward`.
//!
//! Its Python is `re.match(r"^<think>(?!.*<think>)(.*?)</think>.*$", c, re.DOTALL | re.MULTILINE)`.

use serde::{Deserialize, Serialize};

use super::{Answer, Judge, Outcome};
use crate::dataset::Row;

/// 1 where the completion is `<think>...</think>` and then anything, with no second `<think>` anywhere.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ThinkFormat {
    /// The prompt ends with the opening `<think>`, so the completion begins behind it.
    think_in_prompt: bool,
}

impl Judge for ThinkFormat {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        let thought = if self.think_in_prompt { Some(answer.text) } else { answer.text.strip_prefix("<think>") };
        Outcome::verdict(thought.is_some_and(|text| !text.contains("<think>") && text.contains("</think>")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(completion: &str, expect: bool) {
        let judge = |think_in_prompt, text| ThinkFormat { think_in_prompt }.judge(&Answer::of(text), &Row::new());
        assert_eq!(judge(false, completion), Outcome::verdict(expect), "{completion:?}");
        if let Some(rest) = completion.strip_prefix("<think>") {
            assert_eq!(judge(true, rest), Outcome::verdict(expect), "{rest:?} after <think>");
        }
    }

    #[test]
    fn one_thought_and_then_anything() {
        // TRL's own examples.
        check("<think>\nThis is my reasoning.\n</think>\nThis is my answer.", true);
        check("<think>\nThis is my reasoning.\nThis is my answer.", false);
        check("<think></think>", true);
        check("<think>a</think>b</think>", true);
        check(" <think>a</think>", false);
        check("</think>", false);
        check("", false);
    }

    #[test]
    fn a_second_thought_is_wrong_wherever_it_opens() {
        check("<think><think></think>", false);
        check("<think>a</think>\n<think>", false);
    }
}
