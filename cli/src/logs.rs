//! Where this process logs: lines on the terminal and, where a run asks for it, JSON in the run's folder.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use aha_core::config::RunConfig;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{Format, Json, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// Bytes of a file before it is put aside for a new one. One that was put aside before is then removed.
const MAX_BYTES: u64 = 64 << 20;

/// One of the things that are done with what is logged.
pub(crate) type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;
type FileLayer = Option<BoxedLayer>;

/// The place of the JSON layer, which is empty until a configuration is read.
static FILE: OnceLock<reload::Handle<FileLayer, Registry>> = OnceLock::new();

/// Logs to standard error what `RUST_LOG` asks for, or else from `info` on; and to `other`, which has its own filter.
pub(crate) fn init(other: Option<BoxedLayer>) {
    let (file, handle) = reload::Layer::new(None);
    let terminal = fmt::layer().with_writer(io::stderr).with_target(false).with_ansi(io::stderr().is_terminal());
    // Each layer has its own filter, so that one layer's spans are not in the lines of another.
    let mut layers = vec![file.with_filter(filter()).boxed(), terminal.with_filter(filter()).boxed()];
    layers.extend(other);
    tracing_subscriber::registry().with(layers).init();
    FILE.get_or_init(|| handle);
}

/// Writes what is logged from now on to `logs/ROLE-RANK.jsonl` in the run's folder as well, where `logging.json_logs` asks
/// for it. `rank` is a number, or a name where there is none.
///
/// # Errors
/// If the file cannot be opened.
pub(crate) fn also_to_file(config: &RunConfig, role: &'static str, rank: &str) -> Result<()> {
    if !config.logging.json_logs {
        return Ok(());
    }
    let folder = config.run_dir().join("logs");
    let path = folder.join(format!("{role}-{rank}.jsonl"));
    let file = std::fs::create_dir_all(&folder).and_then(|()| RotatedFile::open(&path, MAX_BYTES));
    let file = file.with_context(|| format!("logging.json_logs: opening {}", path.display()))?;
    let layer: FileLayer = Some(json_layer(Tag::new(role, rank), file));
    let handle = FILE.get().context("logs are not set up")?;
    handle.reload(layer).context("logging.json_logs")
}

fn filter() -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"))
}

fn json_layer(tag: Tag, file: RotatedFile) -> BoxedLayer {
    fmt::layer().fmt_fields(JsonFields::new()).event_format(tag).with_writer(Mutex::new(file)).boxed()
}

/// JSON lines that begin with the role and the rank.
struct Tag {
    /// Without the closing brace.
    head: String,
    format: Format<Json>,
}

impl Tag {
    fn new(role: &str, rank: &str) -> Self {
        let rank = rank.parse::<u64>().map_or_else(|_| Value::from(rank), Value::from);
        let head = json!({"role": role, "rank": rank}).to_string();
        Self { head: head.trim_end_matches('}').to_owned(), format: fmt::format().json() }
    }
}

impl<S> FormatEvent<S, JsonFields> for Tag
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    JsonFields: for<'a> FormatFields<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let mut line = String::new();
        self.format.format_event(context, Writer::new(&mut line), event)?;
        write!(writer, "{},{}", self.head, line.trim_start_matches('{'))
    }
}

/// A file that never exceeds its bound by more than a line, and the one before it.
#[derive(Debug)]
struct RotatedFile {
    path: PathBuf,
    file: File,
    num_bytes: u64,
    max_bytes: u64,
}

impl RotatedFile {
    fn open(path: &Path, max_bytes: u64) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        let num_bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, num_bytes, max_bytes })
    }
}

impl Write for RotatedFile {
    /// Takes whole lines, as the layer gives them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.num_bytes >= self.max_bytes {
            std::fs::rename(&self.path, self.path.with_extension("jsonl.1"))?;
            *self = Self::open(&self.path, self.max_bytes)?;
        }
        self.file.write_all(line)?;
        self.num_bytes += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn every_event_is_one_object_with_role_and_rank() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trainer-3.jsonl");
        let layer = json_layer(Tag::new("trainer", "3"), RotatedFile::open(&path, MAX_BYTES).unwrap());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let _span = tracing::info_span!("train_step", step = 7).entered();
            tracing::info!(seconds = 0.5, "two\nlines, \"quoted\"");
            tracing::warn!("second");
        });
        let lines = lines(&path);
        assert_eq!(lines.len(), 2);
        let first = &lines[0];
        assert_eq!((&first["role"], &first["rank"], &first["level"]), (&json!("trainer"), &json!(3), &json!("INFO")));
        assert_eq!(first["fields"], json!({"message": "two\nlines, \"quoted\"", "seconds": 0.5}));
        assert_eq!((&first["span"]["name"], &first["span"]["step"]), (&json!("train_step"), &json!(7)));
        let timestamp = first["timestamp"].as_str().unwrap();
        assert!(timestamp.starts_with("20") && timestamp.ends_with('Z'), "{timestamp}");
        assert_eq!(lines[1]["level"], "WARN");
        assert_eq!(Tag::new("generator", "node7-50051").head, r#"{"role":"generator","rank":"node7-50051""#);
    }

    #[test]
    fn a_file_is_put_aside_when_it_is_full_and_nothing_older_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("generator-0.jsonl");
        std::fs::write(&path, "{\"n\":0}\n").unwrap();
        // Of an earlier process of the same rank; three lines fit.
        let mut file = RotatedFile::open(&path, 24).unwrap();
        for number in 1..=7 {
            file.write_all(format!("{{\"n\":{number}}}\n").as_bytes()).unwrap();
        }
        let numbers = |path: &Path| lines(path).iter().map(|line| line["n"].as_u64().unwrap()).collect::<Vec<_>>();
        assert_eq!(numbers(&path), [6, 7]);
        assert_eq!(numbers(&folder.path().join("generator-0.jsonl.1")), [3, 4, 5]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
