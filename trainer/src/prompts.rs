//! Prompts: rows of the data sets, in an order that only configuration and step decide.

mod limits;
mod report;
mod rows;
mod supervised;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use aha_core::chat_template::{ChatTemplate, ChatTemplateError};
use aha_core::config::{PromptTooLong, RunConfig};
use aha_core::dataset::{CountdownError, DatasetError, Mixture, SelectError, SplitMix64};
use aha_core::ids::{PromptId, TokenId};
use aha_core::prompt::PromptError;
use aha_core::random::derive_seed;
use aha_core::reward::RewardError;
use aha_core::rollout::Prompt;
use aha_core::tokenizer::{SpecialTokens, Tokenizer, TokenizerError};
use aha_nn::model_config::ModelConfig;

pub use report::{ColumnStats, Lengths, PromptPreview, SourceStats};
pub use supervised::Example;

use limits::Limits;
use rows::Rows;

/// Names the choice of prompts that replace others among the purposes that the run's seed is used for.
const REPLACE: u64 = 0x5245_504c;

/// More prompts than any run asks for, and few enough to be counted exactly in floating point.
const MANY: u64 = 1 << 40;

/// The prompts of a run.
#[derive(Debug)]
pub struct PromptSource {
    sources: Vec<Rows>,
    mixture: Mixture,
    /// Where prompts or conversations go through it.
    chat_template: Option<ChatTemplate>,
    tokenizer: Tokenizer,
    /// Ends a completion that the model is shown.
    eos_token_id: Option<TokenId>,
    limits: Limits,
    too_long: PromptTooLong,
    /// The names of all rewards.
    rewards: Vec<String>,
    /// The reward that evaluation counts.
    eval_reward: String,
    seed: u64,
    prompts_per_step: usize,
    max_steps: u64,
    num_eval_prompts: usize,
    /// Steps may ask for other prompts than their own.
    dynamic_sampling: bool,
}

/// A row of a source, by positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct At {
    source: usize,
    row: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum PromptsError {
    #[error("source {name:?}: {error}")]
    Source { name: String, error: Box<PromptsError> },
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error("data.countdown: {0}")]
    Countdown(#[from] CountdownError),
    #[error(transparent)]
    Select(#[from] SelectError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("{0}; or set data.prompt.chat to false")]
    ChatTemplate(#[from] ChatTemplateError),
    #[error("data.prompt: {0}")]
    Template(#[from] PromptError),
    #[error("cannot read {}: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("data.path: missing; a file source needs one")]
    NoPath,
    #[error("no rows to train on: data.held_out {held_out} holds out all {num_rows}")]
    NoTrainRows { held_out: f64, num_rows: usize },
    #[error("no rows to train on: {too_long} of {num_rows} prompts are over data.max_prompt_length {max}, and dropped")]
    AllTooLong { too_long: usize, num_rows: usize, max: usize },
    #[error(
        "eval.num_prompts asks for {wanted} held-out rows, and there are {there}: lower it, or raise data.held_out"
    )]
    TooFewHeldOut { wanted: usize, there: usize },
    #[error("there is no source {name:?}{hint}; there are {there:?}")]
    UnknownSource { name: String, there: Vec<String>, hint: String },
    #[error("row {row} (from 0) of the data set: {source}; map the data set's names in data.columns")]
    Columns { row: usize, source: RewardError },
    #[error("row {row} (from 0) of the data set: {reason}")]
    Row { row: usize, reason: String },
    #[error("sft.completion: {0}")]
    Completion(PromptError),
    #[error("row {row} (from 0) of the data set: sft.messages: column {column:?} {reason}")]
    Messages { row: usize, column: String, reason: String },
}

impl PromptSource {
    /// Reads the data sets, and tokenizer and chat template of `model.path`, whose configuration is `model`.
    ///
    /// # Errors
    /// Whatever cannot be read, a row that lacks a column that a reward function needs, and a source with nothing to
    /// train on.
    pub fn load(config: &RunConfig, model: &ModelConfig) -> Result<Self, PromptsError> {
        let folder = &config.model.path;
        let tokenizer = Tokenizer::load(folder)?;
        let eos_token_id = eos_token_id(folder, &tokenizer)?;
        let specs = config.data.all_sources();
        let is_chat = config.sft.messages.is_some()
            || specs.iter().any(|spec| spec.prompt.as_ref().is_some_and(|prompt| prompt.chat));
        let chat_template = if is_chat { Some(ChatTemplate::load(folder)?) } else { None };
        let mut sources: Vec<Rows> = Vec::new();
        for spec in &specs {
            let first_id = sources.last().map_or(0, Rows::next_id);
            let rows = Rows::load(config, spec, (sources.len(), first_id), chat_template.clone());
            sources.push(rows.map_err(|error| in_source(&spec.name, error))?);
        }
        let weights: Vec<f64> = specs.iter().map(|spec| spec.weight).collect();
        let mut prompts = Self {
            sources,
            mixture: Mixture::new(&weights),
            chat_template,
            tokenizer,
            eos_token_id,
            limits: Limits::new(config, model),
            too_long: config.data.prompt_too_long,
            rewards: config.rewards.iter().map(|spec| spec.name().to_owned()).collect(),
            eval_reward: config.eval.reward.clone(),
            seed: config.run.seed,
            prompts_per_step: config.rollout.prompts_per_step(),
            max_steps: config.train.max_steps,
            num_eval_prompts: config.eval.num_prompts,
            dynamic_sampling: config.train.dynamic_sampling,
        };
        if prompts.too_long == PromptTooLong::Drop {
            prompts.drop_too_long()?;
        }
        prompts.sources.iter().for_each(Rows::log);
        Ok(prompts)
    }

    /// Makes every prompt that the run will ask for once, so that a bad row ends it before it has begun.
    ///
    /// # Errors
    /// The first row whose prompt cannot be made or is too long.
    pub fn check_run(&self) -> Result<(), PromptsError> {
        let num_asked = self.max_steps.saturating_mul(self.prompts_per_step as u64).min(MANY);
        let by_source = self.mixture.before(if self.dynamic_sampling { MANY } else { num_asked });
        for (source, (rows, num_asked)) in self.sources.iter().zip(by_source).enumerate() {
            let count = usize::try_from(num_asked).unwrap_or(usize::MAX).min(rows.train.len());
            for row in rows.stream(self.seed, 0, count) {
                self.prompt(At { source, row })?;
            }
        }
        self.held_out(self.num_eval_prompts).map(drop)
    }

    /// The prompts of `step`, counted from 0: of each source its share, the next of its training rows, which are shuffled
    /// anew for every epoch, one epoch after the other. A function of configuration and step, so resuming needs no state.
    ///
    /// # Errors
    /// A prompt that cannot be made or is too long, by row.
    pub fn step_prompts(&self, step: u64) -> Result<Vec<Prompt>, PromptsError> {
        self.positions(step, self.prompts_per_step).into_iter().map(|at| self.prompt(at)).collect()
    }

    /// Up to `count` training prompts that are not among `seen`, drawn at random for a step and a round of it, of sources
    /// by their weights; fewer where there are no more. A function of configuration and arguments.
    ///
    /// # Errors
    /// A prompt that cannot be made or is too long, by row.
    pub fn replacements(
        &self,
        (step, round): (u64, u32),
        count: usize,
        seen: &BTreeSet<PromptId>,
    ) -> Result<Vec<Prompt>, PromptsError> {
        let unseen = |rows: &Rows| rows.train.iter().copied().filter(|&row| !seen.contains(&rows.id(row))).collect();
        let mut left: Vec<Vec<usize>> = self.sources.iter().map(unseen).collect();
        let mut num_taken = vec![0; left.len()];
        let mut random = SplitMix64::new(derive_seed(self.seed, &[REPLACE, step, u64::from(round)]));
        let mut drawn = Vec::new();
        while drawn.len() < count {
            let there: Vec<usize> = (0..left.len()).filter(|&source| num_taken[source] < left[source].len()).collect();
            let Some(source) = self.mixture.draw(&there, &mut random) else { break };
            let (rows, taken) = (&mut left[source], &mut num_taken[source]);
            let rest = (rows.len() - *taken) as u64;
            rows.swap(*taken, *taken + random.below(rest) as usize);
            drawn.push(At { source, row: rows[*taken] });
            *taken += 1;
        }
        drawn.into_iter().map(|at| self.prompt(at)).collect()
    }

    /// The first `num_prompts` of the rows that are never trained on, in the order of the data set. Sources that the reward
    /// of evaluation is of take turns.
    ///
    /// # Errors
    /// If there are fewer, or a prompt cannot be made or is too long.
    pub fn held_out(&self, num_prompts: usize) -> Result<Vec<Prompt>, PromptsError> {
        let there = self.held_out_rows(|rows| rows.origin.asks_for(&self.eval_reward));
        let rows =
            there.get(..num_prompts).ok_or(PromptsError::TooFewHeldOut { wanted: num_prompts, there: there.len() })?;
        rows.iter().map(|&at| self.prompt(at)).collect()
    }

    /// The held-out rows of those sources, which take turns.
    fn held_out_rows(&self, is_asked: impl Fn(&Rows) -> bool) -> Vec<At> {
        let asked = || self.sources.iter().enumerate().filter(|(_, rows)| is_asked(rows));
        let longest = asked().map(|(_, rows)| rows.held_out.len()).max().unwrap_or(0);
        let turn = |index: usize| {
            asked().filter_map(move |(source, rows)| Some(At { source, row: *rows.held_out.get(index)? }))
        };
        (0..longest).flat_map(turn).collect()
    }

    /// The rows at `step * count ..` of the endless stream of the sources, `count` of them.
    fn positions(&self, step: u64, count: usize) -> Vec<At> {
        let firsts = self.mixture.before(step.saturating_mul(count as u64));
        let mut counts = firsts.clone();
        let mut order = Vec::with_capacity(count);
        for _ in 0..count {
            let source = self.mixture.next(&counts);
            counts[source] += 1;
            order.push(source);
        }
        let stream = |(rows, (&first, &end)): (&Rows, (&u64, &u64))| {
            rows.stream(self.seed, first, (end - first) as usize).into_iter()
        };
        let mut streams: Vec<_> = self.sources.iter().zip(firsts.iter().zip(&counts)).map(stream).collect();
        order.into_iter().filter_map(|source| Some(At { source, row: streams[source].next()? })).collect()
    }

    fn prompt(&self, at: At) -> Result<Prompt, PromptsError> {
        let rows = &self.sources[at.source];
        let made = self.render(at).and_then(|(text, token_ids)| {
            let row = rows.number(at.row);
            self.limits.check(token_ids.len()).map_err(|reason| PromptsError::Row { row, reason })?;
            let (columns, origin) = (rows.row(at.row).clone(), rows.origin.clone());
            Ok(Prompt { id: rows.id(at.row), text, token_ids, columns, origin })
        });
        made.map_err(|error| in_source(&rows.origin.source, error))
    }

    /// A row's prompt, which is cut where that is asked for.
    fn render(&self, at: At) -> Result<(String, Vec<TokenId>), PromptsError> {
        let (text, mut token_ids) = self.render_whole(at)?;
        let num_over = token_ids.len().saturating_sub(self.limits.max_prompt_length);
        if num_over == 0 || self.too_long != PromptTooLong::KeepLast {
            return Ok((text, token_ids));
        }
        token_ids.drain(..num_over);
        Ok((self.tokenizer.decode(&token_ids, SpecialTokens::Keep)?, token_ids))
    }

    fn render_whole(&self, at: At) -> Result<(String, Vec<TokenId>), PromptsError> {
        let rows = &self.sources[at.source];
        let text = rows.builder.render(rows.row(at.row))?;
        let token_ids = self.encode(at, &text)?;
        if token_ids.is_empty() {
            let reason = "the prompt is empty".to_owned();
            return Err(PromptsError::Row { row: rows.number(at.row), reason });
        }
        Ok((text, token_ids))
    }

    fn encode(&self, at: At, text: &str) -> Result<Vec<TokenId>, PromptsError> {
        let token_ids = self.tokenizer.encode(text)?;
        let row = self.sources[at.source].number(at.row);
        self.limits.check_vocabulary(&token_ids).map_err(|reason| PromptsError::Row { row, reason })?;
        Ok(token_ids)
    }

    /// Leaves out the rows whose prompts are over the limit, and counts them.
    fn drop_too_long(&mut self) -> Result<(), PromptsError> {
        for source in 0..self.sources.len() {
            let mut too_long = BTreeSet::new();
            for row in self.sources[source].all() {
                let rendered = self.render_whole(At { source, row });
                let named = rendered.map_err(|error| in_source(&self.sources[source].origin.source, error));
                if named?.1.len() > self.limits.max_prompt_length {
                    too_long.insert(row);
                }
            }
            let rows = &mut self.sources[source];
            rows.drop(&too_long);
            if rows.train.is_empty() {
                let (too_long, num_rows) = (too_long.len(), rows.len());
                let error = PromptsError::AllTooLong { too_long, num_rows, max: self.limits.max_prompt_length };
                return Err(in_source(&rows.origin.source, error));
            }
        }
        Ok(())
    }
}

/// An error with the name of its source, where it has one.
fn in_source(name: &str, error: PromptsError) -> PromptsError {
    if name.is_empty() { error } else { PromptsError::Source { name: name.to_owned(), error: Box::new(error) } }
}

/// The token that `tokenizer_config.json` names as the end, which is the end of a turn in chat models, or else the first
/// that ends a completion.
fn eos_token_id(folder: &Path, tokenizer: &Tokenizer) -> Result<Option<TokenId>, PromptsError> {
    let path = folder.join("tokenizer_config.json");
    let unreadable = |reason: String| PromptsError::Unreadable { path: path.clone(), reason };
    let config: serde_json::Value = match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => serde_json::Value::Null,
        Err(error) => return Err(unreadable(error.to_string())),
    };
    let token = &config["eos_token"];
    let named = token.as_str().or_else(|| token["content"].as_str()).and_then(|token| tokenizer.token_id(token));
    Ok(named.or_else(|| tokenizer.eos_token_ids().first().copied()))
}

#[cfg(test)]
mod tests;
