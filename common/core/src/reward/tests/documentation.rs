//! The examples of the documentation, executed.

use std::collections::BTreeSet;
use std::fs;

use super::*;

/// Every line of a block of `json` in `docs/rewards*.md` that names a function: a spec, the completion, its row's columns,
/// and the score or the outcome's name.
#[test]
fn the_documentation_s_examples_score_what_it_says() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs");
    let (mut all, mut executed) = (String::new(), BTreeSet::new());
    for entry in fs::read_dir(docs).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !(file.starts_with("rewards") && file.ends_with(".md")) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let blocks = text.split("\n```json\n").skip(1).map(|rest| rest.split_once("\n```").expect("a closed block").0);
        for line in blocks.flat_map(str::lines).filter(|line| line.starts_with("{\"reward\"")) {
            executed.insert(check_example(&file, line));
        }
        all += &text;
    }
    for name in names() {
        assert!(all.contains(&format!("`{name}`")), "docs/rewards*.md say nothing of {name}");
        let has_section = all.contains(&format!("\n### `{name}`\n"));
        assert!(!has_section || executed.contains(name), "the section of {name} has no example");
    }
    assert!(executed.len() >= 12, "{executed:?}");
}

/// Executes one example, and says of which function.
fn check_example(file: &str, line: &str) -> String {
    let mut columns: Row = serde_json::from_str(line).unwrap_or_else(|error| panic!("{file}: {error} in {line}"));
    let mut take = |field: &str| columns.remove(field);
    let spec: RewardSpec = serde_json::from_value(take("reward").unwrap()).unwrap();
    let completion = take("completion").unwrap();
    let answer = Answer {
        text: completion.as_str().unwrap(),
        num_tokens: take("num_tokens").map_or(0, |number| number.as_u64().unwrap() as usize),
        is_truncated: false,
    };
    let expect = take("score").unwrap();
    let function = RewardFunction::new(&spec).unwrap_or_else(|error| panic!("{file}: {error} in {line}"));
    function.check_columns(&columns).unwrap_or_else(|error| panic!("{file}: {error} in {line}"));
    let outcome = function.score(&answer, &columns);
    let is_right = match &expect {
        Value::String(name) => outcome.name() == name,
        score => outcome.name() == "score" && (f64::from(outcome.score()) - score.as_f64().unwrap()).abs() < 1e-4,
    };
    assert!(is_right, "{file}: {outcome:?} for {line}");
    spec.function
}
