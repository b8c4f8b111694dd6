//! A completion is hostile: whatever it says, every reward function has a score for it.
#![no_main]

use aha_core::reward::{self, Answer, RewardFunction, RewardSpec};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

fuzz_target!(|bytes: &[u8]| {
    // The first byte says how many of those after it are the row's columns.
    let Some((&length, rest)) = bytes.split_first() else { return };
    let (columns, completion) = rest.split_at(usize::from(length).min(rest.len()));
    let columns: Map<String, Value> = serde_json::from_slice(columns)
        .unwrap_or_else(|_| json!({"target": 36, "nums": [3, 7, 12], "answer": "12"}).as_object().expect("an object").clone());
    let completion = String::from_utf8_lossy(completion);
    for name in reward::names() {
        let spec = RewardSpec { options: options(name), ..RewardSpec::of(name) };
        let Ok(function) = RewardFunction::new(&spec) else { continue };
        let answer = Answer { num_tokens: completion.len(), ..Answer::of(&completion) };
        let score = function.score(&answer, &columns).score();
        assert!((-1.0..=1.0).contains(&score), "{name} scores {score}");
    }
});

/// What some functions are nothing without.
fn options(name: &str) -> Map<String, Value> {
    let options = match name {
        "cosine_length" => json!({"correct": {"function": "equation"}}),
        "soft_overlong" => json!({"max_completion_length": 100, "cache": 20}),
        "regex" => json!({"pattern": r"(\w+\s*)*=\s*[0-9]+(</answer>)?$"}),
        "exact_match" => json!({"column": "target", "extract": "last_line"}),
        _ => json!({}),
    };
    options.as_object().expect("an object").clone()
}
