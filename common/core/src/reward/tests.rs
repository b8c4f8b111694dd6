//! The reward functions against Python's answers, hostile input and noise.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;

mod documentation;
mod reasoning_gym;
mod recipes;

/// Slowest answer that is allowed to a test build on a busy machine: enough to tell linear from quadratic time in a
/// megabyte. A release build takes milliseconds for that.
const HOSTILE_LIMIT: Duration = Duration::from_secs(10);

fn row(target: Value, nums: Value) -> Row {
    [("target".to_owned(), target), ("nums".to_owned(), nums)].into_iter().collect()
}

fn function(name: &str) -> RewardFunction {
    RewardFunction::new(&RewardSpec::of(name)).unwrap()
}

/// Those of the mini-R1 recipe.
fn mini_r1() -> [RewardFunction; 2] {
    ["format", "equation"].map(function)
}

/// Every function, with the options that some have no default for.
fn all() -> Vec<RewardFunction> {
    let spec = |name: &str| match name {
        "cosine_length" => json!({"function": name, "correct": {"function": "equation"}}),
        "soft_overlong" => json!({"function": name, "max_completion_length": 100, "cache": 20}),
        "regex" => json!({"function": name, "pattern": r"(\w+\s*)*=\s*[0-9]+(</answer>)?$"}),
        "exact_match" => json!({"function": name, "column": "target", "extract": "answer_tag", "ignore_case": true}),
        _ => json!({"function": name}),
    };
    names().into_iter().map(|name| RewardFunction::new(&serde_json::from_value(spec(name)).unwrap()).unwrap()).collect()
}

#[track_caller]
fn check(name: &str, completion: &str, (target, nums): (Value, Value), expect: Outcome) {
    assert_eq!(function(name).score(&Answer::of(completion), &row(target, nums)), expect, "{completion:?}");
}

#[track_caller]
fn check_equation(equation: &str, target: i64, nums: &[i64], expect: Outcome) {
    let completion = format!("</think>\n<answer>{equation}</answer>");
    check("equation", &completion, (json!(target), json!(nums)), expect);
}

/// `tests/golden/make_rewards.py` writes the cases by running the recipe's own functions.
#[test]
fn every_score_is_the_reference_s() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/rewards.json");
    let cases: Vec<Row> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(cases.len() > 390, "{}", cases.len());
    let mut wrong = Vec::new();
    for case in &cases {
        let completion = case["completion"].as_str().unwrap();
        for function in mini_r1() {
            let outcome = function.score(&Answer::of(completion), case);
            if f64::from(outcome.score()) != case[function.name()].as_f64().unwrap() {
                wrong.push(format!("{} {outcome:?}: {case:?}", function.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn outcomes_say_why_there_is_no_score() {
    check_equation("55 + 36 - 7 - 19", 65, &[19, 36, 55, 7], Outcome::Score(1.0));
    check_equation("55 + 36 - 7 - 18", 65, &[19, 36, 55, 7], Outcome::Wrong);
    check_equation("55 + 36 + 7 + 19", 65, &[19, 36, 55, 7], Outcome::Wrong);
    check_equation("65", 65, &[19, 36, 55, 7], Outcome::Wrong);
    check_equation("2(3)", 6, &[2, 3], Outcome::Unparsable);
    check_equation("55 + 36 = 91", 91, &[36, 55], Outcome::Unparsable);
    check_equation("5/(3-3)", 65, &[3, 3, 5], Outcome::Wrong);
    check_equation("", 65, &[1], Outcome::Unparsable);
    check("equation", "no tags", (json!(1), json!([1])), Outcome::Unparsable);
    check("format", "no tags", (json!(1), json!([1])), Outcome::Wrong);
}

#[test]
fn outcomes_serialise_with_score_and_name() {
    assert_eq!(serde_json::to_string(&Outcome::Score(1.0)).unwrap(), r#"{"score":1.0,"outcome":"score"}"#);
    assert_eq!(serde_json::to_string(&Outcome::Unparsable).unwrap(), r#"{"score":0.0,"outcome":"unparsable"}"#);
}

#[test]
fn bad_columns_are_named_before_a_run_and_a_crash_in_one() {
    let equation = function("equation");
    let bad = [
        (row(json!("six"), json!([1])), "\"target\" must be a number"),
        (row(json!([6]), json!([1])), "\"target\" must be a number"),
        (row(json!(6), json!("1 2")), "\"nums\" must be a list of integers"),
        (row(json!(6), json!([1, "2"])), "\"nums\" must be a list of integers"),
    ];
    for (columns, message) in bad {
        let error = equation.check_columns(&columns).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(equation.score(&Answer::of("<answer>1</answer>"), &columns), Outcome::Crash);
    }
    let columns = [("targets".to_owned(), json!(6))].into_iter().collect();
    let error = equation.check_columns(&columns).unwrap_err().to_string();
    assert_eq!(
        error,
        r#"reward equation: needs the column "target"; the row has ["targets"]; did you mean "targets"?"#
    );
    assert!(equation.check_columns(&row(json!("65"), json!([1, 2]))).is_ok());
    assert!(function("format").check_columns(&Row::new()).is_ok());
}

#[test]
fn mistakes_in_a_spec_are_named_with_a_hint() {
    let message = |spec: &RewardSpec| RewardFunction::new(spec).unwrap_err().to_string();
    let error = message(&RewardSpec::of("equations"));
    assert!(
        error.starts_with(r#""equations" is no reward function; did you mean "equation"?; there are format"#),
        "{error}"
    );
    let spec = serde_json::from_value(json!({"function": "format", "weigth": 2})).unwrap();
    assert_eq!(message(&spec), r#"reward format: there is no option "weigth"; it has none"#);
}

#[test]
fn a_function_goes_by_the_name_that_it_is_given() {
    let spec: RewardSpec = serde_json::from_value(json!({"function": "equation", "name": "solved"})).unwrap();
    let solved = RewardFunction::new(&spec).unwrap();
    let error = solved.check_columns(&Row::new()).unwrap_err().to_string();
    assert!(error.starts_with("reward solved: needs the column"), "{error}");
}

#[test]
fn hostile_completions_are_answered_at_once() {
    let answer = |equation: String| format!("</think>\n<answer>{equation}</answer>");
    let megabyte = 1_000_000;
    let hostile = [
        "(".repeat(megabyte),
        answer("(".repeat(megabyte)),
        answer("(".repeat(16_000)),
        answer("-".repeat(16_000)),
        answer("9".repeat(megabyte)),
        answer("9".repeat(16_000)),
        answer("9**9**9**9".to_owned()),
        answer(format!("9{}", "**9".repeat(5_000))),
        answer(format!("9{}", "/7+1/3".repeat(2_500))),
        answer(format!("1{}", "*1".repeat(8_000))),
        "<think>".repeat(100_000) + "</answer>",
        "<answer>".repeat(100_000),
        "</answer>".repeat(100_000),
        "</think>".repeat(100_000) + "</answer>",
        "<".repeat(megabyte) + "</answer>",
        "<answer>\n".repeat(100_000),
        "\\boxed{".repeat(100_000),
        answer("\0".repeat(megabyte)),
        answer("\u{202e}\u{200d}\x1b[31m".repeat(1000)),
        answer(" ".repeat(megabyte)),
        "<think></think>".to_owned() + &" ".repeat(megabyte) + "</answer>",
        "<think>\n".repeat(100_000),
        "<think>\n".to_owned() + &"\n</think>\n<answer>\n".repeat(50_000) + "</answer>",
        "\n</answer>x".repeat(90_000),
        "Step 1".to_owned() + &"1".repeat(megabyte),
        "\n-First,".repeat(100_000),
        "a ".repeat(megabyte / 2),
        (0..150_000).map(|word| format!("{word} ")).collect(),
        "\u{130}\u{3a3}".repeat(megabyte / 4),
        "\u{1d11e}\u{4e00}=".repeat(megabyte / 8),
        "a = 1</answer>".repeat(70_000) + " ",
        answer("1 ".repeat(8_000)),
    ];
    for (case, completion) in hostile.iter().enumerate() {
        for nums in [json!([9, 9, 9, 9]), json!(vec![9; 5_001]), json!(vec![1; 8_001])] {
            let columns = row(json!(1), nums);
            for function in &all() {
                let start = Instant::now();
                let outcome = function.score(&Answer::of(completion), &columns);
                let elapsed = start.elapsed();
                assert!(elapsed < HOSTILE_LIMIT, "{} of hostile case {case} took {elapsed:?}", function.name());
                println!("case {case}, {}: {elapsed:?} {outcome:?}", function.name());
            }
        }
    }
}

#[test]
fn noise_never_panics() {
    let alphabet: Vec<&str> =
        "0 1 7 19 55 + - * / ( ) . ** // = \n \r \t Step First, <answer> </answer> <think> </think> é \0 ٣ e"
            .split(' ')
            .chain([" "])
            .collect();
    let columns = row(json!(65), json!([19, 55, 7]));
    let functions = all();
    let mut random = crate::dataset::SplitMix64::new(7);
    for _ in 0..20_000 {
        let mut completion = String::from("</think>\n<answer>");
        for _ in 0..random.below(24) {
            completion.push_str(alphabet[random.below(alphabet.len() as u64) as usize]);
        }
        completion.push_str("</answer>");
        let answer = Answer { num_tokens: random.below(200) as usize, ..Answer::of(&completion) };
        for function in &functions {
            let score = function.score(&answer, &columns).score();
            assert!((-1.0..=1.0).contains(&score), "{} scores {score}", function.name());
        }
    }
}
