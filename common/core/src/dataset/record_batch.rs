//! Columns of Arrow's memory layout into rows of JSON values.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{
    DataType, Field, Fields, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use serde_json::Value;

use super::{ColumnMap, DatasetError, Row, check_columns};

/// The columns of a file that rows can hold, by their position. Those of types that JSON has no value for (binary, dates,
/// decimals, ...) are left out, and are an error where `columns` names them.
pub(super) fn readable_columns(path: &Path, fields: &Fields, columns: &ColumnMap) -> Result<Vec<usize>, DatasetError> {
    check_columns(fields.iter().map(|field| field.name().as_str()), columns, || path.display().to_string())?;
    let is_mapped = |field: &Field| columns.values().any(|name| name == field.name());
    if let Some(field) = fields.iter().find(|field| is_mapped(field) && !is_readable(field)) {
        return Err(DatasetError::UnsupportedColumn {
            path: path.to_owned(),
            column: field.name().clone(),
            kind: field.data_type().to_string(),
        });
    }
    Ok(fields.iter().enumerate().filter(|(_, field)| is_readable(field)).map(|(index, _)| index).collect())
}

fn is_readable(field: &Arc<Field>) -> bool {
    match field.data_type() {
        DataType::Null | DataType::Boolean | DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Float32 | DataType::Float64 => true,
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => is_readable(item),
        DataType::Struct(fields) => fields.iter().all(is_readable),
        other => other.is_integer(),
    }
}

pub(super) fn batch_rows(batch: &RecordBatch) -> Vec<Row> {
    let mut rows = vec![Row::new(); batch.num_rows()];
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        for (index, row) in rows.iter_mut().enumerate() {
            row.insert(field.name().clone(), value(column.as_ref(), index));
        }
    }
    rows
}

/// The value at `index` of an array whose type [`is_readable`]. Numbers that JSON lacks (infinities, NaN) are null.
fn value(array: &dyn Array, index: usize) -> Value {
    if array.is_null(index) {
        return Value::Null;
    }
    match array.data_type() {
        DataType::Boolean => array.as_boolean().value(index).into(),
        DataType::Utf8 => array.as_string::<i32>().value(index).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(index).into(),
        DataType::Utf8View => array.as_string_view().value(index).into(),
        DataType::Int8 => array.as_primitive::<Int8Type>().value(index).into(),
        DataType::Int16 => array.as_primitive::<Int16Type>().value(index).into(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(index).into(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(index).into(),
        DataType::UInt8 => array.as_primitive::<UInt8Type>().value(index).into(),
        DataType::UInt16 => array.as_primitive::<UInt16Type>().value(index).into(),
        DataType::UInt32 => array.as_primitive::<UInt32Type>().value(index).into(),
        DataType::UInt64 => array.as_primitive::<UInt64Type>().value(index).into(),
        DataType::Float32 => array.as_primitive::<Float32Type>().value(index).into(),
        DataType::Float64 => array.as_primitive::<Float64Type>().value(index).into(),
        DataType::List(_) => values(array.as_list::<i32>().value(index).as_ref()),
        DataType::LargeList(_) => values(array.as_list::<i64>().value(index).as_ref()),
        DataType::FixedSizeList(..) => values(array.as_fixed_size_list().value(index).as_ref()),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            fields.iter().zip(columns).map(|(field, column)| (field.name().clone(), value(column, index))).collect()
        }
        _ => Value::Null,
    }
}

fn values(array: &dyn Array) -> Value {
    (0..array.len()).map(|index| value(array, index)).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use arrow::array::{
        ArrayRef, BinaryArray, BooleanArray, Float64Array, Int64Array, ListArray, ListBuilder, StringArray,
        StringBuilder, StructArray, UInt8Array,
    };
    use serde_json::json;

    use super::*;

    /// Two rows; `target` and `nums` as in Jiayi-Pan/Countdown-Tasks-3to4.
    pub(in crate::dataset) fn batch() -> RecordBatch {
        let nums = ListArray::from_iter_primitive::<Int64Type, _, _>([
            Some(vec![Some(44), Some(19), Some(35)]),
            Some(vec![Some(63), Some(95), Some(96)]),
        ]);
        let mut tags = ListBuilder::new(StringBuilder::new());
        tags.append_value([Some("easy"), None]);
        tags.append_null();
        let turn = StructArray::from(vec![(
            Arc::new(Field::new("role", DataType::Utf8, false)),
            Arc::new(StringArray::from(vec!["user", "tool"])) as ArrayRef,
        )]);
        RecordBatch::try_from_iter([
            ("target", Arc::new(Int64Array::from(vec![98, 64])) as ArrayRef),
            ("nums", Arc::new(nums)),
            ("text", Arc::new(StringArray::from(vec![Some("é"), None]))),
            ("share", Arc::new(Float64Array::from(vec![0.5, f64::NAN]))),
            ("small", Arc::new(UInt8Array::from(vec![255, 0]))),
            ("flag", Arc::new(BooleanArray::from(vec![true, false]))),
            ("tags", Arc::new(tags.finish())),
            ("turn", Arc::new(turn)),
            ("image", Arc::new(BinaryArray::from(vec![&b"\xff"[..], b""]))),
        ])
        .unwrap()
    }

    /// What becomes of it.
    pub(in crate::dataset) fn batch_json() -> Value {
        json!([
            {"target": 98, "nums": [44, 19, 35], "text": "é", "share": 0.5, "small": 255, "flag": true,
             "tags": ["easy", null], "turn": {"role": "user"}},
            {"target": 64, "nums": [63, 95, 96], "text": null, "share": null, "small": 0, "flag": false,
             "tags": null, "turn": {"role": "tool"}},
        ])
    }
}
