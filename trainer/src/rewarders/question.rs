//! What a rewarder is asked: a completion, with all that may tell whether it is right.

use std::sync::Arc;

use aha_core::rollout::{Completion, FinishReason, Prompt};
use aha_proto::v1;
use serde_json::{Value, json};

/// Of a question's numbers and the tags of its fields, at most.
const OVERHEAD_BYTES: usize = 64;

/// What the completions of a prompt have in common.
#[derive(Debug)]
pub(super) struct Row {
    prompt_id: u64,
    prompt: String,
    /// A JSON object.
    columns: String,
}

/// A completion to judge.
#[derive(Debug, Clone)]
pub(super) struct Question {
    row: Arc<Row>,
    completion: String,
    num_tokens: u32,
    is_truncated: bool,
    sample_index: u32,
}

impl Row {
    pub(super) fn new(prompt: &Prompt) -> Self {
        let columns = Value::Object(prompt.columns.clone()).to_string();
        Self { prompt_id: prompt.id.0, prompt: prompt.text.clone(), columns }
    }
}

impl Question {
    pub(super) fn new(row: &Arc<Row>, completion: &Completion) -> Self {
        Self {
            row: Arc::clone(row),
            completion: completion.text.clone(),
            num_tokens: completion.token_ids.len() as u32,
            is_truncated: completion.finish_reason != FinishReason::Stop,
            sample_index: completion.sample_index,
        }
    }

    /// About as many as a message for it takes.
    pub(super) fn num_bytes(&self) -> usize {
        self.row.prompt.len() + self.row.columns.len() + self.completion.len() + OVERHEAD_BYTES
    }

    /// For a service.
    pub(super) fn message(&self) -> v1::ScoreItem {
        v1::ScoreItem {
            prompt: self.row.prompt.clone(),
            completion: self.completion.clone(),
            columns: self.row.columns.clone(),
            num_tokens: self.num_tokens,
            is_truncated: self.is_truncated,
            prompt_id: self.row.prompt_id,
            sample_index: self.sample_index,
        }
    }

    /// For a command: the same fields as JSON, without a line break.
    pub(super) fn json(&self) -> String {
        let Row { prompt_id, prompt, columns } = &*self.row;
        let [prompt, completion] = [prompt, &self.completion].map(|text| json!(text));
        let Self { num_tokens, is_truncated, sample_index, .. } = self;
        format!(
            r#"{{"prompt":{prompt},"completion":{completion},"columns":{columns},"num_tokens":{num_tokens},"is_truncated":{is_truncated},"prompt_id":{prompt_id},"sample_index":{sample_index}}}"#
        )
    }
}
