//! The reward `regex`: whether a completion matches an expression of the configuration.

use std::sync::Arc;

use regex::Regex;
use regex_syntax::hir::{Hir, HirKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Answer, Judge, Outcome, options};
use crate::dataset::Row;

const MAX_PATTERN_BYTES: usize = 1000;

/// Letters, classes and boundaries of an expression, with what is repeated counted as often as it can be: the search may look at
/// all of them at every byte of a completion, which takes up to 20 s a megabyte. Ordinary expressions take milliseconds.
const MAX_POSITIONS: usize = 500;

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
    let parsed = regex_syntax::parse(pattern).map_err(|error| format!("`pattern`: {error}"))?;
    if positions(&parsed) > MAX_POSITIONS {
        return Err(format!(
            "`pattern` has more than {MAX_POSITIONS} letters and classes, repetitions counted in full"
        ));
    }
    Regex::new(pattern).map_err(|error| format!("`pattern`: {error}"))
}

/// The parser bounds the depth.
fn positions(pattern: &Hir) -> usize {
    match pattern.kind() {
        HirKind::Empty => 0,
        HirKind::Literal(literal) => literal.0.len(),
        HirKind::Class(_) | HirKind::Look(_) => 1,
        HirKind::Repetition(repetition) => {
            let times = repetition.max.unwrap_or(repetition.min.saturating_add(1));
            positions(&repetition.sub).saturating_mul(times as usize)
        }
        HirKind::Capture(capture) => positions(&capture.sub),
        HirKind::Concat(parts) | HirKind::Alternation(parts) => {
            parts.iter().map(positions).fold(0, usize::saturating_add)
        }
    }
}

impl Judge for Pattern {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        Outcome::verdict(self.0.is_match(answer.text))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

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
        check("it is so", &json!({"pattern": r"^\w+ \w+ \w+$"}), true);
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
            ("(?:a{1000}){1000}{1000}{1000}{1000}{1000}{1000}{1000}", "`pattern` has more than 500"),
            ("a{501}", "`pattern` has more than 500"),
            (r"(?:(?:(?:\w?|b){9}){9}){9}", "`pattern` has more than 500"),
            ("a)|(?:b", "unopened group"),
        ] {
            for full_match in [false, true] {
                let error = judge(&json!({"pattern": pattern, "full_match": full_match})).unwrap_err();
                assert!(error.contains(message), "{error}");
            }
        }
    }

    /// Word boundaries beside letters that are not ASCII send the engine its slowest way, which takes time for every state.
    #[test]
    fn the_worst_expression_is_bounded_by_its_size() {
        let worst = judge(&json!({"pattern": r"(?:1?0?a?é?\b?){83}\W"})).unwrap();
        let text = "1é0a".repeat(25_000);
        let start = Instant::now();
        assert_eq!(worst.judge(&Answer::of(&text), &Row::new()), Outcome::Wrong);
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    }
}
