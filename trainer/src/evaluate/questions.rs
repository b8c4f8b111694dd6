//! The questions of a suite, as prompts.

use std::path::Path;

use aha_core::chat_template::ChatTemplate;
use aha_core::config::{Questions, Suite};
use aha_core::dataset::{Dataset, Part, Row};
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::prompt::PromptBuilder;
use aha_core::reward::RewardFunction;
use aha_core::rollout::{Origin, Prompt};
use aha_core::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow, ensure};

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

impl Asked {
    /// Reads the rows of `suite`, whose relative path begins in `data_dir`, and makes their prompts.
    ///
    /// # Errors
    /// Data that is not there, with where it can be had, and the first row that cannot be asked.
    pub fn load(suite: Suite, data_dir: &Path, model: Model<'_>) -> Result<Self> {
        let prompts = prompts(&suite, data_dir, model).with_context(|| format!("suite {}", suite.name))?;
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

fn prompts(suite: &Suite, data_dir: &Path, model: Model<'_>) -> Result<Vec<Prompt>> {
    let dataset = dataset(suite, data_dir)?;
    let chat_template = if suite.prompt.chat { Some(ChatTemplate::load(model.folder)) } else { None };
    let chat_template =
        chat_template.transpose().map_err(|error| anyhow!("{error}; or set the suite's prompt, with chat: false"))?;
    let builder = PromptBuilder::new(&suite.prompt, chat_template)?;
    let functions = suite.rewards.iter().map(RewardFunction::new).collect::<Result<Vec<_>, _>>()?;
    let num_prompts = if suite.num_prompts == 0 { dataset.len() } else { suite.num_prompts };
    let prompt = |(row, columns): (usize, &Row)| {
        for function in &functions {
            function
                .check_columns(columns)
                .map_err(|error| anyhow!("{error}; map the names in the suite's columns"))?;
        }
        let text = builder.render(columns)?;
        let token_ids = model.tokenizer.encode(&text)?;
        ensure!(!token_ids.is_empty(), "the prompt is empty");
        let (num_tokens, max_tokens, longest) = (token_ids.len(), suite.sampling.max_tokens, model.max_model_len);
        ensure!(
            num_tokens + max_tokens as usize <= longest,
            "a prompt of {num_tokens} tokens and max_completion_length {max_tokens} are together longer than the {longest} \
             that the model allows"
        );
        let (id, columns) = (PromptId(row as u64), columns.clone());
        Ok(Prompt { id, text, token_ids, columns, origin: Origin::default() })
    };
    let rows = dataset.rows().iter().enumerate().take(num_prompts);
    rows.map(|row| prompt(row).with_context(|| format!("row {} (from 0)", row.0))).collect()
}

fn dataset(suite: &Suite, data_dir: &Path) -> Result<Dataset> {
    match &suite.questions {
        Questions::Countdown(puzzles) => puzzles.with_seed(PUZZLE_SEED).generate().context("countdown"),
        Questions::File(path) => {
            let path = data_dir.join(path);
            let origin = suite.origin.map(|origin| format!("{origin}; ")).unwrap_or_default();
            ensure!(
                path.exists(),
                "there is no {}: {origin}put it there, or name its folder by eval.data_dir or --data-dir",
                path.display()
            );
            Ok(Dataset::load(&path, Part::default(), &suite.columns)?)
        }
    }
}
