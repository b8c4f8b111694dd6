//! Verdicts: on the published cases of a reference, on answers of the evaluation suites, and on hostile text.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;

use super::extract::Extract;
use super::reading::Reading;
use crate::dataset::{Row, SplitMix64};
use crate::reward::{Answer, Outcome, RewardFunction, RewardSpec};

/// One case of `tests/golden/math_verify.json`, which `make_math_verify.py` writes.
#[derive(Debug, Deserialize)]
struct Case {
    test: String,
    gold: String,
    pred: String,
    kinds: Vec<String>,
    category: String,
    expected: bool,
    math_verify: bool,
}

#[derive(Debug, Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

/// Gold and prediction are found in their texts by the same rules, as in the reference.
fn agrees(case: &Case) -> bool {
    let extract = if case.kinds == ["latex"] { Extract::Latex } else { Extract::Auto };
    let read = |text| Reading::of_completion(extract, text);
    matches!((read(&case.gold), read(&case.pred)), (Some(gold), Some(pred)) if gold.is_answered_by(&pred))
}

#[test]
fn verdicts_are_those_of_the_published_cases() {
    let path = "/tmp/w/math/tests/golden/math_verify.json";
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut table: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
    for case in &golden.cases {
        let verdict = agrees(case);
        let row = table.entry(case.category.as_str()).or_default();
        row[0] += 1;
        row[1] += usize::from(verdict == case.expected);
        row[2] += usize::from(verdict == case.math_verify);
        if verdict != case.expected {
            let cut = |s: &str| s.chars().rev().take(150).collect::<Vec<_>>().into_iter().rev().collect::<String>();
            println!("{} {verdict} {} {:?} ||| {:?} [{}]\n", if verdict {"FALSE POSITIVE"} else {""}, case.category, cut(&case.gold), cut(&case.pred), case.test);
            let read = |text| Reading::of_completion(Extract::Auto, text);
            if std::env::var("V").is_ok() { println!("  {:?}\n  {:?} {:?}", read(&case.gold), read(&case.pred), Extract::Auto.candidates(&case.pred)); }
        }
    }
    for (category, row) in &table { println!("| {category} | {} | {} | {} |", row[0], row[1], row[2]); }
}
