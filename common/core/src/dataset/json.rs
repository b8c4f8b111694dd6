//! One JSON object a line, or one list of objects.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use super::{ColumnMap, DatasetError, Row, rename_columns};

/// The rows of a file that is a list of objects, or else as [`read_lines`].
pub(super) fn read(path: &Path, columns: &ColumnMap) -> Result<Vec<Row>, DatasetError> {
    let unreadable = |reason: String| DatasetError::Unreadable { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut reader = BufReader::new(file);
    let head = reader.fill_buf().map_err(|error| unreadable(error.to_string()))?;
    if head.trim_ascii_start().first() != Some(&b'[') {
        return read_lines(path, columns);
    }
    let rows: Vec<Row> =
        serde_json::from_reader(reader).map_err(|error| unreadable(format!("not a list of JSON objects: {error}")))?;
    let origin = |index: usize| move || format!("{}, row {index} (from 0)", path.display());
    rows.into_iter().enumerate().map(|(index, row)| rename_columns(row, columns, origin(index))).collect()
}

/// The rows of a file, one a line. Blank lines are skipped.
pub(super) fn read_lines(path: &Path, columns: &ColumnMap) -> Result<Vec<Row>, DatasetError> {
    let file = File::open(path)
        .map_err(|error| DatasetError::Unreadable { path: path.to_owned(), reason: error.to_string() })?;
    let mut rows = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let bad_line = |reason: String| DatasetError::BadLine { path: path.to_owned(), line: index + 1, reason };
        let line = line.map_err(|error| bad_line(error.to_string()))?;
        if line.trim().is_empty() {
            continue;
        }
        let row = serde_json::from_str(&line).map_err(|error| bad_line(format!("not a JSON object: {error}")))?;
        rows.push(rename_columns(row, columns, || format!("{}:{}", path.display(), index + 1))?);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &[u8], expect: Result<usize, &str>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, text).unwrap();
        let columns = ColumnMap::new();
        match (read(&path, &columns), expect) {
            (Ok(rows), Ok(count)) => assert_eq!(rows.len(), count),
            (Err(error), Err(message)) => assert!(error.to_string().contains(message), "{error}"),
            (outcome, _) => panic!("{outcome:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn blank_lines_are_skipped() {
        check(b"{\"a\": 1}\n\n  \n{\"a\": 2}\r\n", Ok(2));
        check(b"", Ok(0));
    }

    #[test]
    fn bad_lines_are_named() {
        check(b"{\"a\": 1}\n{\"a\": \n", Err("rows.jsonl:2: not a JSON object: EOF"));
        check(b"{}\n[1, 2]\n", Err("rows.jsonl:2: not a JSON object: invalid type: sequence"));
        check(b"\n{} {}\n", Err("rows.jsonl:2: not a JSON object: trailing characters"));
        check(b"{\"a\": \"\xff\"}\n", Err("rows.jsonl:1: stream did not contain valid UTF-8"));
    }

    #[test]
    fn lists_are_read_as_well() {
        check(b" \n[{\"a\": 1},\n {\"a\": 2}]\n", Ok(2));
        check(b"[]", Ok(0));
        check(b"[{\"a\": 1},\n 2]", Err("rows.jsonl: not a list of JSON objects: invalid type: integer"));
        check(b"[{\"a\": 1}", Err("not a list of JSON objects: EOF"));
    }
}
