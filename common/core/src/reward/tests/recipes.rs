//! Twenty thousand generated completions, scored by the recipes' own Python functions and by ours.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::process::Command;

use super::*;

const NUM_COMPLETIONS: usize = 20_000;
const SEED: u64 = 1;

/// Most completions whose equation may be scored otherwise than by the original, all of a documented kind.
const MAX_DIFFERENT: usize = 200;

/// The functions by their names in the script's lines.
fn functions() -> Vec<(&'static str, RewardFunction)> {
    let spacing = |spacing: &str| json!({"function": "think_answer_format", "spacing": spacing});
    let specs = [
        ("format", json!({"function": "format"})),
        ("equation", json!({"function": "equation"})),
        ("think_format", json!({"function": "think_format"})),
        ("any", spacing("any")),
        ("newlines", spacing("newlines")),
        ("one_line", spacing("one_line")),
        ("tag_count", json!({"function": "tag_count"})),
        ("reasoning_steps", json!({"function": "reasoning_steps"})),
        ("repetition_penalty", json!({"function": "repetition_penalty"})),
    ];
    let function = |spec| RewardFunction::new(&serde_json::from_value(spec).unwrap()).unwrap();
    specs.map(|(name, spec)| (name, function(spec))).into()
}

/// The lines of `recipe_rewards.py`; `None` where there is no Python.
fn scored_by_python() -> Option<Vec<Row>> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/recipe_rewards.py");
    let (count, seed) = (NUM_COMPLETIONS.to_string(), SEED.to_string());
    let output = match Command::new("python3").args(["-B", script, &count, &seed]).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        output => output.unwrap(),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

#[test]
fn generated_completions_score_as_by_the_recipes_python() {
    let Some(cases) = scored_by_python() else {
        println!("skipped: there is no python3");
        return;
    };
    assert_eq!(cases.len(), NUM_COMPLETIONS);
    let mut wrong = Vec::new();
    let mut different: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, function) in functions() {
        let mut num_zero = 0;
        for case in &cases {
            let completion = case["completion"].as_str().unwrap();
            let original = case["scores"][name].as_f64().unwrap();
            num_zero += usize::from(original == 0.0);
            let outcome = function.score(&Answer::of(completion), case);
            let is_close = |expect: f64| (f64::from(outcome.score()) - expect).abs() < 1e-6;
            let documented = &case["documented"];
            if outcome != Outcome::Crash && is_close(original) {
                continue;
            }
            match documented["kind"].as_str() {
                Some(kind) if name == "equation" && is_close(documented["score"].as_f64().unwrap()) => {
                    *different.entry(kind).or_default() += 1;
                }
                _ => wrong.push(format!("{name} {outcome:?}, not {original}: {case:?}")),
            }
        }
        println!("{name}: {num_zero} of {} are 0", cases.len());
        assert!((200..cases.len() - 200).contains(&num_zero), "{name}: {num_zero} of {} are 0", cases.len());
    }
    println!("equations scored otherwise, as documented: {different:?}");
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    assert!(different.values().sum::<usize>() <= MAX_DIFFERENT, "{different:?}");
}
