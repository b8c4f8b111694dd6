//! CSV and TSV files with a header line.
//!
//! A column is read as JSON where every cell that is not empty is a number, every one true or false (`True` and `False` as
//! well), or every one a list or an object. Otherwise it is text. An empty cell is null.

use std::path::Path;

use ::csv::{Reader, ReaderBuilder, StringRecord};
use serde_json::Value;

use super::{ColumnMap, DatasetError, Row, rename_columns};

/// What all cells of a column are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Number,
    Boolean,
    Nested,
    Text,
}

/// The rows of a file.
pub(super) fn read(path: &Path, delimiter: u8, columns: &ColumnMap) -> Result<Vec<Row>, DatasetError> {
    let unreadable = |error: ::csv::Error| DatasetError::Unreadable { path: path.to_owned(), reason: reason(&error) };
    let mut reader = ReaderBuilder::new().delimiter(delimiter).from_path(path).map_err(unreadable)?;
    let names = names(path, &mut reader)?;
    let records = reader.records().collect::<Result<Vec<StringRecord>, _>>().map_err(unreadable)?;
    let kinds: Vec<Kind> = (0..names.len())
        .map(|column| kind(records.iter().map(|record| &record[column]).filter(|cell| !cell.is_empty())))
        .collect();
    let row = |record: &StringRecord| {
        let cells = record.iter().zip(&kinds).map(|(cell, &kind)| value(cell, kind));
        rename_columns(names.iter().cloned().zip(cells).collect(), columns, || path.display().to_string())
    };
    records.iter().map(row).collect()
}

fn names(path: &Path, reader: &mut Reader<std::fs::File>) -> Result<Vec<String>, DatasetError> {
    let bad = |reason: String| DatasetError::Unreadable { path: path.to_owned(), reason };
    let header = reader.headers().map_err(|error| bad(reason(&error)))?;
    let names: Vec<String> = header.iter().map(|name| name.trim().to_owned()).collect();
    for (index, name) in names.iter().enumerate() {
        if name.is_empty() {
            return Err(bad(format!("column {} has no name in the header line", index + 1)));
        }
        if names[..index].contains(name) {
            return Err(bad(format!("the header line has the column {name:?} twice")));
        }
    }
    Ok(names)
}

/// The error without the words that name its type.
fn reason(error: &::csv::Error) -> String {
    error.to_string().trim_start_matches("CSV error: ").to_owned()
}

fn kind<'a>(mut cells: impl Iterator<Item = &'a str>) -> Kind {
    let Some(first) = cells.next().map(kind_of) else { return Kind::Text };
    if cells.all(|cell| kind_of(cell) == first) { first } else { Kind::Text }
}

fn kind_of(cell: &str) -> Kind {
    match json(cell) {
        Some(Value::Number(_)) => Kind::Number,
        Some(Value::Bool(_)) => Kind::Boolean,
        Some(Value::Array(_) | Value::Object(_)) => Kind::Nested,
        _ => Kind::Text,
    }
}

fn json(cell: &str) -> Option<Value> {
    match cell {
        "True" => Some(true.into()),
        "False" => Some(false.into()),
        _ => serde_json::from_str(cell).ok(),
    }
}

fn value(cell: &str, kind: Kind) -> Value {
    if cell.is_empty() {
        return Value::Null;
    }
    match json(cell) {
        Some(value) if kind != Kind::Text => value,
        _ => cell.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(text: &[u8], columns: &[(&str, &str)], expect: Result<Value, &str>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        std::fs::write(&path, text).unwrap();
        let columns = columns.iter().map(|&(ours, theirs)| (ours.to_owned(), theirs.to_owned())).collect();
        match (read(&path, b',', &columns), expect) {
            (Ok(rows), Ok(expect)) => assert_eq!(json!(rows), expect),
            (Err(error), Err(expect)) => assert!(error.to_string().contains(expect), "{error}"),
            (outcome, expect) => panic!("{outcome:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn columns_of_one_kind_are_typed_and_others_are_text() {
        check(
            b"\xef\xbb\xbfid,share,flag,nums,code,mixed\n1,0.5,True,\"[1, 2]\",007,1\n-2,1e3,false,[],12,x\n3,,,,,\n",
            &[],
            Ok(json!([
                {"id": 1, "share": 0.5, "flag": true, "nums": [1, 2], "code": "007", "mixed": "1"},
                {"id": -2, "share": 1000.0, "flag": false, "nums": [], "code": "12", "mixed": "x"},
                {"id": 3, "share": null, "flag": null, "nums": null, "code": null, "mixed": null},
            ])),
        );
        check(
            b"q,a\n\"two\nlines, \"\"quoted\"\"\",[asy]\n",
            &[("question", "q")],
            Ok(json!([
                {"question": "two\nlines, \"quoted\"", "a": "[asy]"},
            ])),
        );
        check(b"a,b\r\n", &[], Ok(json!([])));
    }

    #[test]
    fn files_that_cannot_be_read_say_why() {
        check(b"a,b\n1,2\n1,2,3\n", &[], Err("rows.csv: record 2 (line: 3, byte: 8): found record with 3 fields"));
        check(b"a,a\n1,2\n", &[], Err("has the column \"a\" twice"));
        check(b"a,,c\n1,2,3\n", &[], Err("column 2 has no name"));
        check(b"a\n\xff\n", &[], Err("invalid UTF-8"));
        check(b"answer\n1\n", &[("target", "anser")], Err("did you mean \"answer\"?"));
    }
}
