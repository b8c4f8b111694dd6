//! Which rows of a data set are used, in which order.

use std::collections::HashSet;

use minijinja::value::Serde;
use minijinja::{Environment, Value};

use super::{Dataset, permutation};
use crate::jinja::{self, Dialect};
use crate::nearest::hint;

/// A Jinja expression over a row's columns, such as `nums | length == 4 and level in [3, 4, 5]`.
#[derive(Debug, Clone)]
pub struct Filter {
    environment: Environment<'static>,
    text: String,
}

/// What was asked for of a data set.
#[derive(Debug, Clone, PartialEq)]
pub struct Selected {
    pub dataset: Dataset,
    /// `[rows]`, where each was in what was read.
    pub numbers: Vec<usize>,
    pub num_read: usize,
    /// Rows that the filter left out.
    pub num_filtered: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    #[error("the filter is malformed: {0}")]
    Malformed(minijinja::Error),
    #[error("the filter names {name:?}, which no row has; the columns are {columns:?}{hint}")]
    UnknownColumn { name: String, columns: Vec<String>, hint: String },
    #[error("the filter failed for row {row} (from 0): {reason}")]
    Failed { row: usize, reason: minijinja::Error },
    #[error("the filter leaves none of {0} rows")]
    NoneLeft(usize),
    #[error("take asks for {wanted} rows, and there are {there}")]
    TooFew { wanted: usize, there: usize },
    #[error("{0} rows are too many to shuffle")]
    TooMany(usize),
}

impl Filter {
    /// # Errors
    /// Texts that are no Jinja expressions.
    pub fn new(text: &str) -> Result<Self, SelectError> {
        let environment = jinja::environment(Dialect::Prompt).map_err(SelectError::Malformed)?;
        environment.compile_expression(text).map_err(SelectError::Malformed)?;
        Ok(Self { environment, text: text.to_owned() })
    }

    /// The numbers of the rows for which it is true.
    ///
    /// # Errors
    /// Names of columns that no row has, and expressions that fail for a row.
    pub fn kept(&self, dataset: &Dataset) -> Result<Vec<usize>, SelectError> {
        let expression = self.environment.compile_expression(&self.text).map_err(SelectError::Malformed)?;
        let columns: HashSet<&str> = dataset.rows().iter().flat_map(|row| row.keys().map(String::as_str)).collect();
        let is_global = |name: &str| self.environment.globals().any(|(global, _)| global == name);
        let unknown = |name: &String| !columns.contains(name.as_str()) && !is_global(name);
        if let Some(name) = expression.undeclared_variables(false).into_iter().filter(unknown).min() {
            let mut columns: Vec<String> = columns.iter().map(|&column| column.to_owned()).collect();
            columns.sort();
            let hint = hint(&name, columns.iter().map(String::as_str));
            return Err(SelectError::UnknownColumn { name, columns, hint });
        }
        let mut kept = Vec::new();
        for (number, row) in dataset.rows().iter().enumerate() {
            let verdict = expression.eval(Value::from(Serde(row)));
            if verdict.map_err(|reason| SelectError::Failed { row: number, reason })?.is_true() {
                kept.push(number);
            }
        }
        Ok(kept)
    }
}

impl Dataset {
    /// The rows that `filter` leaves, in the order of `datasets.Dataset.shuffle(seed=shuffle_seed)` where there is a seed,
    /// of which the first `take`.
    ///
    /// # Errors
    /// Filters that cannot be applied or leave nothing, and fewer rows than `take`.
    pub fn select(
        self,
        filter: Option<&str>,
        shuffle_seed: Option<u64>,
        take: Option<usize>,
    ) -> Result<Selected, SelectError> {
        let num_read = self.len();
        let mut numbers = match filter {
            Some(filter) => Filter::new(filter)?.kept(&self)?,
            None => (0..num_read).collect(),
        };
        let num_filtered = num_read - numbers.len();
        if numbers.is_empty() && num_read > 0 {
            return Err(SelectError::NoneLeft(num_read));
        }
        if let Some(seed) = shuffle_seed {
            let len = u32::try_from(numbers.len()).map_err(|_| SelectError::TooMany(numbers.len()))?;
            numbers = permutation(seed, len).into_iter().map(|index| numbers[index as usize]).collect();
        }
        if let Some(wanted) = take {
            let there = numbers.len();
            if wanted > there {
                return Err(SelectError::TooFew { wanted, there });
            }
            numbers.truncate(wanted);
        }
        let mut rows: Vec<_> = self.rows.into_iter().map(Some).collect();
        let rows = numbers.iter().filter_map(|&number| rows[number].take()).collect();
        Ok(Selected { dataset: Self { rows }, numbers, num_read, num_filtered })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn dataset() -> Dataset {
        let row = |id: usize| json!({"id": id, "nums": vec![1; id % 3 + 2], "level": id % 5, "text": "a{{ b"});
        Dataset::new((0..30).map(|id| row(id).as_object().unwrap().clone()).collect())
    }

    #[track_caller]
    fn check(filter: &str, expect: Result<&[usize], &str>) {
        match (dataset().select(Some(filter), None, None), expect) {
            (Ok(selected), Ok(expect)) => {
                assert_eq!(selected.numbers, expect);
                assert_eq!((selected.num_read, selected.num_filtered), (30, 30 - expect.len()));
                let ids: Vec<_> =
                    selected.dataset.rows().iter().map(|row| row["id"].as_u64().unwrap() as usize).collect();
                assert_eq!(ids, expect);
            }
            (Err(error), Err(expect)) => assert!(error.to_string().contains(expect), "{error}"),
            (outcome, _) => panic!("{outcome:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn a_filter_is_an_expression_over_columns() {
        check("nums | length == 4 and level in [3, 4]", Ok(&[8, 14, 23, 29]));
        check("id < 3 and text.startswith('a{{')", Ok(&[0, 1, 2]));
        check("id > 27", Ok(&[28, 29]));
        check("lenght == 4", Err("names \"lenght\", which no row has; the columns are [\"id\", \"level\","));
        check("levle == 4", Err("; did you mean \"level\"?"));
        check("nums | length ==", Err("the filter is malformed: syntax error"));
        check("id // 0 == 1", Err("the filter failed for row 0 (from 0)"));
        check("level > 7", Err("the filter leaves none of 30 rows"));
    }

    #[test]
    fn a_column_that_some_rows_lack_is_undefined_there() {
        let rows = [json!({"a": 1}), json!({"b": 2})].map(|row| row.as_object().unwrap().clone());
        let kept = |filter| Filter::new(filter).unwrap().kept(&Dataset::new(rows.to_vec())).unwrap();
        assert_eq!(kept("b is defined and b == 2"), [1]);
        assert_eq!(kept("b is not defined"), [0]);
    }

    #[test]
    fn rows_are_filtered_then_shuffled_then_taken() {
        let selected = dataset().select(Some("id >= 20"), Some(42), Some(4)).unwrap();
        let expect: Vec<usize> = permutation(42, 10)[..4].iter().map(|&index| 20 + index as usize).collect();
        assert_eq!(selected.numbers, expect);
        assert_eq!(dataset().select(None, None, Some(3)).unwrap().numbers, [0, 1, 2]);
        let error = dataset().select(Some("id >= 20"), None, Some(11)).unwrap_err().to_string();
        assert_eq!(error, "take asks for 11 rows, and there are 10");
    }
}
