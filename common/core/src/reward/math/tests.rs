//! Verdicts: on the published cases of a reference, on answers of the evaluation suites, and on hostile text.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::extract::Extract;
use super::reading::Reading;
use crate::dataset::Row;
use crate::reward::{Answer, Outcome, RewardFunction, RewardSpec};

mod hostile;
mod suites;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/math_verify.json");

/// Categories of the published cases whose verdicts must all be the expected ones.
const COMPLETE: &[&str] = &["integer", "decimal", "fraction", "percent", "plain LaTeX number"];

/// How many verdicts of the other categories are the expected ones, at least.
const AGREED: &[(&str, usize)] = &[
    ("equation", 45),
    ("inequality", 22),
    ("interval", 10),
    ("matrix", 8),
    ("set", 19),
    ("symbolic", 15),
    ("text", 9),
    ("tuple", 21),
    ("units", 6),
];

/// One case of `tests/golden/math_verify.json`, which `make_math_verify.py` writes.
#[derive(Debug, Deserialize)]
struct Case {
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
fn verdict(gold: &str, pred: &str, extract: Extract) -> bool {
    let read = |text| Reading::of_completion(extract, text);
    matches!((read(gold), read(pred)), (Some(gold), Some(pred)) if gold.is_answered_by(&pred))
}

/// Whether an answer, boxed, is the gold one to `math_accuracy`.
fn is_right(gold: &Value, answer: &str) -> bool {
    let columns: Row = [("answer".to_owned(), gold.clone())].into_iter().collect();
    score("math_accuracy", json!({}), &format!("so it is \\boxed{{{answer}}}."), &columns) == Outcome::Score(1.0)
}

#[track_caller]
fn score(function: &str, options: Value, completion: &str, columns: &Row) -> Outcome {
    let Value::Object(options) = options else { panic!("options are an object") };
    let spec = RewardSpec { options, ..RewardSpec::of(function) };
    let function = RewardFunction::new(&spec).unwrap();
    function.check_columns(columns).unwrap();
    function.score(&Answer::of(completion), columns)
}

#[test]
fn verdicts_are_those_of_the_published_cases() {
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(GOLDEN).unwrap()).unwrap();
    assert_eq!(golden.cases.len(), 275);
    // Cases, verdicts that are the expected ones, and those that are math-verify's.
    let mut table: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
    for case in &golden.cases {
        let extract = if case.kinds == ["latex"] { Extract::Latex } else { Extract::Auto };
        let verdict = verdict(&case.gold, &case.pred, extract);
        assert!(case.expected || !verdict, "{case:?} is no match");
        if verdict != case.expected {
            println!("missed: {:?}, {:?}", case.gold, case.pred);
        }
        let counts = table.entry(&case.category).or_default();
        counts[0] += 1;
        counts[1] += usize::from(verdict == case.expected);
        counts[2] += usize::from(verdict == case.math_verify);
    }
    for (category, [cases, agreed, same]) in &table {
        println!("| {category} | {cases} | {agreed} | {same} |");
        let least = AGREED.iter().find(|(name, _)| name == category).map(|(_, least)| *least);
        let least = if COMPLETE.contains(category) { *cases } else { least.unwrap() };
        assert!(*agreed >= least, "{category}: {agreed} of {cases}, not {least}");
    }
}

#[test]
fn answers_are_compared_by_value() {
    let same = [
        ("0.5", r"\frac{1}{2}"),
        ("0.5", "1/2"),
        (r"1\frac{4}{5}", "9/5"),
        ("137 \\frac{1}{2}", "137.5"),
        ("1 4/5", "1.8"),
        ("10,\\!080", "10080"),
        ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
        ("\\$32,\\!348", "32348"),
        ("58,500", "58500"),
        ("28\\%", "0.28"),
        ("6e13", "6 \\times 10^{13}"),
        ("x=5", "5"),
        ("5", "x = 2 + 3 = 5"),
        ("y = 2x + 3", "2x+3"),
        ("f(x)=x+22", "x+22"),
        ("90^\\circ", "90"),
        ("15\\mbox{ cm}^2", "15"),
        ("5.4 \\text{ cents}", "5.4"),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"),
        ("\\text{(C)}", "C"),
        ("\\text{east}", "East"),
        ("11\\sqrt2", "11 \\sqrt{2}"),
        ("\\frac 59", "5/9"),
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
        ("5 \\sqrt[3]{4}", "5 \\cdot 4^{1/3}"),
        ("6+9i", "3(2+3i)"),
        ("\\frac{4A}{3+3i}", "\\frac{2A(1-i)}{3}"),
        ("(3,4]", "\\left( 3, 4 \\right]"),
        ("(0,9) \\cup (9,36)", "(9, 36) \\cup (0, 9)"),
        ("1,-2", "-2, 1"),
        ("27,54,108,135,189,216", "108,135,189,216,27,54"),
        ("$-1$,$2$,$-2$", "2, -2, -1"),
        ("1 \\pm \\sqrt{19}", "1 - \\sqrt{19}, 1 + \\sqrt{19}"),
        ("(2,32), (8,18)", "(8, 18) \\text{ and } (2, 32)"),
        ("\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}", "\\begin{bmatrix} 0.2 \\\\ -3.6 \\end{bmatrix}"),
        ("2 \\cos (\\pi t+\\pi / 3)", "2\\cos\\left(\\pi t + \\frac{\\pi}{3}\\right)"),
        ("E_{1},E_{2}", "E_1, E_2"),
        ("\\frac{\\dot{x}_{0}}{\\omega}", "\\dot{x}_0 / \\omega"),
        ("\\binom{2n}{n}", "\\frac{(2n)!}{n! n!}"),
        ("\\lfloor\\frac{2 n-1}{5}\\rfloor", "\\left\\lfloor \\frac{2n - 1}{5} \\right\\rfloor"),
        ("5x - 7y + 11z + 4 = 0", "10x - 14y + 22z = -8"),
        ("\\frac{1}{2004!}", "\\frac{2005}{2005!}"),
        ("2^{2017}-1", "2 \\cdot 2^{2016} - 1"),
    ];
    for (gold, answer) in same {
        assert!(is_right(&json!(gold), answer), "{gold:?} is {answer:?}");
    }
}

#[test]
fn what_is_nearly_right_is_wrong() {
    let different = [
        ("0.28", "28"),
        ("28/100", "28"),
        ("1/3", "0.33"),
        ("0.000123", "0.0001234"),
        ("7.25 \\times 10^{-11}", "7.24 \\times 10^{-11}"),
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
        ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
        ("10^{100}", "10^{100}+1"),
        ("204_5", "204"),
        ("4210_{5}", "4210_{6}"),
        ("12:00", "1:00"),
        ("(3,4]", "(3,4)"),
        ("(3,4]", "[3,4]"),
        ("(1,2)", "(2,1)"),
        ("1,2", "1,2,3"),
        ("\\pm 2021", "2021"),
        ("x=5", "y=5"),
        ("x \\ge 2", "x > 2"),
        ("I(0)e^{-\\frac{t}{RC}}", "0"),
        ("I(0)e^{-\\frac{t}{RC}}", "I e^{-\\frac{t}{RC}}"),
        ("\\lfloor n / 2\\rfloor", "\\lceil n / 2\\rceil"),
        ("\\lfloor\\frac{2 n-1}{5}\\rfloor", "\\lfloor\\frac{2 n}{5}\\rfloor"),
        ("\\frac{dx}{dt}", "\\frac{x}{t}"),
        ("\\text{Evelyn}", "\\text{Evelin}"),
        ("A", "a"),
        ("6abc", "6"),
        ("\\sin x", "x"),
        ("\\sum_{k=1}^{n} k", "\\sum_{k=0}^{n} k"),
        ("2", "2.0001"),
        ("x \\in [-2,7]", "-x \\in [-2,7]"),
        ("", ""),
        ("5", ""),
        ("1/0", "2/0"),
        ("\\sqrt{-1 - x^2}", "\\sqrt{-2 - x^2}"),
    ];
    for (gold, answer) in different {
        assert!(!is_right(&json!(gold), answer), "{gold:?} is not {answer:?}");
    }
}

#[test]
fn any_of_several_gold_answers_is_right() {
    assert!(is_right(&json!(["1.9\n", "2"]), "2"));
    assert!(is_right(&json!(142.0), "142"));
    assert!(!is_right(&json!(["1.9\n", "2"]), "1.8"));
}

#[test]
fn the_answer_is_found_where_the_option_says() {
    let columns: Row = [("gold".to_owned(), json!("7"))].into_iter().collect();
    let right = Outcome::Score(1.0);
    let cases = [
        ("auto", "so \\boxed{7}", right),
        ("auto", "so \\boxed{6}, no: the final answer is 7.", right),
        ("auto", "\\boxed{6}</think>\n<answer>7</answer>", Outcome::Wrong),
        ("auto", "</think>\n<answer>x = 7</answer>", right),
        ("auto", "</think>\n<answer>It takes $7$ days.</answer>", right),
        ("auto", "The answer is 3 + 4 = 7, in 2 steps.", right),
        ("auto", "First 3, then \\(7\\).", right),
        ("auto", "First \\(3\\), then 7.", right),
        ("auto", "First \\frac{1}{2}, then 7.", right),
        ("auto", "First 7, then \\frac{14}{2}.", right),
        ("auto", "There are 7, as 3 = ", right),
        ("auto", "nothing", Outcome::Unparsable),
        ("auto", "\\boxed{7", right),
        ("auto", "The answer is 7. Put it in \\boxed{}.", right),
        ("latex", "First \\(7\\), then 3.", right),
        ("latex", "7", Outcome::Unparsable),
        ("boxed", "\\boxed{6} and \\boxed{7}", right),
        ("boxed", "\\fbox{7}", right),
        ("boxed", "7", Outcome::Unparsable),
        ("boxed", "\\boxed{7", Outcome::Unparsable),
        ("answer_tag", "</think> <answer> 7 </answer>", right),
        ("answer_tag", "</think> <answer> so \\boxed{7} </answer>", right),
        ("answer_tag", "</think> <answer> \\boxed{7 </answer>", Outcome::Unparsable),
        ("answer_tag", "</think>\n<answer>7</answer>", Outcome::Unparsable),
        ("answer_tag", "</think> <answer>7", Outcome::Unparsable),
        ("answer_tag", "</think> <answer>6</answer> <answer>7</answer>", right),
    ];
    for (extract, completion, expect) in cases {
        let outcome = score("math_accuracy", json!({"column": "gold", "extract": extract}), completion, &columns);
        assert_eq!(outcome, expect, "{extract} of {completion:?}");
    }
}

#[test]
fn a_truncated_answer_counts_unless_the_option_says_no() {
    let columns: Row = [("answer".to_owned(), json!("7"))].into_iter().collect();
    for (truncated_scores_zero, expect) in [(false, Outcome::Score(1.0)), (true, Outcome::Unparsable)] {
        let options = json!({"truncated_scores_zero": truncated_scores_zero});
        let spec = RewardSpec { options: options.as_object().unwrap().clone(), ..RewardSpec::of("math_accuracy") };
        let answer = Answer { text: "\\boxed{7}", num_tokens: 3, is_truncated: true };
        assert_eq!(RewardFunction::new(&spec).unwrap().score(&answer, &columns), expect);
    }
}

#[test]
fn gsm8k_compares_the_number_at_the_end() {
    let columns: Row = [("answer".to_owned(), json!("2 * 617 = <<2*617=1234>>1234\n#### 1,234"))].into_iter().collect();
    let right = Outcome::Score(1.0);
    let cases = [
        ("flexible", "It is $1,234.", right),
        ("flexible", "It is 1234.00 in all", right),
        ("flexible", "1234 of 5", Outcome::Wrong),
        ("flexible", "none", Outcome::Unparsable),
        ("flexible", "#### 1234", right),
        ("strict", "#### 1,234", right),
        ("strict", "#### $1234 and 5", right),
        ("strict", "1234", Outcome::Unparsable),
        ("strict", "#### x 1234", Outcome::Unparsable),
        ("strict", "#### 1\n#### 1234", right),
        ("strict", "#### -1234", Outcome::Wrong),
    ];
    for (extract, completion, expect) in cases {
        assert_eq!(score("gsm8k_answer", json!({"extract": extract}), completion, &columns), expect, "{completion:?}");
    }
}

#[test]
fn the_chosen_letter_is_found() {
    let options = json!(["red", "green", "blue"]);
    let columns =
        |gold| [("answer".to_owned(), json!(gold)), ("options".to_owned(), options.clone())].into_iter().collect();
    let right = Outcome::Score(1.0);
    let cases = [
        ("\\boxed{B}", right),
        ("\\boxed{\\text{(B) green}}", right),
        ("\\boxed{green}", Outcome::Unparsable),
        ("</think><answer>(B)</answer>", right),
        ("The answer is (B), since (A) is red.", right),
        ("**Answer:** B", right),
        ("The answer is $\\textbf{(B)}$.", right),
        ("Answer: A. No. Answer: B.", right),
        ("Neither (A) nor (C), so (B)", right),
        ("(A)", Outcome::Wrong),
        ("B.", right),
        ("The answer is A man", Outcome::Unparsable),
        ("BA", Outcome::Unparsable),
    ];
    for (completion, expect) in cases {
        for gold in ["B", "(B)", "green"] {
            assert_eq!(score("multiple_choice", json!({}), completion, &columns(gold)), expect, "{completion:?}");
        }
    }
}

#[test]
fn columns_that_are_no_answers_are_named() {
    let bad = [
        ("math_accuracy", json!({"answer": {}}), "must be a text, a number, or a list of them"),
        ("math_accuracy", json!({"answer": []}), "must be a text, a number, or a list of them"),
        ("math_accuracy", json!({"answers": 3}), "did you mean \"answers\"?"),
        ("gsm8k_answer", json!({"answer": "none"}), "must be a number, or a text that ends with"),
        ("multiple_choice", json!({"answer": "purple", "options": ["red"]}), "must be a letter from A to Z"),
    ];
    for (name, columns, message) in bad {
        let function = RewardFunction::new(&RewardSpec::of(name)).unwrap();
        let columns = columns.as_object().unwrap();
        let error = function.check_columns(columns).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(function.score(&Answer::of("\\boxed{A}"), columns), Outcome::Crash);
    }
    let spec = serde_json::from_value(json!({"function": "math_accuracy", "extract": "box"})).unwrap();
    let error = RewardFunction::new(&spec).unwrap_err().to_string();
    assert!(error.contains("unknown variant `box`, expected one of `auto`, `boxed`, `answer_tag`, `latex`"), "{error}");
}
