//! Answers of the evaluation suites and of GSM8K, which the folder that `AHA_TEST_DATA` names holds as JSON lines.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{is_right, score};
use crate::dataset::Row;
use crate::reward::Outcome;

const SUITES: &[&str] = &["aime", "amc", "math500", "minerva", "olympiad_bench"];

/// Pairs of different texts of a suite that are the same answer, the gold one first.
const SAME: &[(&str, &str)] = &[
    ("5", "x=5"),
    (r"36^\circ", "36"),
    (r"2 \sqrt{5}", r"2\sqrt{5}"),
    (r"\frac{\cos(2t)}{15}", r"\frac{\cos (2 t)}{15}"),
    (r"\frac{e^{2it}}{2+2i} + Ce^{-2t}", r"\frac{e^{2it}}{2+2i}+Ce^{-2t}"),
    (r"\frac{1}{b-a}\left(e^{-at}-e^{-bt}\right)", r"\frac{1}{b-a}\left(e^{-a t}-e^{-b t}\right)"),
    (r"4.4677 \times 10^{14}", r"4.4677 \times 10^{14} Hz"),
    ("1", "1"),
    ("E_{1},E_{2}", "E_1, E_2"),
    ("$f(x)=1$", "1"),
    ("$k=3$", "3"),
];

fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("AHA_TEST_DATA").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: AHA_TEST_DATA names no folder with evaluation_suite/ and gsm8k/");
    }
    folder
}

fn rows(path: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn texts(gold: &Value) -> Vec<String> {
    match gold {
        Value::Array(alternatives) => alternatives.iter().flat_map(texts).collect(),
        Value::String(text) => vec![text.clone()],
        other => vec![other.to_string()],
    }
}

#[test]
fn every_gold_answer_is_right_and_no_other_one() {
    let Some(folder) = folder() else { return };
    let mut num_same = 0;
    for suite in SUITES {
        let golds: Vec<Value> = rows(&folder.join(format!("evaluation_suite/{suite}.jsonl")))
            .into_iter()
            .map(|row| row["answer"].clone())
            .collect();
        for (at, gold) in golds.iter().enumerate() {
            for text in texts(gold) {
                assert!(is_right(gold, &text), "{suite}: {gold} is not itself, {text:?}");
            }
            // Each against a few others of its suite.
            for other in golds.iter().cycle().skip(at + 1).take(12) {
                for text in texts(other).iter().filter(|text| !texts(gold).contains(text)) {
                    if is_right(gold, text) {
                        num_same += 1;
                        let is_same = |gold: &str| SAME.contains(&(gold.trim(), text.trim()));
                        assert!(texts(gold).iter().any(|gold| is_same(gold)), "{suite}: {gold} is not {text:?}");
                    }
                }
            }
        }
        println!("{suite}: {} answers", golds.len());
    }
    println!("{num_same} pairs of different texts are the same answer");
    assert!(num_same >= SAME.len(), "{num_same}");
}

#[test]
fn every_gsm8k_solution_is_right() {
    let Some(folder) = folder() else { return };
    for split in ["train", "test"] {
        let rows = rows(&folder.join(format!("gsm8k/{split}.jsonl")));
        for row in &rows {
            let solution = row["answer"].as_str().unwrap();
            let (_, number) = solution.rsplit_once("#### ").unwrap();
            for extract in ["strict", "flexible"] {
                let outcome = score("gsm8k_answer", json!({"extract": extract}), solution, row);
                assert_eq!(outcome, Outcome::Score(1.0), "{solution:?}");
            }
            let gold = json!(number);
            assert!(is_right(&gold, number) && !is_right(&gold, &format!("{number}1")), "{number:?}");
        }
        println!("{split}: {} solutions", rows.len());
    }
}
