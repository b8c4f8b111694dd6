//! What people look at before a run: rendered prompts, and what the rows of every source are like.

use std::collections::{BTreeMap, HashMap};

use aha_core::dataset::Row;
use aha_core::nearest::hint;
use aha_core::tokenizer::SpecialTokens;
use serde::Serialize;
use serde_json::Value;

use super::{At, PromptSource, PromptsError, Rows, in_source};

/// Columns of a source that are counted.
const MAX_COLUMNS: usize = 16;
/// Values of a column that are listed.
const MAX_VALUES: usize = 3;

/// A prompt as the model gets it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PromptPreview {
    /// Empty where there is one source only.
    pub source: String,
    /// From 0, of what was read.
    pub row: usize,
    /// What the tokens say, special ones too.
    pub text: String,
    pub num_tokens: usize,
    /// Names of the rewards that score its completions.
    pub rewards: Vec<String>,
    pub columns: Row,
}

/// What became of the rows of a source.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceStats {
    pub source: String,
    pub weight: f64,
    pub read: usize,
    /// Left out by the filter.
    pub filtered: usize,
    /// Left by filter and take.
    pub selected: usize,
    /// Over `data.max_prompt_length`; dropped where `data.prompt_too_long` says so.
    pub too_long: usize,
    /// Ask what an earlier row asks.
    pub duplicates: usize,
    pub train: usize,
    pub held_out: usize,
    pub rewards: Vec<String>,
    /// Of prompts in tokens, less those that were dropped, and before any are cut.
    pub prompt_tokens: Lengths,
    /// The first columns.
    pub columns: Vec<ColumnStats>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Lengths {
    pub min: usize,
    pub mean: f64,
    pub p50: usize,
    pub p90: usize,
    pub p99: usize,
    pub max: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ColumnStats {
    pub name: String,
    /// Rows by the type of their value.
    pub types: BTreeMap<&'static str, usize>,
    pub distinct: usize,
    /// Smallest, mean and largest number, or length of lists in items and of texts in characters; none for others.
    pub range: Option<[f64; 3]>,
    /// Those that come up most, where any comes up twice, as JSON.
    pub most_frequent: Vec<(String, usize)>,
}

impl PromptSource {
    /// The first `count` prompts that the run asks, or that it asks of one source.
    ///
    /// # Errors
    /// Names of no source, and prompts that cannot be made.
    pub fn preview(&self, source: Option<&str>, count: usize) -> Result<Vec<PromptPreview>, PromptsError> {
        let rows = match source {
            None => self.positions(0, count),
            Some(name) => {
                let source = self.source_named(name)?;
                let rows = self.sources[source].stream(self.seed, 0, count);
                rows.into_iter().map(|row| At { source, row }).collect()
            }
        };
        let preview = |at: At| self.preview_of(at).map_err(|error| in_source(self.name(at), error));
        rows.into_iter().map(preview).collect()
    }

    /// # Errors
    /// Prompts that cannot be made.
    pub fn stats(&self) -> Result<Vec<SourceStats>, PromptsError> {
        (0..self.sources.len()).map(|source| self.stats_of(source)).collect()
    }

    fn source_named(&self, name: &str) -> Result<usize, PromptsError> {
        let names = || self.sources.iter().map(|rows| rows.origin.source.as_str()).filter(|name| !name.is_empty());
        self.sources.iter().position(|rows| !name.is_empty() && rows.origin.source == name).ok_or_else(|| {
            let (name, hint) = (name.to_owned(), hint(name, names()));
            PromptsError::UnknownSource { name, there: names().map(str::to_owned).collect(), hint }
        })
    }

    fn name(&self, at: At) -> &str {
        &self.sources[at.source].origin.source
    }

    fn preview_of(&self, at: At) -> Result<PromptPreview, PromptsError> {
        let (_, token_ids) = self.render(at)?;
        let rows = &self.sources[at.source];
        Ok(PromptPreview {
            source: rows.origin.source.clone(),
            row: rows.number(at.row),
            text: self.tokenizer.decode(&token_ids, SpecialTokens::Keep)?,
            num_tokens: token_ids.len(),
            rewards: self.rewards_of(rows),
            columns: rows.row(at.row).clone(),
        })
    }

    fn rewards_of(&self, rows: &Rows) -> Vec<String> {
        self.rewards.iter().filter(|name| rows.origin.asks_for(name)).cloned().collect()
    }

    fn stats_of(&self, source: usize) -> Result<SourceStats, PromptsError> {
        let rows = &self.sources[source];
        let all = rows.all();
        let lengths = all.iter().map(|&row| {
            let at = At { source, row };
            let rendered = self.render_whole(at).map_err(|error| in_source(self.name(at), error));
            rendered.map(|(_, token_ids)| token_ids.len())
        });
        let mut lengths = lengths.collect::<Result<Vec<usize>, _>>()?;
        lengths.sort_unstable();
        let num_over = lengths.iter().filter(|&&length| length > self.limits.max_prompt_length).count();
        let rows_there: Vec<&Row> = all.iter().map(|&row| rows.row(row)).collect();
        Ok(SourceStats {
            source: rows.origin.source.clone(),
            weight: rows.weight,
            read: rows.num_read,
            filtered: rows.num_filtered,
            selected: rows.len(),
            too_long: rows.num_too_long + num_over,
            duplicates: rows.num_duplicates,
            train: rows.train.len(),
            held_out: rows.held_out.len(),
            rewards: self.rewards_of(rows),
            prompt_tokens: Lengths::of(&lengths),
            columns: column_stats(&rows_there),
        })
    }
}

impl Lengths {
    /// Of ascending lengths.
    fn of(lengths: &[usize]) -> Self {
        let at = |share: f64| {
            let index = (share * lengths.len() as f64).ceil() as usize;
            lengths.get(index.saturating_sub(1)).copied().unwrap_or(0)
        };
        let mean = lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64;
        Self { min: at(0.0), mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

fn column_stats(rows: &[&Row]) -> Vec<ColumnStats> {
    let mut names: Vec<&str> = Vec::new();
    for name in rows.iter().flat_map(|row| row.keys()) {
        if names.len() < MAX_COLUMNS && !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names.into_iter().map(|name| ColumnStats::of(name, rows)).collect()
}

impl ColumnStats {
    fn of(name: &str, rows: &[&Row]) -> Self {
        let mut types = BTreeMap::new();
        let mut values: HashMap<String, usize> = HashMap::new();
        let mut sizes = Vec::new();
        for value in rows.iter().filter_map(|row| row.get(name)) {
            *types.entry(type_of(value)).or_default() += 1;
            *values.entry(value.to_string()).or_default() += 1;
            sizes.extend(size(value));
        }
        let range = sizes.iter().copied().reduce(f64::min).zip(sizes.iter().copied().reduce(f64::max));
        let mean = sizes.iter().sum::<f64>() / sizes.len().max(1) as f64;
        let distinct = values.len();
        let mut most_frequent: Vec<_> = values.into_iter().filter(|(_, count)| *count > 1).collect();
        most_frequent.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        most_frequent.truncate(MAX_VALUES);
        let range = range.map(|(min, max)| [min, mean, max]);
        Self { name: name.to_owned(), types, distinct, range, most_frequent }
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "text",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    }
}

fn size(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => Some(text.chars().count() as f64),
        Value::Array(items) => Some(items.len() as f64),
        Value::Null | Value::Bool(_) | Value::Object(_) => None,
    }
}
