//! Arrow files, streams or whole: what `datasets.save_to_disk` writes.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::ipc::reader::{FileReader, StreamReader};

use super::record_batch::{batch_rows, readable_columns};
use super::{ColumnMap, DatasetError, Row, rename_columns};

/// What a file begins with that is no stream.
const FILE_MAGIC: &[u8] = b"ARROW1";

/// The rows of a file. Columns of types that JSON has no value for are left out, as for Parquet.
pub(super) fn read(path: &Path, columns: &ColumnMap) -> Result<Vec<Row>, DatasetError> {
    let unreadable = |reason: String| DatasetError::Unreadable { path: path.to_owned(), reason };
    let batches = open(path).map_err(|error| unreadable(error.to_string()))?;
    let readable = readable_columns(path, batches.schema().fields(), columns)?;
    let mut rows = Vec::new();
    for batch in batches {
        let batch = batch.and_then(|batch| batch.project(&readable)).map_err(|error| unreadable(error.to_string()))?;
        for row in batch_rows(&batch) {
            rows.push(rename_columns(row, columns, || path.display().to_string())?);
        }
    }
    Ok(rows)
}

/// Batches of either form.
enum Batches {
    File(FileReader<BufReader<File>>),
    Stream(StreamReader<BufReader<File>>),
}

fn open(path: &Path) -> Result<Batches, ArrowError> {
    let mut file = BufReader::new(File::open(path)?);
    let mut head = Vec::new();
    file.by_ref().take(FILE_MAGIC.len() as u64).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    if head == FILE_MAGIC {
        return FileReader::try_new(file, None).map(Batches::File);
    }
    StreamReader::try_new(file, None).map(Batches::Stream)
}

impl Batches {
    fn schema(&self) -> SchemaRef {
        match self {
            Self::File(reader) => reader.schema(),
            Self::Stream(reader) => reader.schema(),
        }
    }
}

impl Iterator for Batches {
    type Item = Result<RecordBatch, ArrowError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::File(reader) => reader.next(),
            Self::Stream(reader) => reader.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow::ipc::writer::{FileWriter, StreamWriter};
    use serde_json::json;

    use super::*;
    use crate::dataset::record_batch::tests::{batch, batch_json};

    fn check(write: impl FnOnce(File)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.arrow");
        write(File::create(&path).unwrap());
        assert_eq!(json!(read(&path, &ColumnMap::new()).unwrap()), batch_json());
        let missing = ColumnMap::from([("nums".to_owned(), "num".to_owned())]);
        let error = read(&path, &missing).unwrap_err().to_string();
        assert!(error.contains("did you mean \"nums\"?"), "{error}");
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 3, bytes.len() / 3] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let error = read(&path, &ColumnMap::new()).unwrap_err().to_string();
            assert!(error.contains("data.arrow"), "{error}");
        }
    }

    #[test]
    fn both_forms_become_json_values() {
        check(|file| {
            let mut writer = StreamWriter::try_new(file, &batch().schema()).unwrap();
            writer.write(&batch()).unwrap();
            writer.finish().unwrap();
        });
        check(|file| {
            let mut writer = FileWriter::try_new(file, &batch().schema()).unwrap();
            writer.write(&batch()).unwrap();
            writer.finish().unwrap();
        });
    }
}
