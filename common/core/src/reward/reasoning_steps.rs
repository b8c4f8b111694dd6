//! The reward `reasoning_steps`: open-r1's `reasoning_steps_reward`.

use std::sync::LazyLock;

use regex::Regex;

use super::{Answer, Judge, Outcome};
use crate::dataset::Row;

/// A third for every sign of reasoning step by step, up to 1: `Step 1:`, a number at the very start, an item of a list,
/// or `First,`, `Second,`, `Next,`, `Finally,`.
#[derive(Debug, Default)]
pub(super) struct ReasoningSteps;

/// As Python's: `^` is the start of the text alone, and `\d` any script's digit.
static STEP: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,").expect("the expression is valid")
});

impl Judge for ReasoningSteps {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        Outcome::Score(STEP.find_iter(answer.text).take(3).count() as f32 / 3.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values: open-r1's reasoning_steps_reward.
    #[test]
    fn three_signs_are_enough() {
        for (completion, expect) in [
            ("Step 1: a\nStep 2: b\nStep 3: c", 1.0),
            ("First, a. Second, b. Next, c. Finally, d.", 1.0),
            ("1. a\n2. b\n3. c", 1.0 / 3.0),
            ("a\n- b\n* c", 2.0 / 3.0),
            ("a\n1. b", 0.0),
            ("Step ٣: a, step 4: b, Step : c", 1.0 / 3.0),
            ("first, Firstly, Next", 0.0),
            ("", 0.0),
        ] {
            let outcome = ReasoningSteps.judge(&Answer::of(completion), &Row::new());
            assert_eq!(outcome, Outcome::Score(expect), "{completion:?}");
        }
    }
}
