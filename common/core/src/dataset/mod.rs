//! Data sets: rows of named JSON values, from files or made on the spot.

mod arrow_file;
mod card;
mod countdown;
mod csv;
mod folder;
mod glob;
mod json;
mod mixture;
mod numpy_random;
mod parquet;
mod record_batch;
mod saved;
mod select;
mod split;
mod splitmix;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use countdown::{CountdownError, CountdownSource};
pub use folder::Part;
pub use mixture::Mixture;
pub use numpy_random::permutation;
pub use select::{Filter, SelectError, Selected};
pub use split::{is_held_out, question_id};
pub use splitmix::SplitMix64;

use crate::nearest::hint;
use folder::Format;

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
    #[error("{path} has no {what} {wanted:?}; it has {there:?}{hint}", path = path.display())]
    NoSuchPart { path: PathBuf, what: &'static str, wanted: String, there: Vec<String>, hint: String },
    #[error("{path} has several {what}s, {there:?}: set {what} to one of them", path = path.display())]
    SeveralParts { path: PathBuf, what: &'static str, there: Vec<String> },
}

impl Dataset {
    #[must_use]
    pub fn new(rows: Vec<Row>) -> Self {
        Self { rows }
    }

    /// Reads a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` file, or those of a folder that hold `part` of a
    /// data set, in the order of their names, and gives the columns our names. Columns that `columns` does not name keep
    /// theirs.
    ///
    /// A folder may be what `huggingface-cli download` or `datasets.save_to_disk` leaves.
    ///
    /// # Errors
    /// Unreadable files, parts that there are not, rows that are no JSON object, mapped columns that are missing or of a
    /// type that JSON cannot hold, and data sets without rows.
    pub fn load(path: &Path, part: Part<'_>, columns: &ColumnMap) -> Result<Self, DatasetError> {
        let mut rows = Vec::new();
        for file in folder::data_files(path, part)? {
            rows.extend(match Format::of(&file) {
                Some(Format::Parquet) => parquet::read(&file, columns)?,
                Some(Format::Arrow) => arrow_file::read(&file, columns)?,
                Some(Format::Csv) => csv::read(&file, b',', columns)?,
                Some(Format::Tsv) => csv::read(&file, b'\t', columns)?,
                Some(Format::Json) => json::read(&file, columns)?,
                Some(Format::JsonLines) | None => json::read_lines(&file, columns)?,
            });
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
        let dataset = Dataset::load(folder.path(), Part::default(), &ColumnMap::new()).unwrap();
        let numbers: Vec<_> = dataset.rows().iter().map(|row| row["n"].as_i64().unwrap()).collect();
        assert_eq!(numbers, [1, 3, 2]);
        assert_eq!((dataset.len(), dataset.get(3)), (3, None));
    }

    #[test]
    fn unreadable_paths_say_why() {
        let folder = tempfile::tempdir().unwrap();
        let message = |name: &str| {
            Dataset::load(&folder.path().join(name), Part::default(), &ColumnMap::new()).unwrap_err().to_string()
        };
        assert!(message("").contains("holds no .jsonl, .json, .csv, .tsv, .parquet or .arrow file"));
        assert!(message("missing.jsonl").contains("No such file"), "{}", message("missing.jsonl"));
        std::fs::write(folder.path().join("data.xml"), "<a/>").unwrap();
        assert!(message("data.xml").contains("must end in .jsonl, .json, .csv, .tsv, .parquet or .arrow"));
        std::fs::write(folder.path().join("empty.jsonl"), "\n").unwrap();
        assert!(message("empty.jsonl").contains("holds no rows"));
        std::fs::write(folder.path().join("torn.parquet"), "PAR1").unwrap();
        assert!(message("torn.parquet").contains("torn.parquet"));
    }

    #[test]
    fn what_save_to_disk_writes_is_read_by_split() {
        let folder = tempfile::tempdir().unwrap();
        let batch = record_batch::tests::batch();
        for split in ["train", "test"] {
            let split_folder = folder.path().join(split);
            std::fs::create_dir(&split_folder).unwrap();
            let state = json!({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split});
            std::fs::write(split_folder.join("state.json"), state.to_string()).unwrap();
            let file = std::fs::File::create(split_folder.join("data-00000-of-00001.arrow")).unwrap();
            let mut writer = arrow::ipc::writer::StreamWriter::try_new(file, &batch.schema()).unwrap();
            writer.write(&if split == "train" { batch.clone() } else { batch.slice(1, 1) }).unwrap();
            writer.finish().unwrap();
        }
        std::fs::write(folder.path().join("dataset_dict.json"), r#"{"splits": ["train", "test"]}"#).unwrap();
        let targets = |split: Option<&str>| {
            let dataset = Dataset::load(folder.path(), Part { split, subset: None }, &ColumnMap::new()).unwrap();
            dataset.rows().iter().map(|row| row["target"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!((targets(None), targets(Some("test"))), (vec![98, 64], vec![64]));
    }

    #[test]
    fn formats_are_told_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let rows = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            json!(Dataset::load(&path, Part::default(), &ColumnMap::new()).unwrap().rows())
        };
        let expect = json!([{"target": 3, "nums": [1, 2]}]);
        assert_eq!(rows("a.jsonl", "{\"target\": 3, \"nums\": [1, 2]}\n"), expect);
        assert_eq!(rows("a.json", "[{\"target\": 3,\n\"nums\": [1, 2]}]"), expect);
        assert_eq!(rows("a.csv", "target,nums\n3,\"[1, 2]\"\n"), expect);
        assert_eq!(rows("a.tsv", "target\tnums\n3\t[1, 2]\n"), expect);
    }
}
