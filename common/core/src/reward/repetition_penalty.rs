//! The reward `repetition_penalty`: open-r1's `get_repetition_penalty_reward`, from appendix C.2 of "Demystifying Long
//! Chain-of-Thought Reasoning" (arXiv 2502.03373), over words. TRL's function of that name is over tokens.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Answer, Judge, Outcome, options};
use crate::dataset::Row;
use crate::text::is_python_space;

/// Every n-gram is hashed whole, so this bounds the time of a word.
const MAX_NGRAM_SIZE: usize = 64;

/// `max_penalty` times the share of the n-grams of words that were there before; case makes no difference.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct RepetitionPenalty {
    /// Words of an n-gram.
    ngram_size: usize,
    /// At most 0.
    max_penalty: f64,
}

impl Default for RepetitionPenalty {
    fn default() -> Self {
        Self { ngram_size: 3, max_penalty: -1.0 }
    }
}

pub(super) fn make(options: Map<String, Value>) -> Result<Arc<dyn Judge>, String> {
    let judge: RepetitionPenalty = options::parse(options)?;
    let RepetitionPenalty { ngram_size, max_penalty } = judge;
    if !(1..=MAX_NGRAM_SIZE).contains(&ngram_size) {
        return Err(format!("`ngram_size` must be 1 to {MAX_NGRAM_SIZE} words, got {ngram_size}"));
    }
    if max_penalty > 0.0 {
        return Err(format!("`max_penalty` must be at most 0, got {max_penalty}"));
    }
    Ok(Arc::new(judge))
}

impl Judge for RepetitionPenalty {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        let text = answer.text.to_lowercase();
        let mut ids = HashMap::new();
        let words = text.split(is_python_space).filter(|word| !word.is_empty());
        let words: Vec<usize> = words
            .map(|word| {
                let next = ids.len();
                *ids.entry(word).or_insert(next)
            })
            .collect();
        let num_ngrams = words.windows(self.ngram_size).len();
        let num_repeated = num_ngrams - words.windows(self.ngram_size).collect::<HashSet<_>>().len();
        if num_repeated == 0 {
            return Outcome::Score(0.0);
        }
        Outcome::Score((num_repeated as f64 / num_ngrams as f64 * self.max_penalty) as f32)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(completion: &str, options: &Value, expect: f32) {
        let judge = make(options.as_object().unwrap().clone()).unwrap();
        assert_eq!(judge.judge(&Answer::of(completion), &Row::new()), Outcome::Score(expect), "{completion:?}");
    }

    // Expected values: open-r1's tests of get_repetition_penalty_reward, and its function.
    #[test]
    fn the_share_of_repeated_ngrams_is_punished() {
        let pairs = json!({"ngram_size": 2});
        check("", &pairs, 0.0);
        check("word", &pairs, 0.0);
        check("this is a test sentence", &pairs, 0.0);
        check("this is a this is a", &pairs, -0.4);
        check("This IS\u{a0}a\nthis is A", &pairs, -0.4);
        check("a a a a a a", &pairs, -0.8);
        check("a b c a b c a b c", &json!({}), -4.0 / 7.0);
        check("a b c a b c a b c", &json!({"max_penalty": -0.5}), -2.0 / 7.0);
        check("a a a a", &json!({"ngram_size": 4}), 0.0);
    }

    #[test]
    fn options_out_of_range_are_named() {
        for (options, message) in [
            (json!({"ngram_size": 0}), "`ngram_size` must be 1 to 64 words, got 0"),
            (json!({"ngram_size": 65}), "`ngram_size` must be 1 to 64 words, got 65"),
            (json!({"max_penalty": 0.5}), "`max_penalty` must be at most 0, got 0.5"),
        ] {
            assert_eq!(make(options.as_object().unwrap().clone()).unwrap_err(), message);
        }
    }
}
