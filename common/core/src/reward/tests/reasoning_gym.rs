//! reasoning-gym's countdown puzzles and its scorer: `tests/golden/make_reasoning_gym.py` writes what is read here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::dataset::{CountdownSource, Dataset, Part};

/// Most answers of which our verdict is another, all of a documented kind.
const MAX_DIFFERENT: usize = 100;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(name)
}

fn equation_score(equation: &str, columns: &Row) -> f32 {
    let outcome = function("equation").score(&Answer::of(&format!("<answer>{equation}</answer>")), columns);
    assert_ne!(outcome, Outcome::Crash, "{columns:?}");
    outcome.score()
}

/// 2,000 puzzles of 4, 5 and 6 numbers.
fn our_puzzles() -> Vec<Row> {
    let source = |(numbers, size)| CountdownSource {
        size,
        numbers,
        min_number: 1,
        max_number: 100,
        max_target: 999,
        operations: "+-*/".to_owned(),
        seed: 42,
    };
    let sources = [(4, 700), (5, 700), (6, 600)].map(source);
    sources.iter().flat_map(|source| source.generate().unwrap().rows().to_vec()).collect()
}

#[test]
#[ignore = "prints what make_reasoning_gym.py reads"]
fn print_puzzles() {
    for mut puzzle in our_puzzles() {
        puzzle.retain(|column, _| ["nums", "target", "solution"].contains(&column.as_str()));
        println!("\n{}", Value::Object(puzzle));
    }
}

#[test]
fn its_puzzles_are_rows_and_its_solutions_are_right() {
    let columns = [("nums".to_owned(), "numbers".to_owned())].into_iter().collect();
    let dataset = Dataset::load(&golden("reasoning_gym.jsonl"), Part::default(), &columns).unwrap();
    assert_eq!(dataset.len(), 2000);
    for row in dataset.rows() {
        assert_eq!(equation_score(row["expression"].as_str().unwrap(), row), 1.0, "{row:?}");
    }
}

#[test]
fn its_scorer_says_of_our_puzzles_what_we_say() {
    let dataset = Dataset::load(&golden("reasoning_gym_scores.jsonl"), Part::default(), &BTreeMap::new()).unwrap();
    let (mut num_right, mut num_wrong) = (0, 0);
    let mut different: BTreeMap<&str, usize> = BTreeMap::new();
    for (row, puzzle) in dataset.rows().iter().zip(&our_puzzles()) {
        let answers = row["answers"].as_array().unwrap();
        assert!(answers[0][0].as_str().unwrap().contains(puzzle["solution"].as_str().unwrap()), "{row:?}");
        for answer in answers {
            let is_right = answer[1] == 1.0;
            *(if is_right { &mut num_right } else { &mut num_wrong }) += 1;
            let ours = equation_score(answer[0].as_str().unwrap(), row) == 1.0;
            match answer[2].as_str() {
                Some(kind) => {
                    assert!(!ours && is_right, "{answer:?} is said to differ: {row:?}");
                    *different.entry(kind).or_default() += 1;
                }
                None => assert_eq!(ours, is_right, "{answer:?} of {row:?}"),
            }
        }
    }
    println!("{num_right} right, {num_wrong} wrong; scored otherwise, as documented: {different:?}");
    assert_eq!(dataset.len(), 2000);
    assert!(num_right > 2000 && num_wrong > 1000, "{num_right} right, {num_wrong} wrong");
    assert!(different.values().sum::<usize>() <= MAX_DIFFERENT, "{different:?}");
}
