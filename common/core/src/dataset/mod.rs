//! Data sets: rows of named JSON values, from files or made on the spot.

mod countdown;
mod jsonl;
mod parquet;
mod split;
mod splitmix;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use countdown::{CountdownError, CountdownSource};
pub use split::{is_held_out, question_id};
pub use splitmix::SplitMix64;

use crate::nearest::hint;

/// One example: column names to values.
pub type Row = Map<String, Value>;

/// Our column name to the data set's, where they differ.
pub type ColumnMap = BTreeMap<String, String>;

/// Rows in the order of their source.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Dataset {
    rows: Vec<Row>,
}

#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("cannot read the data set {path}: {reason}", path = path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{path}:{line}: {reason}", path = path.display())]
    BadLine { path: PathBuf, line: usize, reason: String },
    #[error("{path}: column {column:?} has the type {kind}, which rows cannot hold", path = path.display())]
    UnsupportedColumn { path: PathBuf, column: String, kind: String },
    #[error(
        "{origin} has no column {missing:?}, which is to become {ours:?}{hint}; its columns are {columns:?}; \
         correct the column mapping"
    )]
    MissingColumn { origin: String, missing: String, ours: String, columns: Vec<String>, hint: String },
    #[error(
        "{origin} has both a column {ours:?} and a column {theirs:?} that is to become {ours:?}; map one of them away"
    )]
    AmbiguousColumn { origin: String, ours: String, theirs: String },
    #[error("{path} holds no rows", path = path.display())]
    Empty { path: PathBuf },
}

impl Dataset {
    #[must_use]
    pub fn new(rows: Vec<Row>) -> Self {
        Self { rows }
    }

    /// Reads a `.jsonl`, `.json` (one object a line) or `.parquet` file, or every such file of a folder in the order
    /// of their names, and gives the columns our names. Columns that `columns` does not name keep theirs.
    ///
    /// # Errors
    /// Unreadable files, lines that are no JSON object, mapped columns that are missing or of a type that JSON cannot
    /// hold, and data sets without rows.
    pub fn load(path: &Path, columns: &ColumnMap) -> Result<Self, DatasetError> {
        let mut rows = Vec::new();
        for file in data_files(path)? {
            match extension(&file) {
                Some("parquet") => rows.extend(parquet::read(&file, columns)?),
                _ => rows.extend(jsonl::read(&file, columns)?),
            }
        }
        if rows.is_empty() {
            return Err(DatasetError::Empty { path: path.to_owned() });
        }
        Ok(Self { rows })
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    #[must_use]
    pub fn get(&self, index: usize) -> Option<&Row> {
        self.rows.get(index)
    }

    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Another order of the rows, the same for equal seeds on every platform.
    pub fn shuffle(&mut self, seed: u64) {
        split::shuffle(&mut self.rows, seed);
    }

    /// The rows to train on and those held out, `fraction` of them on average, each in their present order.
    #[must_use]
    pub fn split(self, fraction: f64) -> (Self, Self) {
        let (held_out, train) = self.rows.into_iter().partition(|row| is_held_out(row, fraction));
        (Self { rows: train }, Self { rows: held_out })
    }
}

fn data_files(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let unreadable =
        |error: std::io::Error| DatasetError::Unreadable { path: path.to_owned(), reason: error.to_string() };
    if !std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        return match extension(path) {
            Some(_) => Ok(vec![path.to_owned()]),
            None => Err(DatasetError::Unreadable {
                path: path.to_owned(),
                reason: "its name must end in .jsonl, .json or .parquet".to_owned(),
            }),
        };
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        files.push(entry.map_err(unreadable)?.path());
    }
    // A folder may hold other JSON beside the data, such as dataset_infos.json.
    files.retain(|file| matches!(extension(file), Some("jsonl" | "parquet")));
    files.sort();
    if files.is_empty() {
        return Err(DatasetError::Unreadable {
            path: path.to_owned(),
            reason: "the folder holds no .jsonl or .parquet file".to_owned(),
        });
    }
    Ok(files)
}

fn extension(path: &Path) -> Option<&str> {
    path.extension()
        .and_then(|extension| extension.to_str())
        .filter(|name| matches!(*name, "jsonl" | "json" | "parquet"))
}

/// Renames the data set's columns to ours. `origin` says in messages where the row is from.
fn rename_columns(row: Row, columns: &ColumnMap, origin: impl Fn() -> String) -> Result<Row, DatasetError> {
    if columns.is_empty() {
        return Ok(row);
    }
    check_columns(row.keys().map(String::as_str), columns, origin)?;
    let ours: BTreeMap<&str, &str> = columns.iter().map(|(ours, theirs)| (theirs.as_str(), ours.as_str())).collect();
    Ok(row
        .into_iter()
        .map(|(name, value)| (ours.get(name.as_str()).map_or(name, |&ours| ours.to_owned()), value))
        .collect())
}

/// Whether every mapped column exists, and no column that stays has a name that a mapped one gets.
fn check_columns<'a>(
    existing: impl Iterator<Item = &'a str> + Clone,
    columns: &ColumnMap,
    origin: impl Fn() -> String,
) -> Result<(), DatasetError> {
    for (ours, theirs) in columns {
        if !existing.clone().any(|name| name == theirs) {
            return Err(DatasetError::MissingColumn {
                origin: origin(),
                missing: theirs.clone(),
                ours: ours.clone(),
                columns: existing.clone().map(str::to_owned).collect(),
                hint: hint(theirs, existing.clone()),
            });
        }
        let is_kept = |name: &str| name == ours && !columns.values().any(|mapped| mapped == name);
        if existing.clone().any(is_kept) {
            return Err(DatasetError::AmbiguousColumn { origin: origin(), ours: ours.clone(), theirs: theirs.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(value: Value) -> Row {
        value.as_object().unwrap().clone()
    }

    fn mapping(pairs: &[(&str, &str)]) -> ColumnMap {
        pairs.iter().map(|&(ours, theirs)| (ours.to_owned(), theirs.to_owned())).collect()
    }

    #[track_caller]
    fn check(input: Value, pairs: &[(&str, &str)], expect: Result<Value, &str>) {
        let renamed = rename_columns(row(input), &mapping(pairs), || "x.jsonl:1".to_owned());
        let expect = expect.map(row).map_err(str::to_owned);
        assert_eq!(renamed.map_err(|error| error.to_string()), expect);
    }

    #[test]
    fn mapped_columns_are_renamed_and_others_stay() {
        let input = json!({"answer": 6, "numbers": [1, 2], "id": "a"});
        check(
            input.clone(),
            &[("target", "answer"), ("nums", "numbers")],
            Ok(json!({"target": 6, "nums": [1, 2], "id": "a"})),
        );
        check(input.clone(), &[], Ok(input.clone()));
        // Two columns may swap their names.
        check(input, &[("id", "answer"), ("answer", "id")], Ok(json!({"id": 6, "numbers": [1, 2], "answer": "a"})));
    }

    #[test]
    fn missing_columns_are_named_with_the_nearest() {
        check(
            json!({"answer": 6, "numbers": [1, 2]}),
            &[("nums", "number")],
            Err(
                "x.jsonl:1 has no column \"number\", which is to become \"nums\"; did you mean \"numbers\"?; its columns \
                 are [\"answer\", \"numbers\"]; correct the column mapping",
            ),
        );
        check(
            json!({"target": 6, "answer": 7}),
            &[("target", "answer")],
            Err(
                "x.jsonl:1 has both a column \"target\" and a column \"answer\" that is to become \"target\"; map one of \
                 them away",
            ),
        );
    }

    #[test]
    fn a_folder_is_read_in_the_order_of_its_names() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("b.jsonl"), "{\"n\": 2}\n").unwrap();
        std::fs::write(folder.path().join("a.jsonl"), "{\"n\": 1}\n\n{\"n\": 3}").unwrap();
        std::fs::write(folder.path().join("README.md"), "none").unwrap();
        let dataset = Dataset::load(folder.path(), &ColumnMap::new()).unwrap();
        let numbers: Vec<_> = dataset.rows().iter().map(|row| row["n"].as_i64().unwrap()).collect();
        assert_eq!(numbers, [1, 3, 2]);
        assert_eq!((dataset.len(), dataset.get(3)), (3, None));
    }

    #[test]
    fn unreadable_paths_say_why() {
        let folder = tempfile::tempdir().unwrap();
        let message = |name: &str| Dataset::load(&folder.path().join(name), &ColumnMap::new()).unwrap_err().to_string();
        assert!(message("").contains("no .jsonl or .parquet file"));
        assert!(message("missing.jsonl").contains("No such file"), "{}", message("missing.jsonl"));
        std::fs::write(folder.path().join("data.csv"), "a,b").unwrap();
        assert!(message("data.csv").contains("must end in .jsonl, .json or .parquet"));
        std::fs::write(folder.path().join("empty.jsonl"), "\n").unwrap();
        assert!(message("empty.jsonl").contains("holds no rows"));
        std::fs::write(folder.path().join("torn.parquet"), "PAR1").unwrap();
        assert!(message("torn.parquet").contains("torn.parquet"));
    }
}
