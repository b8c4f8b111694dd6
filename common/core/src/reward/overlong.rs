//! DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), TRL's `get_soft_overlong_punishment`: the reward
//! `soft_overlong`, and what `train.soft_punish_cache` takes off any reward.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Answer, Judge, Outcome, options};
use crate::dataset::Row;

/// [`soft_overlong_punishment`] of the completion's tokens.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct SoftOverlong {
    /// Tokens from which on the whole punishment is due.
    max_completion_length: u32,
    /// Tokens before that over which it grows.
    cache: u32,
}

pub(super) fn make(options: Map<String, Value>) -> Result<Arc<dyn Judge>, String> {
    let judge: SoftOverlong = options::parse(options)?;
    let SoftOverlong { max_completion_length, cache } = judge;
    if !(1..=max_completion_length).contains(&cache) {
        return Err(format!(
            "`cache` must be 1 to `max_completion_length` tokens, got {cache} of {max_completion_length}; set both"
        ));
    }
    Ok(Arc::new(judge))
}

impl Judge for SoftOverlong {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        Outcome::Score(soft_overlong_punishment(answer.num_tokens, self.max_completion_length, self.cache))
    }
}

/// 0 up to `max_completion_length - cache` tokens, then down to -1 along a line over the last `cache`, and -1 beyond.
#[must_use]
pub fn soft_overlong_punishment(num_tokens: usize, max_completion_length: u32, cache: u32) -> f32 {
    let over = num_tokens as f64 - (f64::from(max_completion_length) - f64::from(cache));
    if over <= 0.0 {
        0.0
    } else if num_tokens <= max_completion_length as usize {
        (-over / f64::from(cache)) as f32
    } else {
        -1.0
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn options(max_completion_length: u32, cache: u32) -> Map<String, Value> {
        let options = json!({"max_completion_length": max_completion_length, "cache": cache});
        options.as_object().unwrap().clone()
    }

    // Expected values: TRL's get_soft_overlong_punishment(100, 20).
    #[test]
    fn falls_along_a_line_to_minus_1() {
        let judge = make(options(100, 20)).unwrap();
        for (num_tokens, expect) in [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0)] {
            assert_eq!(soft_overlong_punishment(num_tokens, 100, 20), expect, "{num_tokens} tokens");
            let answer = Answer { num_tokens, ..Answer::of("") };
            assert_eq!(judge.judge(&answer, &Row::new()), Outcome::Score(expect), "{num_tokens} tokens");
        }
        assert_eq!(soft_overlong_punishment(100, 100, 0), 0.0);
    }

    #[test]
    fn both_lengths_must_be_given() {
        for (max_completion_length, cache) in [(0, 0), (100, 0), (0, 20), (100, 101)] {
            let error = make(options(max_completion_length, cache)).unwrap_err();
            assert!(error.ends_with(&format!("got {cache} of {max_completion_length}; set both")), "{error}");
        }
    }
}
