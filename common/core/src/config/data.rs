//! Where prompts come from, and how rows become prompts.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dataset::{ColumnMap, CountdownSource};
use crate::prompt::templates;

/// Bytes of the largest `prompt.file`.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where prompts come from: the one source that these keys are, or those of `sources`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Data {
    pub source: DataSource,
    /// The file or folder of a `file` source.
    pub path: Option<PathBuf>,
    /// The split of a folder that has several; unset takes `train`, or the only one.
    pub split: Option<String>,
    /// The subset ("config") of a folder that has several.
    pub subset: Option<String>,
    /// Our column name to the data set's, where they differ.
    pub columns: ColumnMap,
    /// The puzzles of the built-in `countdown` source.
    pub countdown: Countdown,
    /// A Jinja expression over the row's columns; rows for which it is false are left out.
    pub filter: Option<String>,
    /// Put what the filter left into the order of `datasets.Dataset.shuffle(seed=..)`.
    pub shuffle_seed: Option<u64>,
    /// Keep so many rows, the first ones of that order.
    pub take: Option<usize>,
    /// Share of the rows held out for evaluation, chosen by a hash of the row.
    pub held_out: f64,
    pub prompt: PromptTemplate,
    /// Longest prompt in tokens.
    pub max_prompt_length: usize,
    /// What becomes of a longer one.
    pub prompt_too_long: PromptTooLong,
    /// Several sources, each with a weight; the keys above that say what is read then stand there.
    pub sources: Vec<Source>,
}

/// One of several sources.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Source {
    /// Names it in metrics and messages.
    pub name: String,
    /// Its share of every step's prompts, relative to the others'.
    pub weight: f64,
    pub source: DataSource,
    pub path: Option<PathBuf>,
    pub split: Option<String>,
    pub subset: Option<String>,
    pub columns: ColumnMap,
    pub countdown: Countdown,
    pub filter: Option<String>,
    pub shuffle_seed: Option<u64>,
    pub take: Option<usize>,
    /// Unset takes `data.held_out`.
    pub held_out: Option<f64>,
    /// Unset takes `data.prompt`.
    pub prompt: Option<PromptTemplate>,
    /// Names of the rewards that score its completions; unset takes all.
    pub rewards: Option<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataSource {
    /// Seeded Countdown puzzles, made on the spot and solvable by construction.
    #[default]
    Countdown,
    /// JSON lines, JSON, CSV, Parquet or Arrow: a file, a folder of them, or a Hugging Face data set's folder.
    File,
}

/// What becomes of prompts over `max_prompt_length` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptTooLong {
    /// The run ends before it has begun, and names the row.
    #[default]
    Error,
    /// They are left out and counted, as oat does. Every row is rendered when the run starts.
    Drop,
    /// They begin with their last tokens that fit, as TRL's do.
    KeepLast,
}

/// Shape of the built-in Countdown puzzles.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Countdown {
    /// Puzzles in the source.
    pub size: usize,
    /// Numbers of a puzzle, each used exactly once.
    pub numbers: usize,
    pub min_number: u32,
    pub max_number: u32,
    pub max_target: u32,
    /// Allowed operations, of `+-*/`.
    pub operations: String,
}

/// How a row becomes a prompt. Texts are minijinja templates over the row's columns.
///
/// A name or a file is read into the texts when the configuration is, so that a run's own copy of it holds what was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "WrittenPrompt")]
pub struct PromptTemplate {
    /// A built-in template, for the keys below that are not set: `r1`, `qwen_math`, ...
    pub template: Option<String>,
    /// A file with the text of `user`, less one line break at its end.
    pub file: Option<PathBuf>,
    /// Wrap the texts in the model's chat template; otherwise they are joined as they are.
    pub chat: bool,
    pub system: Option<String>,
    pub user: String,
    /// Start of the assistant's turn, which the completion continues.
    pub assistant_prefill: Option<String>,
}

/// A [`PromptTemplate`] as it is written down: what is not set comes from a template or a file.
#[derive(Default, Deserialize)]
#[serde(default)]
struct WrittenPrompt {
    template: Option<String>,
    file: Option<PathBuf>,
    chat: Option<bool>,
    system: Option<String>,
    user: Option<String>,
    assistant_prefill: Option<String>,
}

impl Data {
    /// Every source, whole: the single one has no name.
    #[must_use]
    pub fn all_sources(&self) -> Vec<Source> {
        let of_own = || Source {
            source: self.source,
            path: self.path.clone(),
            split: self.split.clone(),
            subset: self.subset.clone(),
            columns: self.columns.clone(),
            countdown: self.countdown.clone(),
            filter: self.filter.clone(),
            shuffle_seed: self.shuffle_seed,
            take: self.take,
            ..Source::default()
        };
        let mut sources = if self.sources.is_empty() { vec![of_own()] } else { self.sources.clone() };
        for source in &mut sources {
            source.held_out.get_or_insert(self.held_out);
            source.prompt.get_or_insert_with(|| self.prompt.clone());
        }
        sources
    }
}

impl Countdown {
    /// The puzzles of a run with `seed`.
    #[must_use]
    pub fn with_seed(&self, seed: u64) -> CountdownSource {
        CountdownSource {
            size: self.size,
            numbers: self.numbers,
            min_number: self.min_number,
            max_number: self.max_number,
            max_target: self.max_target,
            operations: self.operations.clone(),
            seed,
        }
    }
}

impl TryFrom<WrittenPrompt> for PromptTemplate {
    type Error = String;

    fn try_from(written: WrittenPrompt) -> Result<Self, String> {
        let named = match &written.template {
            Some(name) => templates::find(name)?.prompt(),
            None => Self::default(),
        };
        let user = match (written.user, &written.file) {
            (Some(user), _) => user,
            (None, Some(file)) => read_text(file)?,
            (None, None) => named.user,
        };
        Ok(Self {
            template: written.template,
            file: written.file,
            chat: written.chat.unwrap_or(named.chat),
            system: written.system.or(named.system),
            user,
            assistant_prefill: written.assistant_prefill.or(named.assistant_prefill),
        })
    }
}

/// A template's text. Editors end a file with a line break that nobody means.
fn read_text(path: &Path) -> Result<String, String> {
    let bad = |reason: String| format!("cannot read the file {}: {reason}", path.display());
    if !path.is_file() {
        return Err(bad("there is no such file".to_owned()));
    }
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| bad(error.to_string()))?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| bad(error.to_string()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(bad(format!("it has over {MAX_FILE_BYTES} bytes")));
    }
    Ok(text.strip_suffix('\n').map(|text| text.strip_suffix('\r').unwrap_or(text)).unwrap_or(&text).to_owned())
}

impl Default for Data {
    fn default() -> Self {
        Self {
            source: DataSource::Countdown,
            path: None,
            split: None,
            subset: None,
            columns: ColumnMap::new(),
            countdown: Countdown::default(),
            filter: None,
            shuffle_seed: None,
            take: None,
            held_out: 0.1,
            prompt: PromptTemplate::default(),
            max_prompt_length: 512,
            prompt_too_long: PromptTooLong::Error,
            sources: Vec::new(),
        }
    }
}

impl Default for Source {
    fn default() -> Self {
        Self {
            name: String::new(),
            weight: 1.0,
            source: DataSource::File,
            path: None,
            split: None,
            subset: None,
            columns: ColumnMap::new(),
            countdown: Countdown::default(),
            filter: None,
            shuffle_seed: None,
            take: None,
            held_out: None,
            prompt: None,
            rewards: None,
        }
    }
}

impl Default for Countdown {
    fn default() -> Self {
        Self { size: 50_000, numbers: 4, min_number: 1, max_number: 99, max_target: 999, operations: "+-*/".to_owned() }
    }
}

impl Default for PromptTemplate {
    fn default() -> Self {
        Self { template: None, file: None, chat: true, system: None, user: String::new(), assistant_prefill: None }
    }
}
