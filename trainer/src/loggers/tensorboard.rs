//! TensorBoard event files: records framed as TFRecord does, each a protobuf message of `tensorflow/core/util/event.proto`.
//!
//! Only the fields that scalars and text need are declared.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use prost::Message;

use super::error::{IoContext, LoggerError};
use super::metrics::Metrics;

/// One `events.out.tfevents.*` file, written by one process.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `dir`, which TensorBoard reads together with those of earlier processes. On resume, it makes
    /// TensorBoard forget what those files say about later steps.
    pub(super) fn create(dir: &Path, resume_from: Option<u64>) -> Result<Self, LoggerError> {
        let now = now();
        let name = format!("events.out.tfevents.{}.{}.{}", now.as_secs(), host_name(), std::process::id());
        let (path, file) = create_numbered(dir, &name)?;
        let mut events = Self { path, file };
        events.write(0, Event { file_version: Some("brain.Event:2".to_owned()), ..Event::default() })?;
        if let Some(last) = resume_from {
            let session_log = Some(SessionLog { status: SESSION_START });
            events.write(last + 1, Event { session_log, ..Event::default() })?;
        }
        Ok(events)
    }

    /// Every metric of a step, under `train/` as the Hugging Face trainer does; `eval_x` becomes `eval/x`, and `eval/x` stays.
    pub(super) fn scalars(&mut self, step: u64, metrics: &Metrics) -> Result<(), LoggerError> {
        let value = |(name, value): (&str, f64)| Value {
            tag: match name.strip_prefix("eval_").or_else(|| name.strip_prefix("eval/")) {
                Some(name) => format!("eval/{name}"),
                None => format!("train/{name}"),
            },
            simple_value: Some(value as f32),
            ..Value::default()
        };
        self.summary(step, metrics.iter().map(value).collect())
    }

    /// A Markdown text, shown in the Text tab.
    pub(super) fn text(&mut self, step: u64, tag: &str, markdown: &str) -> Result<(), LoggerError> {
        let plugin = PluginData { plugin_name: "text".to_owned() };
        let tensor = TensorProto {
            dtype: DT_STRING,
            tensor_shape: Some(TensorShape { dim: vec![Dim { size: 1 }] }),
            string_val: vec![markdown.as_bytes().to_vec()],
        };
        let metadata = SummaryMetadata { plugin_data: Some(plugin), data_class: DATA_CLASS_TENSOR };
        let tag = format!("{tag}/text_summary");
        self.summary(step, vec![Value { tag, tensor: Some(tensor), metadata: Some(metadata), ..Value::default() }])
    }

    pub(super) fn sync(self) -> Result<(), LoggerError> {
        self.file.sync_all().at(&self.path, "sync")
    }

    fn summary(&mut self, step: u64, value: Vec<Value>) -> Result<(), LoggerError> {
        self.write(step, Event { summary: Some(Summary { value }), ..Event::default() })
    }

    fn write(&mut self, step: u64, event: Event) -> Result<(), LoggerError> {
        let event = Event { wall_time: now().as_secs_f64(), step: step as i64, ..event };
        self.file.write_all(&framed(&event.encode_to_vec())).at(&self.path, "append to")
    }
}

/// `length | crc(length) | data | crc(data)`, little-endian.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// CRC-32C, rotated and offset because a CRC over bytes that hold CRCs is weak.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// `NAME.0`, or the next number if this process already has one from the same second.
fn create_numbered(dir: &Path, name: &str) -> Result<(PathBuf, File), LoggerError> {
    let mut number = 0;
    loop {
        let path = dir.join(format!("{name}.{number}"));
        match File::create_new(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            created => return created.at(&path, "create").map(|file| (path, file)),
        }
    }
}

fn now() -> Duration {
    // Before 1970 only with a broken clock, which is no reason to stop a run.
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String =
        name.trim().chars().filter(|char| char.is_ascii_alphanumeric() || "-_.".contains(*char)).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

/// `DT_STRING` of TensorFlow's `DataType`.
const DT_STRING: i32 = 7;
/// `DATA_CLASS_TENSOR` of TensorFlow's `DataClass`.
const DATA_CLASS_TENSOR: i32 = 2;
/// `START` of TensorFlow's `SessionLog.SessionStatus`: events from its step on replace those of earlier files.
const SESSION_START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    // The rest is a oneof.
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// Optional, because a zero must be written too.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "8")]
    tensor: Option<TensorProto>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<SummaryMetadata>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    tensor_shape: Option<TensorShape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorShape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryMetadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
    #[prost(int32, tag = "4")]
    data_class: i32,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every event of a file, its frames and checksums verified.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut take = |count: usize| -> Option<&[u8]> { rest.split_off(..count) };
        let mut events = Vec::new();
        while let Some(length) = take(8) {
            let size = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            assert_eq!(take(4).unwrap(), masked_crc(length));
            let data = take(size).unwrap();
            assert_eq!(take(4).unwrap(), masked_crc(data));
            events.push(Event::decode(data).unwrap());
        }
        events
    }

    #[test]
    fn checksums_are_those_of_tfrecord() {
        // The header of a 24-byte record, as TensorFlow writes it: the length and its masked CRC.
        assert_eq!(framed(&[0; 24])[..12], [0x18, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn scalars_and_text_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(dir.path(), None).unwrap();
        let metrics = [("reward", 0.25), ("kl", 0.0), ("eval_accuracy", 0.5), ("eval/x/y", 0.5), ("loss", f64::NAN)];
        events.scalars(3, &Metrics::from_iter(metrics)).unwrap();
        events.text(3, "completions", "*text*").unwrap();
        let path = events.path.clone();
        events.sync().unwrap();

        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents.") && name.ends_with(&format!(".{}.0", std::process::id())));
        let events = read(&path);
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        let scalars: Vec<_> =
            events[1].summary.as_ref().unwrap().value.iter().map(|v| (&*v.tag, v.simple_value)).collect();
        assert_eq!(events[1].step, 3);
        let expect = [
            ("train/reward", Some(0.25)),
            ("train/kl", Some(0.0)),
            ("eval/accuracy", Some(0.5)),
            ("eval/x/y", Some(0.5)),
        ];
        assert_eq!(scalars[..4], expect);
        assert!(scalars[4].1.unwrap().is_nan());
        let text = &events[2].summary.as_ref().unwrap().value[0];
        assert_eq!(text.tag, "completions/text_summary");
        assert_eq!(text.tensor.as_ref().unwrap().string_val, [b"*text*"]);
        assert!(events.iter().all(|event| event.wall_time > 1e9));
    }

    #[test]
    fn a_resumed_run_writes_another_file_that_supersedes_later_steps() {
        let dir = tempfile::tempdir().unwrap();
        let first = EventFile::create(dir.path(), None).unwrap();
        let second = EventFile::create(dir.path(), Some(20)).unwrap();
        assert_ne!(first.path, second.path);
        let events = read(&second.path);
        assert_eq!((events[1].step, &events[1].session_log), (21, &Some(SessionLog { status: SESSION_START })));
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let path = PathBuf::from("/dev/full");
        let file = File::options().append(true).open(&path).unwrap();
        let error = EventFile { path, file }.scalars(1, &Metrics::default()).unwrap_err();
        assert!(matches!(error, LoggerError::DiskFull { .. }), "{error:?}");
    }
}
