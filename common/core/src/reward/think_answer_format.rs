//! The reward `think_answer_format`: a thought and an answer in tags, as DeepSeek-R1's template asks for (arXiv 2501.12948).

use serde::{Deserialize, Serialize};

use super::{Answer, Judge, Outcome};
use crate::dataset::Row;
use crate::text::is_python_space;

/// 1 where the completion is `<think>...</think>` and `<answer>...</answer>`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ThinkAnswerFormat {
    /// The prompt ends with the opening `<think>`, and the line break after it where `spacing` has one.
    think_in_prompt: bool,
    spacing: Spacing,
}

/// What stands around the tags. A thought and an answer may hold tags themselves.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Spacing {
    /// Any white space between thought and answer: `^<think>.*?</think>\s*<answer>.*?</answer>$` with `re.DOTALL`.
    #[default]
    Any,
    /// Every tag on a line of its own, and anything after the last: `format_reward` of open-r1,
    /// `^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$` with `re.DOTALL | re.MULTILINE`.
    Newlines,
    /// All on one line and nothing between thought and answer: `^<think>.*?</think><answer>.*?</answer>$` without flags,
    /// of TRL's documentation and ImproveReasoning.
    OneLine,
}

impl Judge for ThinkAnswerFormat {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        Outcome::verdict(self.is_well_formed(answer.text).unwrap_or(false))
    }
}

impl ThinkAnswerFormat {
    /// `None` where a tag is missing that has one place only.
    fn is_well_formed(&self, completion: &str) -> Option<bool> {
        let opening = match self.spacing {
            _ if self.think_in_prompt => "",
            Spacing::Newlines => "<think>\n",
            Spacing::Any | Spacing::OneLine => "<think>",
        };
        let text = completion.strip_prefix(opening)?;
        if let Spacing::Newlines = self.spacing {
            let (_, answer) = text.split_once("\n</think>\n<answer>\n")?;
            // An empty rest is the end, or the line break of another `</answer>`.
            let mut rests = answer.split("\n</answer>").skip(1);
            return Some(rests.any(|rest| rest.is_empty() || rest.starts_with('\n')));
        }
        // Python's `$` also matches before one newline at the very end.
        let inside = text.strip_suffix('\n').unwrap_or(text).strip_suffix("</answer>")?;
        let opens_answer = |rest: &str| rest.trim_start_matches(is_python_space).starts_with("<answer>");
        Some(match self.spacing {
            Spacing::OneLine => !inside.contains('\n') && inside.contains("</think><answer>"),
            _ => inside.split("</think>").skip(1).any(opens_answer),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(spacing: Spacing, completion: &str, expect: bool) {
        let judge = |think_in_prompt, text| {
            ThinkAnswerFormat { think_in_prompt, spacing }.judge(&Answer::of(text), &Row::new())
        };
        assert_eq!(judge(false, completion), Outcome::verdict(expect), "{completion:?}");
        let opening = if let Spacing::Newlines = spacing { "<think>\n" } else { "<think>" };
        if let Some(rest) = completion.strip_prefix(opening) {
            assert_eq!(judge(true, rest), Outcome::verdict(expect), "{rest:?} after {opening:?}");
        }
    }

    #[test]
    fn any_white_space_may_separate() {
        let check = |completion, expect| check(Spacing::Any, completion, expect);
        check("<think>a</think><answer>b</answer>", true);
        check("<think>a\n</think> \u{a0}\n<answer>\nb</answer>\n", true);
        check("<think></think><answer></answer>", true);
        check("<think>a</think>b</think> <answer>c</answer>", true);
        check("<think>a</think>x<answer>b</answer>", false);
        check("<think>a</think><answer>b</answer>\n\n", false);
        check("<think>a</think><answer>b</answer> ", false);
        check("<think>a</think></answer>", false);
        check("<think>a<answer>b</answer>", false);
        check("a</think><answer>b</answer>", false);
    }

    #[test]
    fn every_tag_may_have_to_be_a_line() {
        let check = |completion, expect| check(Spacing::Newlines, completion, expect);
        check("<think>\na\n</think>\n<answer>\nb\n</answer>", true);
        check("<think>\na\n</think>\n<answer>\nb\n</answer>\nand more", true);
        check("<think>\na\n</think>\n<answer>\nb\n</answer>x\n</answer>", true);
        check("<think>\na\n</think>\n<answer>\nb\n</answer> ", false);
        check("<think>\n</think>\n<answer>\nb\n</answer>", false);
        check("<think>\na\n</think>\n<answer>\n</answer>", false);
        check("<think>\na\n</think>\n\n<answer>\nb\n</answer>", false);
    }

    #[test]
    fn all_may_have_to_be_one_line() {
        let check = |completion, expect| check(Spacing::OneLine, completion, expect);
        check("<think>a</think><answer>b</answer>", true);
        check("<think>a</think><answer>b</answer>\n", true);
        check("<think>a</think> <answer>b</answer>", false);
        check("<think>a\n</think><answer>b</answer>", false);
        check("<think>a</think><answer>\nb</answer>", false);
    }
}
