//! Which rows are held out, and seeded order.

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::{Row, SplitMix64};

/// What a row's solver wrote, not what it asks: two rows that differ in these alone are the same question.
const ANSWER_COLUMNS: [&str; 3] = ["solution", "steps", "tries"];

/// Identifies the question that a row asks: equal questions have equal ids, on every machine and in any order.
///
/// The xxh3 of the row as JSON with sorted keys, without `solution`, `steps` and `tries`, and with lists of numbers
/// sorted, so that a Countdown puzzle with its numbers in another order is the same question.
#[must_use]
pub fn question_id(row: &Row) -> u64 {
    let mut text = String::new();
    let columns: Vec<_> = row.iter().filter(|(name, _)| !ANSWER_COLUMNS.contains(&name.as_str())).collect();
    write_object(columns, &mut text);
    xxh3_64(text.as_bytes())
}

/// Whether a row belongs to the `fraction` of all questions that is never trained on: a function of its [`question_id`]
/// alone, so equal questions fall on the same side.
#[must_use]
pub fn is_held_out(row: &Row, fraction: f64) -> bool {
    // The upper 53 bits are a double in [0, 1) exactly.
    let position = (question_id(row) >> 11) as f64 / (1_u64 << 53) as f64;
    position < fraction
}

/// Fisher-Yates.
pub(super) fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut random = SplitMix64::new(seed);
    for last in (1..items.len()).rev() {
        items.swap(last, random.below(last as u64 + 1) as usize);
    }
}

fn write_canonical(value: &Value, text: &mut String) {
    match value {
        Value::Object(object) => write_object(object.iter().collect(), text),
        Value::Array(items) if items.iter().all(Value::is_number) => {
            let mut items: Vec<_> = items.iter().collect();
            items.sort_by(|a, b| {
                let order = a.as_f64().partial_cmp(&b.as_f64()).unwrap_or(std::cmp::Ordering::Equal);
                // Large integers can share a double.
                order.then_with(|| a.to_string().cmp(&b.to_string()))
            });
            write_list(&items, text);
        }
        Value::Array(items) => write_list(&items.iter().collect::<Vec<_>>(), text),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => text.push_str(&value.to_string()),
    }
}

fn write_object(mut columns: Vec<(&String, &Value)>, text: &mut String) {
    columns.sort_by_key(|(name, _)| *name);
    text.push('{');
    for (index, (name, value)) in columns.into_iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        text.push_str(&Value::String(name.clone()).to_string());
        text.push(':');
        write_canonical(value, text);
    }
    text.push('}');
}

fn write_list(items: &[&Value], text: &mut String) {
    text.push('[');
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        write_canonical(item, text);
    }
    text.push(']');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn canonical(value: &Value) -> String {
        let mut text = String::new();
        write_canonical(value, &mut text);
        text
    }

    fn row(value: Value) -> Row {
        value.as_object().unwrap().clone()
    }

    #[track_caller]
    fn check(value: Value, expect: &str) {
        assert_eq!(canonical(&value), expect);
    }

    #[test]
    fn the_canonical_text_sorts_keys_and_numbers_only() {
        check(json!({"b": 1, "a": {"d": null, "c": true}}), r#"{"a":{"c":true,"d":null},"b":1}"#);
        check(json!([7, 55, 19, 36, -1, 2.5]), "[-1,2.5,7,19,36,55]");
        check(json!(["b", "a\n"]), r#"["b","a\n"]"#);
        check(json!([[2, 1], ["b", 1]]), r#"[[1,2],["b",1]]"#);
    }

    /// The side of a row may never change between versions: a model would be tested on what it was trained on.
    #[test]
    fn sides_are_fixed_for_ever() {
        let sides: String = (0..40)
            .map(|target| if is_held_out(&row(json!({"target": target, "nums": [1, 2, 3]})), 0.3) { '1' } else { '0' })
            .collect();
        assert_eq!(sides, "0110100100011111100000010100000001001000");
    }

    #[test]
    fn the_same_puzzle_falls_on_one_side() {
        for target in 0..200 {
            let side = |value: Value| is_held_out(&row(value), 0.5);
            let expect = side(json!({"target": target, "nums": [3, 1, 2]}));
            assert_eq!(side(json!({"nums": [1, 2, 3], "target": target})), expect);
            assert_eq!(side(json!({"nums": [2, 3, 1], "target": target, "solution": "1+2+3"})), expect);
        }
    }

    #[test]
    fn the_fraction_is_met() {
        let share = |fraction: f64| {
            let held_out = (0..10_000).filter(|id| is_held_out(&row(json!({"id": id})), fraction)).count();
            held_out as f64 / 10_000.0
        };
        assert!((share(0.1) - 0.1).abs() < 0.01);
        assert!((share(0.5) - 0.5).abs() < 0.02);
        assert_eq!((share(0.0), share(1.0)), (0.0, 1.0));
    }

    #[test]
    fn shuffling_is_seeded_and_keeps_every_item() {
        let shuffled = |seed| {
            let mut items: Vec<u32> = (0..100).collect();
            shuffle(&mut items, seed);
            items
        };
        assert_eq!(shuffled(1), shuffled(1));
        assert_ne!(shuffled(1), shuffled(2));
        let mut items = shuffled(1);
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        shuffle::<u32>(&mut [], 0);
    }
}
