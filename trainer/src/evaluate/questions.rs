//! The questions of a suite, as prompts.

use std::path::{Path, PathBuf};

use aha_core::chat_template::{ChatTemplate, ChatTemplateError};
use aha_core::config::{Questions, Suite};
use aha_core::dataset::{CountdownError, Dataset, DatasetError, Part};
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::prompt::{PromptBuilder, PromptError};
use aha_core::reward::{RewardError, RewardFunction};
use aha_core::rollout::{Origin, Prompt};
use aha_core::tokenizer::{Tokenizer, TokenizerError};

use crate::rollouts::RolloutRequest;

/// Of a suite's puzzles, whatever the seed of a run: the suite is always the same.
const PUZZLE_SEED: u64 = 0x4556_414c;

/// A suite that is ready to be asked.
#[derive(Debug, Clone)]
pub struct Asked {
    pub suite: Suite,
    pub prompts: Vec<Prompt>,
}

/// Who is asked.
#[derive(Debug, Clone, Copy)]
pub struct Model<'a> {
    /// With the chat template.
    pub folder: &'a Path,
    pub tokenizer: &'a Tokenizer,
    /// Longest sequence, prompt and completion together.
    pub max_model_len: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    #[error("suite {name}: there is no {}: {where_from}", path.display())]
    NoData { name: String, path: PathBuf, where_from: String },
    #[error("suite {name}: {source}")]
    Data { name: String, source: DatasetError },
    #[error("suite {name}: countdown: {source}")]
    Countdown { name: String, source: CountdownError },
    #[error("suite {name}: {source}; name a prompt of the suite's own with chat: false")]
    ChatTemplate { name: String, source: ChatTemplateError },
    #[error("suite {name}: {source}")]
    Prompt { name: String, source: PromptError },
    #[error("suite {name}: {source}")]
    Tokenizer { name: String, source: TokenizerError },
    #[error("suite {name}, row {row} (from 0): {source}; map the data set's names in the suite's columns")]
    Columns { name: String, row: usize, source: RewardError },
    #[error("suite {name}: {source}")]
    Reward { name: String, source: RewardError },
    #[error(
        "suite {name}, row {row} (from 0): a prompt of {num_tokens} tokens and max_completion_length {max_tokens} are together \
         longer than the {max_model_len} that the model allows"
    )]
    TooLong { name: String, row: usize, num_tokens: usize, max_tokens: u32, max_model_len: usize },
    #[error("suite {name}, row {row} (from 0): the prompt is empty")]
    Empty { name: String, row: usize },
}

impl Asked {
    /// Reads the rows of `suite`, whose relative path begins in `data_dir`, and makes their prompts.
    ///
    /// # Errors
    /// Data that is not there, with where it can be had, and the first row that cannot be asked.
    pub fn load(suite: Suite, data_dir: &Path, model: Model<'_>) -> Result<Self, SuiteError> {
        let name = || suite.name.clone();
        let dataset = dataset(&suite, data_dir)?;
        let chat_template = if suite.prompt.chat { Some(ChatTemplate::load(model.folder)) } else { None };
        let chat_template =
            chat_template.transpose().map_err(|source| SuiteError::ChatTemplate { name: name(), source })?;
        let builder = PromptBuilder::new(&suite.prompt, chat_template)
            .map_err(|source| SuiteError::Prompt { name: name(), source })?;
        let functions = suite.rewards.iter().map(RewardFunction::new).collect::<Result<Vec<_>, _>>();
        let functions = functions.map_err(|source| SuiteError::Reward { name: name(), source })?;
        let num_prompts = if suite.num_prompts == 0 { dataset.len() } else { suite.num_prompts };
        let mut prompts = Vec::new();
        for (row, columns) in dataset.rows().iter().enumerate().take(num_prompts) {
            for function in &functions {
                let checked = function.check_columns(columns);
                checked.map_err(|source| SuiteError::Columns { name: name(), row, source })?;
            }
            let text = builder.render(columns).map_err(|source| SuiteError::Prompt { name: name(), source })?;
            let tokens = model.tokenizer.encode(&text);
            let token_ids = tokens.map_err(|source| SuiteError::Tokenizer { name: name(), source })?;
            if token_ids.is_empty() {
                return Err(SuiteError::Empty { name: name(), row });
            }
            let (num_tokens, max_tokens) = (token_ids.len(), suite.sampling.max_tokens);
            if num_tokens + max_tokens as usize > model.max_model_len {
                let max_model_len = model.max_model_len;
                return Err(SuiteError::TooLong { name: name(), row, num_tokens, max_tokens, max_model_len });
            }
            let (id, columns) = (PromptId(row as u64), columns.clone());
            prompts.push(Prompt { id, text, token_ids, columns, origin: Origin::default() });
        }
        Ok(Self { suite, prompts })
    }

    /// What is to be sampled for some of the prompts.
    #[must_use]
    pub fn request(&self, prompts: Vec<Prompt>, seed: u64, min_version: PolicyVersion) -> RolloutRequest {
        RolloutRequest {
            prompts,
            num_generations: self.suite.num_samples,
            sampling: self.suite.sampling.clone(),
            seed,
            rewards: self.suite.rewards.clone(),
            min_version,
        }
    }
}

fn dataset(suite: &Suite, data_dir: &Path) -> Result<Dataset, SuiteError> {
    let name = suite.name.clone();
    match &suite.questions {
        Questions::Countdown(puzzles) => {
            let source = puzzles.with_seed(PUZZLE_SEED);
            source.generate().map_err(|source| SuiteError::Countdown { name, source })
        }
        Questions::File(path) => {
            let path = data_dir.join(path);
            if !path.exists() {
                let known = suite.origin.map(|origin| format!("{origin}; ")).unwrap_or_default();
                let where_from = format!("{known}put it there, or name its folder by eval.data_dir or --data-dir");
                return Err(SuiteError::NoData { name, path, where_from });
            }
            Dataset::load(&path, Part::default(), &suite.columns).map_err(|source| SuiteError::Data { name, source })
        }
    }
}
