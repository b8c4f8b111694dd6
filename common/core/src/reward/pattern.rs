//! The reward `regex`: whether a completion matches an expression of the configuration.

use std::sync::Arc;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Answer, Judge, Outcome, options};
use crate::dataset::Row;

const MAX_PATTERN_BYTES: usize = 1000;

/// Of the compiled expression: in the worst case every byte of a completion costs time in proportion.
const MAX_COMPILED_BYTES: usize = 1 << 17;

/// 1 where the expression matches. Its syntax is that of the crate `regex`: Python's without looking around and without
/// references to groups, so that every search takes linear time; `(?s)` lets `.` match a line break.
#[derive(Debug)]
struct Pattern(Regex);

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Options {
    pattern: String,
    /// It must match all of the completion, not a part of it.
    full_match: bool,
}

pub(super) fn make(options: Map<String, Value>) -> Result<Arc<dyn Judge>, String> {
    let Options { pattern, full_match } = options::parse(options)?;
    if !(1..=MAX_PATTERN_BYTES).contains(&pattern.len()) {
        return Err(format!("`pattern` must have 1 to {MAX_PATTERN_BYTES} bytes, got {}", pattern.len()));
    }
    let mut regex = compile(&pattern)?;
    if full_match {
        regex = compile(&format!(r"\A(?:{pattern})\z"))?;
    }
    Ok(Arc::new(Pattern(regex)))
}

fn compile(pattern: &str) -> Result<Regex, String> {
    let regex = RegexBuilder::new(pattern).size_limit(MAX_COMPILED_BYTES).build();
    regex.map_err(|error| format!("`pattern`: {error}"))
}

impl Judge for Pattern {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        Outcome::verdict(self.0.is_match(answer.text))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judge(options: &Value) -> Result<Arc<dyn Judge>, String> {
        make(options.as_object().unwrap().clone())
    }

    #[track_caller]
    fn check(completion: &str, options: &Value, expect: bool) {
        let outcome = judge(options).unwrap().judge(&Answer::of(completion), &Row::new());
        assert_eq!(outcome, Outcome::verdict(expect), "{completion:?} by {options}");
    }

    #[test]
    fn a_match_of_a_part_or_of_all() {
        let part = json!({"pattern": r"answer is \d+"});
        check("The answer is 42.", &part, true);
        check("The answer is unknown.", &part, false);
        let all = json!({"pattern": "a|ab", "full_match": true});
        check("ab", &all, true);
        check("abc", &all, false);
        check("ab\n", &all, false);
        check("a\nb", &json!({"pattern": "a.b"}), false);
        check("a\nb", &json!({"pattern": "(?s)a.b"}), true);
        check("ünïcödé", &json!({"pattern": r"\w+", "full_match": true}), true);
    }

    #[test]
    fn what_is_no_bounded_expression_is_refused() {
        for (pattern, message) in [
            ("", "`pattern` must have 1 to 1000 bytes, got 0"),
            (&*"a".repeat(1001), "`pattern` must have 1 to 1000 bytes, got 1001"),
            ("(", "unclosed group"),
            (r"(a)\1", "backreferences are not supported"),
            ("(?=a)", "look-around"),
            ("a{1000}{1000}", "exceeds size limit"),
            ("a)|(?:b", "unopened group"),
        ] {
            for full_match in [false, true] {
                let error = judge(&json!({"pattern": pattern, "full_match": full_match})).unwrap_err();
                assert!(error.contains(message), "{error}");
            }
        }
    }

    /// An expression that no table of states holds, which sends the engine to its slowest way.
    #[test]
    fn the_worst_expression_takes_linear_time() {
        let judge = judge(&json!({"pattern": "[01]*1[01]{600}2"})).unwrap();
        let text = "01101".repeat(200_000);
        let start = std::time::Instant::now();
        assert_eq!(judge.judge(&Answer::of(&text), &Row::new()), Outcome::Wrong);
        println!("{:?}", start.elapsed());
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?}", start.elapsed());
    }
}
