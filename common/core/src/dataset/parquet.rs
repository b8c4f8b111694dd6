//! Parquet files, column by column, into rows of JSON values.

use std::fs::File;
use std::path::Path;

use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::record_batch::{batch_rows, readable_columns};
use super::{ColumnMap, DatasetError, Row, rename_columns};

/// The rows of a file. Columns of types that JSON has no value for (binary, dates, decimals, ...) are left out, and are
/// an error where `columns` names them.
pub(super) fn read(path: &Path, columns: &ColumnMap) -> Result<Vec<Row>, DatasetError> {
    let unreadable = |reason: String| DatasetError::Unreadable { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| unreadable(error.to_string()))?;
    let readable = readable_columns(path, builder.schema().fields(), columns)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), readable);
    let reader = builder.with_projection(mask).build().map_err(|error| unreadable(error.to_string()))?;
    let mut rows = Vec::new();
    for batch in reader {
        for row in batch_rows(&batch.map_err(|error| unreadable(error.to_string()))?) {
            rows.push(rename_columns(row, columns, || path.display().to_string())?);
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use parquet::arrow::ArrowWriter;
    use parquet::basic::{Compression, ZstdLevel};
    use parquet::file::properties::WriterProperties;
    use serde_json::{Value, json};

    use super::*;
    use crate::dataset::record_batch::tests::{batch, batch_json};

    #[track_caller]
    fn check(compression: Compression, columns: &[(&str, &str)], expect: Result<Value, &str>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.parquet");
        let properties = WriterProperties::builder().set_compression(compression).build();
        let batch = batch();
        let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let columns = columns.iter().map(|&(ours, theirs)| (ours.to_owned(), theirs.to_owned())).collect();
        match (read(&path, &columns), expect) {
            (Ok(rows), Ok(expect)) => assert_eq!(json!(rows), expect),
            (Err(error), Err(message)) => assert!(error.to_string().contains(message), "{error}"),
            (outcome, expect) => panic!("{outcome:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn columns_become_json_values() {
        for compression in [Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default()), Compression::UNCOMPRESSED] {
            let mut expect = batch_json();
            for row in expect.as_array_mut().unwrap() {
                let target = row["target"].take();
                row.as_object_mut().unwrap().shift_remove("target");
                row["goal"] = target;
            }
            check(compression, &[("goal", "target")], Ok(expect));
        }
    }

    #[test]
    fn columns_that_cannot_be_had_are_named() {
        let none = Compression::UNCOMPRESSED;
        check(none, &[("picture", "image")], Err("column \"image\" has the type Binary"));
        check(none, &[("nums", "num")], Err("no column \"num\", which is to become \"nums\"; did you mean \"nums\"?"));
    }
}
