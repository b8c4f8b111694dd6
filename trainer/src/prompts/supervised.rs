//! Examples of supervised fine-tuning: a row's prompt with its answer, or a whole conversation.

use aha_core::chat_template::{ChatTemplate, Ending, Message};
use aha_core::config::{PromptTemplate, Sft};
use aha_core::ids::TokenId;
use aha_core::prompt::PromptBuilder;
use serde_json::{Map, Value};

use super::{At, PromptSource, PromptsError, in_source};

/// What the model is shown, with the tokens that it is to learn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    pub prompt: Vec<TokenId>,
    /// From the first token that carries loss.
    pub completion: Vec<TokenId>,
    /// `[completion]`: false for what others say later in a conversation.
    pub is_target: Vec<bool>,
}

impl PromptSource {
    /// The examples of a supervised step, counted from 0, in the order of [`Self::step_prompts`].
    ///
    /// # Errors
    /// An example that cannot be made or is longer than `sft.max_length`, by row.
    pub fn supervised(&self, step: u64, sft: &Sft) -> Result<Vec<Example>, PromptsError> {
        self.examples(&self.positions(step, sft.batch_size), sft)
    }

    /// Those of the first `count` held-out rows, or of all that there are.
    ///
    /// # Errors
    /// As for [`Self::supervised`].
    pub fn held_out_examples(&self, count: usize, sft: &Sft) -> Result<Vec<Example>, PromptsError> {
        let mut rows = self.held_out_rows(|_| true);
        rows.truncate(count);
        self.examples(&rows, sft)
    }

    fn examples(&self, rows: &[At], sft: &Sft) -> Result<Vec<Example>, PromptsError> {
        let plain = PromptTemplate { chat: false, user: sft.completion.clone(), ..PromptTemplate::default() };
        let answers = PromptBuilder::new(&plain, None).map_err(PromptsError::Completion)?;
        let max_length = sft.max_length.min(self.limits.context);
        let example = |&at: &At| {
            let example = match &sft.messages {
                Some(column) => self.conversation(at, column)?,
                None => self.answered(at, &answers)?,
            };
            let (num_prompt, num_completion) = (example.prompt.len(), example.completion.len());
            if num_prompt + num_completion > max_length {
                let reason = format!(
                    "prompt and completion of {num_prompt} + {num_completion} tokens are longer than {max_length}, \
                     sft.max_length or the model's context"
                );
                return Err(PromptsError::Row { row: self.sources[at.source].number(at.row), reason });
            }
            Ok(example)
        };
        let named = |at: &At| example(at).map_err(|error| in_source(&self.sources[at.source].origin.source, error));
        rows.iter().map(named).collect()
    }

    /// The row's prompt, and what `answers` makes of it.
    fn answered(&self, at: At, answers: &PromptBuilder) -> Result<Example, PromptsError> {
        let (_, prompt) = self.render(at)?;
        let text = answers.render(self.sources[at.source].row(at.row)).map_err(PromptsError::Completion)?;
        let mut completion = self.encode(at, &text)?;
        completion.extend(self.eos_token_id);
        Ok(Example { prompt, is_target: vec![true; completion.len()], completion })
    }

    /// The messages in `column`, through the model's chat template. Each turn of the assistant is what the template adds
    /// to the head of such a turn, with what ends it. Pieces are tokenised one by one, as they are when the model answers.
    fn conversation(&self, at: At, column: &str) -> Result<Example, PromptsError> {
        let (rows, column) = (&self.sources[at.source], column.to_owned());
        let row = rows.number(at.row);
        let bad = |reason: &str| PromptsError::Messages { row, column: column.clone(), reason: reason.to_owned() };
        let messages = messages(rows.row(at.row).get(&column))
            .ok_or_else(|| bad("must be a list of objects with role and content"))?;
        let template = self.chat_template.as_ref().ok_or_else(|| bad("needs the model's chat template"))?;
        let pieces = pieces(template, &messages)?
            .ok_or_else(|| bad("is not rendered turn by turn: the chat template changes what was said before"))?;
        let mut example = Example { prompt: Vec::new(), completion: Vec::new(), is_target: Vec::new() };
        for (text, is_target) in pieces {
            let tokens = self.encode(at, &text)?;
            if !is_target && example.completion.is_empty() {
                example.prompt.extend(tokens);
            } else {
                example.is_target.extend(vec![is_target; tokens.len()]);
                example.completion.extend(tokens);
            }
        }
        // What follows the last turn of the assistant teaches nothing.
        let end = example.is_target.iter().rposition(|&is_target| is_target).map_or(0, |last| last + 1);
        if end == 0 {
            return Err(bad("has no message of the assistant to learn from"));
        }
        if example.prompt.is_empty() {
            return Err(bad("begins with the assistant, whose first token nothing predicts"));
        }
        example.completion.truncate(end);
        example.is_target.truncate(end);
        Ok(example)
    }
}

fn messages(column: Option<&Value>) -> Option<Vec<Message>> {
    let message = |value: &Value| {
        let fields = value.as_object()?;
        (fields.get("role")?.is_string() && fields.contains_key("content")).then(|| Message(fields.clone()))
    };
    column?.as_array()?.iter().map(message).collect()
}

/// The conversation's text in pieces, with whether the assistant says them. `None` where the text of its beginning is not
/// the beginning of its text.
fn pieces(template: &ChatTemplate, messages: &[Message]) -> Result<Option<Vec<(String, bool)>>, PromptsError> {
    let render = |count: usize, ending| match count {
        0 => Ok(String::new()),
        _ => template.render(&messages[..count], ending, &Map::new()),
    };
    let whole = render(messages.len(), Ending::Closed)?;
    let mut pieces = Vec::new();
    let mut done = 0;
    let turns = (0..messages.len()).filter(|&index| messages[index].0["role"] == "assistant");
    for turn in turns {
        let (before, after) = (render(turn, Ending::GenerationPrompt)?, render(turn + 1, Ending::Closed)?);
        if before.len() < done || !after.starts_with(&before) || !whole.starts_with(&after) {
            return Ok(None);
        }
        // The line break after the token that ends a turn is the template's, not the assistant's.
        let end = after.trim_end_matches('\n').len().max(before.len());
        pieces.push((whole[done..before.len()].to_owned(), false));
        pieces.push((whole[before.len()..end].to_owned(), true));
        done = end;
    }
    Ok(Some(pieces))
}
