//! Countdown puzzles, made on the spot: reach `target` with every number of `nums` used once.
//!
//! A puzzle is made backwards, from a random expression over random numbers, so every one has a solution. The columns
//! are those of Jiayi-Pan/Countdown-Tasks-3to4, `target` and `nums`, and the expression as `solution` with the list of its
//! worked `steps`. `tries` is what a player of little patience writes down: expressions at random until one reaches the
//! target or the player gives up, perhaps before the first.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Dataset, SplitMix64};
use crate::random::derive_seed;

/// Most numbers of a puzzle.
const MAX_NUMBERS: usize = 8;

/// Draws for one puzzle. Ordinary settings need a few; settings that need this many allow next to none.
const MAX_DRAWS: usize = 100_000;

/// Most tries of a player.
const MAX_TRIES: usize = 5;

/// Names the tries among the purposes that the seed is used for.
const TRIES: u64 = 0x5452_4945;

/// A family of puzzles. Equal settings make equal puzzles on every platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CountdownSource {
    /// Puzzles to make. The first puzzles do not depend on it.
    pub size: usize,
    /// Numbers of a puzzle, each used once.
    pub numbers: usize,
    /// Smallest number, at least 1.
    pub min_number: u32,
    pub max_number: u32,
    /// Largest target; the smallest is 1.
    pub max_target: u32,
    /// Operations that solutions use, of `+-*/`.
    pub operations: String,
    pub seed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CountdownError {
    #[error("a puzzle has 1 to {MAX_NUMBERS} numbers, got {0}")]
    Numbers(usize),
    #[error("numbers must be at least 1 and their range not empty, got {min} to {max}")]
    Range { min: u32, max: u32 },
    #[error("operations must be some of \"+-*/\", got {0:?}")]
    Operations(String),
    #[error(
        "found no puzzle with {numbers} numbers from {min} to {max} whose target is 1 to {max_target} in {MAX_DRAWS} draws; \
         raise max_target or allow more operations"
    )]
    NoPuzzle { numbers: usize, min: u32, max: u32, max_target: u32 },
}

impl CountdownSource {
    /// Makes the puzzles, with columns `nums`, `target`, `solution`, `steps` and `tries`. All intermediate results are whole
    /// numbers above 0. A try has `steps` and `expression`, and `hits` says whether it reaches the target; only the last
    /// one can, and there may be none. The same puzzle can come up twice.
    ///
    /// # Errors
    /// Settings that no puzzle satisfies.
    pub fn generate(&self) -> Result<Dataset, CountdownError> {
        let operations = self.validated_operations()?;
        let mut random = SplitMix64::new(self.seed);
        let rows = (0..self.size).map(|index| {
            let (nums, solution) = self.puzzle(&operations, &mut random)?;
            // A stream of their own, so that the puzzles are the same without them.
            let mut player = SplitMix64::new(derive_seed(self.seed, &[TRIES, index as u64]));
            let tries = tries(&nums, solution.value, &operations, &mut player);
            let columns = [
                ("nums", json!(nums)),
                ("target", json!(solution.value)),
                ("solution", json!(solution.text)),
                ("steps", json!(solution.steps)),
                ("tries", tries),
            ];
            Ok(columns.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
        });
        Ok(Dataset::new(rows.collect::<Result<_, _>>()?))
    }

    /// As [`Self::generate`], with `numbers` of `range` in turn; in place of its own.
    ///
    /// # Errors
    /// Settings that no puzzle satisfies.
    pub fn generate_of(&self, range: RangeInclusive<usize>) -> Result<Dataset, CountdownError> {
        for end in [*range.start(), *range.end()] {
            if !(1..=MAX_NUMBERS).contains(&end) {
                return Err(CountdownError::Numbers(end));
            }
        }
        let num_families = range.clone().count().max(1);
        let family = |numbers| {
            let size = self.size.div_ceil(num_families);
            Self { size, numbers, seed: derive_seed(self.seed, &[numbers as u64]), ..self.clone() }.generate()
        };
        let families = range.map(family).collect::<Result<Vec<_>, _>>()?;
        let in_turn = (0..self.size).filter_map(|index| families.get(index % num_families)?.get(index / num_families));
        Ok(Dataset::new(in_turn.cloned().collect()))
    }

    fn validated_operations(&self) -> Result<Vec<Operation>, CountdownError> {
        if !(1..=MAX_NUMBERS).contains(&self.numbers) {
            return Err(CountdownError::Numbers(self.numbers));
        }
        if self.min_number == 0 || self.min_number > self.max_number {
            return Err(CountdownError::Range { min: self.min_number, max: self.max_number });
        }
        let operations: Option<Vec<_>> = self.operations.chars().map(Operation::from_char).collect();
        operations
            .filter(|operations| !operations.is_empty())
            .ok_or_else(|| CountdownError::Operations(self.operations.clone()))
    }

    fn puzzle(
        &self,
        operations: &[Operation],
        random: &mut SplitMix64,
    ) -> Result<(Vec<u64>, Expression), CountdownError> {
        let choices = u64::from(self.max_number - self.min_number) + 1;
        for _ in 0..MAX_DRAWS {
            let nums: Vec<u64> =
                (0..self.numbers).map(|_| u64::from(self.min_number) + random.below(choices)).collect();
            let Some(solution) = random_expression(&nums, operations, random) else { continue };
            if solution.value <= u64::from(self.max_target) {
                return Ok((nums, solution));
            }
        }
        let Self { numbers, min_number: min, max_number: max, max_target, .. } = *self;
        Err(CountdownError::NoPuzzle { numbers, min, max, max_target })
    }
}

/// Joins two random parts by a random operation until one is left; `None` where a result would not be a whole number
/// above 0.
fn random_expression(nums: &[u64], operations: &[Operation], random: &mut SplitMix64) -> Option<Expression> {
    let mut parts: Vec<_> = nums.iter().map(|&value| Expression::number(value)).collect();
    while parts.len() > 1 {
        let mut take = || parts.swap_remove(random.below(parts.len() as u64) as usize);
        let (left, right) = (take(), take());
        let operation = operations[random.below(operations.len() as u64) as usize];
        parts.push(Expression::join(left, operation, right)?);
    }
    parts.pop()
}

/// Random expressions, no result twice, until one is `target` or the player gives up, as before two tries of five.
fn tries(nums: &[u64], target: u64, operations: &[Operation], random: &mut SplitMix64) -> Value {
    let patience = (0..MAX_TRIES).take_while(|_| random.below(5) >= 2).count();
    let mut tries: Vec<Expression> = Vec::new();
    for _ in 0..MAX_DRAWS {
        if tries.len() == patience || tries.last().is_some_and(|last| last.value == target) {
            break;
        }
        let Some(attempt) = random_expression(nums, operations, random) else { continue };
        if tries.iter().all(|earlier| earlier.value != attempt.value) {
            tries.push(attempt);
        }
    }
    let columns = |attempt: Expression| json!({"steps": attempt.steps, "expression": attempt.text, "hits": attempt.value == target});
    tries.into_iter().map(columns).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
}

impl Operation {
    fn from_char(symbol: char) -> Option<Self> {
        [Self::Add, Self::Subtract, Self::Multiply, Self::Divide].into_iter().find(|op| op.symbol() == symbol)
    }

    fn symbol(self) -> char {
        match self {
            Self::Add => '+',
            Self::Subtract => '-',
            Self::Multiply => '*',
            Self::Divide => '/',
        }
    }

    fn apply(self, left: u64, right: u64) -> Option<u64> {
        match self {
            Self::Add => left.checked_add(right),
            Self::Subtract => left.checked_sub(right).filter(|&difference| difference > 0),
            Self::Multiply => left.checked_mul(right),
            Self::Divide => left.is_multiple_of(right).then(|| left / right),
        }
    }

    fn is_additive(self) -> bool {
        matches!(self, Self::Add | Self::Subtract)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Expression {
    /// Above 0.
    value: u64,
    text: String,
    /// How the value comes about, one operation a step: `8 * 3 = 24`.
    steps: Vec<String>,
    /// The operation that is applied last; `None` for a number.
    outermost: Option<Operation>,
}

impl Expression {
    fn number(value: u64) -> Self {
        Self { value, text: value.to_string(), steps: Vec::new(), outermost: None }
    }

    fn join(left: Self, operation: Operation, right: Self) -> Option<Self> {
        let value = operation.apply(left.value, right.value)?;
        let left_text = left.parenthesised_if(|inner| inner.is_additive() && !operation.is_additive());
        let right_text = right.parenthesised_if(|inner| match operation {
            Operation::Add => false,
            Operation::Subtract | Operation::Multiply => inner.is_additive(),
            Operation::Divide => true,
        });
        let text = format!("{left_text} {} {right_text}", operation.symbol());
        let step = format!("{} {} {} = {value}", left.value, operation.symbol(), right.value);
        let steps = [left.steps, right.steps, vec![step]].concat();
        Some(Self { value, text, steps, outermost: Some(operation) })
    }

    fn parenthesised_if(&self, needed: impl Fn(Operation) -> bool) -> String {
        if self.outermost.is_some_and(needed) { format!("({})", self.text) } else { self.text.clone() }
    }
}

#[cfg(test)]
mod tests {
    use crate::dataset::Row;
    use crate::reward::{Answer, Outcome, RewardFunction, RewardSpec};

    use super::*;

    fn source() -> CountdownSource {
        CountdownSource {
            size: 200,
            numbers: 4,
            min_number: 1,
            max_number: 99,
            max_target: 99,
            operations: "+-*/".to_owned(),
            seed: 1,
        }
    }

    fn equation(completion: &str, columns: &Row) -> Outcome {
        RewardFunction::new(&RewardSpec::of("equation")).unwrap().score(&Answer::of(completion), columns)
    }

    fn check_solved(source: &CountdownSource) {
        for row in source.generate().unwrap().rows() {
            let completion = format!("<answer>{}</answer>", row["solution"].as_str().unwrap());
            assert_eq!(equation(&completion, row), Outcome::Score(1.0), "{row:?}");
            let target = row["target"].as_u64().unwrap();
            let steps = row["steps"].as_array().unwrap();
            assert_eq!(steps.len() + 1, source.numbers);
            assert!(
                steps.last().is_none_or(|step| step.as_str().unwrap().ends_with(&format!(" = {target}"))),
                "{row:?}"
            );
            assert!((1..=u64::from(source.max_target)).contains(&target), "{row:?}");
            let nums = row["nums"].as_array().unwrap();
            assert_eq!(nums.len(), source.numbers);
            let range = u64::from(source.min_number)..=u64::from(source.max_number);
            assert!(nums.iter().all(|number| range.contains(&number.as_u64().unwrap())), "{row:?}");
        }
    }

    #[test]
    fn every_puzzle_is_solved_by_its_solution() {
        for numbers in 1..=6 {
            for operations in ["+-*/", "+-", "*/", "-", "+"] {
                let max_target = if operations == "+" { 600 } else { 99 };
                let operations = operations.to_owned();
                check_solved(&CountdownSource { size: 50, numbers, operations, max_target, ..source() });
            }
        }
    }

    #[test]
    fn families_take_turns() {
        let puzzles = CountdownSource { size: 9, ..source() }.generate_of(3..=4).unwrap();
        let lengths: Vec<_> = puzzles.rows().iter().map(|row| row["nums"].as_array().unwrap().len()).collect();
        assert_eq!(lengths, [3, 4, 3, 4, 3, 4, 3, 4, 3]);
        assert_eq!(source().generate_of(9..=9), Err(CountdownError::Numbers(9)));
        assert_eq!(source().generate_of(0..=usize::MAX).unwrap_err(), CountdownError::Numbers(0));
    }

    #[test]
    fn a_player_tries_until_a_hit_or_gives_up() {
        let rows =
            CountdownSource { size: 4000, numbers: 3, operations: "+-".to_owned(), ..source() }.generate().unwrap();
        let (mut decisions, mut gave_up) = (0, 0);
        for row in rows.rows() {
            let tries = row["tries"].as_array().unwrap();
            assert!(tries.len() <= MAX_TRIES, "{row:?}");
            let mut results = std::collections::HashSet::new();
            for (index, attempt) in tries.iter().enumerate() {
                let last_step = attempt["steps"].as_array().unwrap().last().unwrap().as_str().unwrap();
                let (_, result) = last_step.split_once(" = ").unwrap();
                assert!(results.insert(result.to_owned()), "{row:?}");
                let result = json!(result.parse::<u64>().unwrap());
                let columns =
                    Row::from_iter([("nums".to_owned(), row["nums"].clone()), ("target".to_owned(), result.clone())]);
                let answer = format!("<answer>{}</answer>", attempt["expression"].as_str().unwrap());
                assert_eq!(equation(&answer, &columns), Outcome::Score(1.0), "{row:?}");
                let hits = row["target"] == result;
                assert_eq!(attempt["hits"], json!(hits), "{row:?}");
                assert!(index + 1 == tries.len() || !hits, "{row:?}");
            }
            let gives_up = tries.len() < MAX_TRIES && tries.last().is_none_or(|last| last["hits"] == false);
            decisions += tries.len() + usize::from(gives_up);
            gave_up += usize::from(gives_up);
        }
        let share = gave_up as f64 / decisions as f64;
        assert!((share - 0.4).abs() < 0.03, "{share}");
    }

    /// `left` and `right` are `a operation b`, or a number where the operation is a space.
    #[track_caller]
    fn check_joined(left: char, operation: char, right: char, expect: &str) {
        let part = |a, inner, b| match Operation::from_char(inner) {
            Some(inner) => Expression::join(Expression::number(a), inner, Expression::number(b)).unwrap(),
            None => Expression::number(a),
        };
        let operation = Operation::from_char(operation).unwrap();
        let joined = Expression::join(part(60, left, 30), operation, part(2, right, 1)).unwrap();
        assert_eq!(joined.text, expect);
    }

    #[test]
    fn parentheses_are_only_where_they_are_needed() {
        check_joined(' ', '+', ' ', "60 + 2");
        check_joined('+', '+', '-', "60 + 30 + 2 - 1");
        check_joined('-', '-', '+', "60 - 30 - (2 + 1)");
        check_joined('+', '-', '-', "60 + 30 - (2 - 1)");
        check_joined('*', '-', '*', "60 * 30 - 2 * 1");
        check_joined('/', '+', '/', "60 / 30 + 2 / 1");
        check_joined('-', '*', '+', "(60 - 30) * (2 + 1)");
        check_joined('*', '*', '/', "60 * 30 * 2 / 1");
        check_joined('*', '/', '*', "60 * 30 / (2 * 1)");
        check_joined('+', '/', '/', "(60 + 30) / (2 / 1)");
        check_joined('+', '/', '-', "(60 + 30) / (2 - 1)");
        check_joined('/', '/', ' ', "60 / 30 / 2");
    }

    #[test]
    fn puzzles_depend_on_the_seed_and_not_on_the_size() {
        let make = |size, seed| CountdownSource { size, seed, ..source() }.generate().unwrap();
        assert_eq!(make(50, 1), make(50, 1));
        assert_eq!(make(50, 1).rows(), &make(80, 1).rows()[..50]);
        assert_ne!(make(50, 1), make(50, 2));
    }

    /// Puzzles are data that results refer to: the same seed must make them in every version.
    #[test]
    fn puzzles_are_fixed_for_ever() {
        let rows = CountdownSource { size: 2, numbers: 3, max_number: 20, ..source() }.generate().unwrap();
        let mut rows = rows.rows().to_vec();
        let tries: Vec<_> = rows.iter_mut().map(|row| row.remove("tries").unwrap()).collect();
        let expressions: Vec<_> = tries[0].as_array().unwrap().iter().map(|attempt| &attempt["expression"]).collect();
        let expect = ["17 + 13 * 4", "17 * (4 + 13)", "(13 - 4) * 17", "4 * (17 + 13)", "(4 + 17) * 13"];
        assert_eq!(expressions, expect);
        assert_eq!(
            json!(rows),
            json!([
                {"nums": [4, 13, 17], "target": 34, "solution": "4 + 17 + 13", "steps": ["17 + 13 = 30", "4 + 30 = 34"]},
                {"nums": [12, 12, 8], "target": 18, "solution": "12 * 12 / 8", "steps": ["12 * 12 = 144", "144 / 8 = 18"]},
            ])
        );
    }

    #[track_caller]
    fn check_refused(source: CountdownSource, message: &str) {
        let error = source.generate().unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn impossible_settings_are_refused() {
        check_refused(CountdownSource { numbers: 0, ..source() }, "1 to 8 numbers, got 0");
        check_refused(CountdownSource { numbers: 9, ..source() }, "1 to 8 numbers, got 9");
        check_refused(CountdownSource { min_number: 0, ..source() }, "got 0 to 99");
        check_refused(CountdownSource { min_number: 100, ..source() }, "got 100 to 99");
        check_refused(CountdownSource { operations: String::new(), ..source() }, "got \"\"");
        check_refused(CountdownSource { operations: "+^".to_owned(), ..source() }, "got \"+^\"");
        let sums = CountdownSource { min_number: 50, operations: "+".to_owned(), ..source() };
        check_refused(sums, "found no puzzle with 4 numbers from 50 to 99");
    }
}
