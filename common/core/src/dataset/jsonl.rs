//! One JSON object a line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use super::{ColumnMap, DatasetError, Row, rename_columns};

/// The rows of a file. Blank lines are skipped.
pub(super) fn read(path: &Path, columns: &ColumnMap) -> Result<Vec<Row>, DatasetError> {
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
        match (read(&path, &ColumnMap::new()), expect) {
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
        check(b"[1, 2]\n", Err("rows.jsonl:1: not a JSON object: invalid type: sequence"));
        check(b"\n{} {}\n", Err("rows.jsonl:2: not a JSON object: trailing characters"));
        check(b"{\"a\": \"\xff\"}\n", Err("rows.jsonl:1: stream did not contain valid UTF-8"));
    }
}
