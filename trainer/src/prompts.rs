//! Prompts: rows of the data set, in an order that only configuration and step decide.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use aha_core::chat_template::{ChatTemplate, ChatTemplateError};
use aha_core::config::{DataSource, PromptTemplate, RunConfig, Sft};
use aha_core::dataset::{CountdownError, CountdownSource, Dataset, DatasetError, SplitMix64, is_held_out, question_id};
use aha_core::ids::{PromptId, TokenId};
use aha_core::prompt::{PromptBuilder, PromptError};
use aha_core::random::derive_seed;
use aha_core::reward::{RewardError, RewardFunction};
use aha_core::rollout::Prompt;
use aha_core::tokenizer::{Tokenizer, TokenizerError};
use aha_nn::model_config::ModelConfig;

/// Names the shuffle among the purposes that the run's seed is used for.
const SHUFFLE: u64 = 0x5348_5546;

/// The same for the prompts that replace others.
const REPLACE: u64 = 0x5245_504c;

/// The prompts of a run.
#[derive(Debug)]
pub struct PromptSource {
    dataset: Dataset,
    /// Positions in the data set.
    train: Vec<usize>,
    held_out: Vec<usize>,
    builder: PromptBuilder,
    tokenizer: Tokenizer,
    /// Ends a completion that the model is shown.
    eos_token_id: Option<TokenId>,
    limits: Limits,
    seed: u64,
    prompts_per_step: usize,
    max_steps: u64,
    num_eval_prompts: usize,
    /// Steps may ask for other prompts than their own.
    dynamic_sampling: bool,
}

/// What a sequence may be made of.
#[derive(Debug, Clone, Copy)]
struct Limits {
    max_prompt_length: usize,
    max_completion_length: usize,
    /// Longest sequence of model and generator.
    context: usize,
    vocab_size: usize,
}

/// A question with its answer, for supervised fine-tuning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    pub prompt: Vec<TokenId>,
    /// With the end-of-sequence token.
    pub completion: Vec<TokenId>,
}

#[derive(Debug, thiserror::Error)]
pub enum PromptsError {
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error("data.countdown: {0}")]
    Countdown(#[from] CountdownError),
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
    #[error(
        "eval.num_prompts asks for {wanted} held-out rows, and there are {there}: lower it, or raise data.held_out"
    )]
    TooFewHeldOut { wanted: usize, there: usize },
    #[error("row {row} (from 0) of the data set: {source}; map the data set's names in data.columns")]
    Columns { row: usize, source: RewardError },
    #[error("row {row} (from 0) of the data set: {reason}")]
    Row { row: usize, reason: String },
    #[error("sft.completion: {0}")]
    Completion(PromptError),
}

impl PromptSource {
    /// Reads the data set, and tokenizer and chat template of `model.path`, whose configuration is `model`.
    ///
    /// # Errors
    /// Whatever cannot be read, a row that lacks a column that a reward function needs, and a data set with nothing to
    /// train on.
    pub fn load(config: &RunConfig, model: &ModelConfig) -> Result<Self, PromptsError> {
        let folder = &config.model.path;
        let tokenizer = Tokenizer::load(folder)?;
        let eos_token_id = eos_token_id(folder, &tokenizer)?;
        let chat_template = if config.data.prompt.chat { Some(ChatTemplate::load(folder)?) } else { None };
        let builder = PromptBuilder::new(&config.data.prompt, chat_template)?;
        let dataset = dataset(config)?;
        check_columns(&dataset, config)?;
        let (mut held_out, train): (Vec<_>, Vec<_>) =
            (0..dataset.len()).partition(|&row| is_held_out(&dataset.rows()[row], config.data.held_out));
        // A question that comes up twice would count twice.
        let mut asked = HashSet::new();
        held_out.retain(|&row| asked.insert(question_id(&dataset.rows()[row])));
        if train.is_empty() {
            return Err(PromptsError::NoTrainRows { held_out: config.data.held_out, num_rows: dataset.len() });
        }
        let max_model_len = config.generator.max_model_len;
        let context = if max_model_len == 0 { usize::MAX } else { max_model_len }.min(model.max_position_embeddings);
        let limits = Limits {
            max_prompt_length: config.data.max_prompt_length,
            max_completion_length: config.rollout.max_completion_length as usize,
            context,
            vocab_size: model.vocab_size,
        };
        Ok(Self {
            dataset,
            train,
            held_out,
            builder,
            tokenizer,
            eos_token_id,
            limits,
            seed: config.run.seed,
            prompts_per_step: config.rollout.prompts_per_step(),
            max_steps: config.train.max_steps,
            num_eval_prompts: config.eval.num_prompts,
            dynamic_sampling: config.train.dynamic_sampling,
        })
    }

    /// Makes every prompt that the run will ask for once, so that a bad row ends it before it has begun.
    ///
    /// # Errors
    /// The first row whose prompt cannot be made or is too long.
    pub fn check_run(&self) -> Result<(), PromptsError> {
        let num_asked = usize::try_from(self.max_steps).unwrap_or(usize::MAX).saturating_mul(self.prompts_per_step);
        let num_asked = if self.dynamic_sampling { usize::MAX } else { num_asked };
        let asked = self.positions(0, num_asked.min(self.train.len()));
        for row in asked {
            self.prompt(row)?;
        }
        self.held_out(self.num_eval_prompts).map(drop)
    }

    /// The prompts of `step`, counted from 0: its part of the training rows, shuffled anew for every epoch, one epoch
    /// after the other. A function of configuration and step, so resuming needs no state.
    ///
    /// # Errors
    /// A prompt that cannot be made or is too long, by row.
    pub fn step_prompts(&self, step: u64) -> Result<Vec<Prompt>, PromptsError> {
        self.positions(step, self.prompts_per_step).into_iter().map(|row| self.prompt(row)).collect()
    }

    /// Up to `count` training prompts that are not among `seen`, drawn at random for a step and a round of it; fewer where
    /// there are no more. A function of configuration and arguments.
    ///
    /// # Errors
    /// A prompt that cannot be made or is too long, by row.
    pub fn replacements(
        &self,
        (step, round): (u64, u32),
        count: usize,
        seen: &BTreeSet<PromptId>,
    ) -> Result<Vec<Prompt>, PromptsError> {
        let mut rows: Vec<usize> =
            self.train.iter().copied().filter(|&row| !seen.contains(&PromptId(row as u64))).collect();
        let count = count.min(rows.len());
        let mut random = SplitMix64::new(derive_seed(self.seed, &[REPLACE, step, u64::from(round)]));
        for index in 0..count {
            let rest = (rows.len() - index) as u64;
            rows.swap(index, index + random.below(rest) as usize);
        }
        rows[..count].iter().map(|&row| self.prompt(row)).collect()
    }

    /// The first `num_prompts` of the rows that are never trained on, in the order of the data set.
    ///
    /// # Errors
    /// If there are fewer, or a prompt cannot be made or is too long.
    pub fn held_out(&self, num_prompts: usize) -> Result<Vec<Prompt>, PromptsError> {
        let there = self.held_out.len();
        let rows =
            self.held_out.get(..num_prompts).ok_or(PromptsError::TooFewHeldOut { wanted: num_prompts, there })?;
        rows.iter().map(|&row| self.prompt(row)).collect()
    }

    /// The examples of a supervised step, counted from 0, in the order of [`Self::step_prompts`].
    ///
    /// # Errors
    /// An example that cannot be made or is longer than `sft.max_length`, by row.
    pub fn supervised(&self, step: u64, sft: &Sft) -> Result<Vec<Example>, PromptsError> {
        let plain = PromptTemplate { chat: false, system: None, user: sft.completion.clone(), assistant_prefill: None };
        let builder = PromptBuilder::new(&plain, None).map_err(PromptsError::Completion)?;
        let max_length = sft.max_length.min(self.limits.context);
        self.positions(step, sft.batch_size)
            .into_iter()
            .map(|row| {
                let (_, prompt) = self.render(row)?;
                let text = builder.render(&self.dataset.rows()[row]).map_err(PromptsError::Completion)?;
                let mut completion = self.encode(row, &text)?;
                completion.extend(self.eos_token_id);
                let (num_prompt, num_completion) = (prompt.len(), completion.len());
                if num_prompt + num_completion > max_length {
                    let reason = format!(
                        "prompt and completion of {num_prompt} + {num_completion} tokens are longer than {max_length}, \
                         sft.max_length or the model's context"
                    );
                    return Err(PromptsError::Row { row, reason });
                }
                Ok(Example { prompt, completion })
            })
            .collect()
    }

    /// The rows at `step * count ..` of the endless shuffled stream, `count` of them.
    fn positions(&self, step: u64, count: usize) -> Vec<usize> {
        let epoch_len = self.train.len();
        let mut positions = Vec::with_capacity(count);
        // Wide enough for any step.
        let start = u128::from(step) * count as u128;
        let (mut epoch, mut from) = ((start / epoch_len as u128) as u64, (start % epoch_len as u128) as usize);
        while positions.len() < count {
            let until = epoch_len.min(from + count - positions.len());
            positions.extend_from_slice(&self.epoch(epoch)[from..until]);
            (epoch, from) = (epoch + 1, 0);
        }
        positions
    }

    /// The training rows in the order of one epoch (Fisher and Yates).
    fn epoch(&self, epoch: u64) -> Vec<usize> {
        let mut rows = self.train.clone();
        let mut random = SplitMix64::new(derive_seed(self.seed, &[SHUFFLE, epoch]));
        for last in (1..rows.len()).rev() {
            rows.swap(last, random.below(last as u64 + 1) as usize);
        }
        rows
    }

    fn prompt(&self, row: usize) -> Result<Prompt, PromptsError> {
        let (text, token_ids) = self.render(row)?;
        self.limits.check(token_ids.len()).map_err(|reason| PromptsError::Row { row, reason })?;
        Ok(Prompt { id: PromptId(row as u64), text, token_ids, columns: self.dataset.rows()[row].clone() })
    }

    fn render(&self, row: usize) -> Result<(String, Vec<TokenId>), PromptsError> {
        let text = self.builder.render(&self.dataset.rows()[row])?;
        let token_ids = self.encode(row, &text)?;
        if token_ids.is_empty() {
            return Err(PromptsError::Row { row, reason: "the prompt is empty".to_owned() });
        }
        Ok((text, token_ids))
    }

    fn encode(&self, row: usize, text: &str) -> Result<Vec<TokenId>, PromptsError> {
        let token_ids = self.tokenizer.encode(text)?;
        let vocab_size = self.limits.vocab_size;
        match token_ids.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => {
                let reason = format!(
                    "its tokens go up to {token}, and the model's vocabulary has {vocab_size}: the tokenizer in \
                     model.path belongs to another model"
                );
                Err(PromptsError::Row { row, reason })
            }
            None => Ok(token_ids),
        }
    }
}

impl Limits {
    fn check(&self, num_tokens: usize) -> Result<(), String> {
        let Self { max_prompt_length, max_completion_length, context, .. } = *self;
        if num_tokens > max_prompt_length {
            return Err(format!(
                "the prompt has {num_tokens} tokens, over data.max_prompt_length {max_prompt_length}: raise it, or leave \
                 the row out"
            ));
        }
        if num_tokens + max_completion_length > context {
            return Err(format!(
                "the prompt has {num_tokens} tokens, and with rollout.max_completion_length {max_completion_length} is \
                 longer than the {context} that model and generator allow"
            ));
        }
        Ok(())
    }
}

fn dataset(config: &RunConfig) -> Result<Dataset, PromptsError> {
    let data = &config.data;
    match data.source {
        DataSource::Countdown => {
            let puzzles = &data.countdown;
            let source = CountdownSource {
                size: puzzles.size,
                numbers: puzzles.numbers,
                min_number: puzzles.min_number,
                max_number: puzzles.max_number,
                max_target: puzzles.max_target,
                operations: puzzles.operations.clone(),
                seed: config.run.seed,
            };
            Ok(source.generate()?)
        }
        DataSource::File => {
            let path = data.path.as_deref().ok_or(PromptsError::NoPath)?;
            Ok(Dataset::load(path, &data.columns)?)
        }
    }
}

/// Every row must have what the run's reward functions read.
fn check_columns(dataset: &Dataset, config: &RunConfig) -> Result<(), PromptsError> {
    let functions = config.rewards.iter().filter(|spec| !spec.is_external()).map(RewardFunction::new);
    let functions =
        functions.collect::<Result<Vec<_>, _>>().map_err(|source| PromptsError::Columns { row: 0, source })?;
    for (row, columns) in dataset.rows().iter().enumerate() {
        for function in &functions {
            function.check_columns(columns).map_err(|source| PromptsError::Columns { row, source })?;
        }
    }
    Ok(())
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
