//! Messages to text, through the template that comes with a model, byte for byte as transformers'
//! `apply_chat_template(..., tokenize=False)`.

use std::path::{Path, PathBuf};

use minijinja::Environment;
use minijinja::value::Serde;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::jinja::{self, Dialect};
use crate::text::{python_rstrip, python_strip};

/// Put after the final message to find its end in the rendered text, as transformers does. The space at its end shows
/// whether the template stripped the message.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

const TEMPLATE_NAME: &str = "chat_template";

/// The names that a message's reasoning is passed under; templates read the first.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The special tokens that templates may name.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A model's chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special_tokens: Map<String, Value>,
}

/// One message of a chat: `role`, `content` and whatever else the template reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message(pub Map<String, Value>);

/// How the rendered text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// After the last message, as it is.
    Closed,
    /// With the head of a new assistant message (`add_generation_prompt`).
    GenerationPrompt,
    /// Inside the last message, right after its content (`continue_final_message`).
    ContinueFinalMessage,
}

#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    #[error("cannot read {path}: {reason}", path = path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error(
        "{model} has no chat template: no chat_template.jinja, and none in tokenizer_config.json; \
         use an instruction-tuned model's tokenizer files, or prompts without a chat template",
        model = model.display()
    )]
    Missing { model: PathBuf },
    #[error("{path} has the chat templates {names:?}, and none of them is named \"default\"", path = path.display())]
    NoDefault { path: PathBuf, names: Vec<String> },
    #[error("the chat template is malformed: {0}")]
    Malformed(#[source] minijinja::Error),
    #[error("the chat template failed: {0}")]
    Failed(#[source] minijinja::Error),
    #[error("there are no messages to render")]
    NoMessages,
    #[error("the final message has no text in \"content\" to continue")]
    NothingToContinue,
    #[error(
        "the chat template does not render the final message's content {content:?} as it is, so it cannot be continued"
    )]
    NotContinued { content: String },
}

impl ChatTemplate {
    /// Finds the template of a Hugging Face folder: `chat_template.jinja`, or `chat_template` in
    /// `tokenizer_config.json`, there the one named `default` if there are several.
    ///
    /// # Errors
    /// No template, unreadable files, and templates that are not Jinja.
    pub fn load(model: &Path) -> Result<Self, ChatTemplateError> {
        let config_path = model.join("tokenizer_config.json");
        let config = read_object(&config_path)?.unwrap_or_default();
        let source = match read(&model.join("chat_template.jinja"))? {
            Some(source) => source,
            None => template_of_config(config.get("chat_template"), &config_path)?
                .ok_or_else(|| ChatTemplateError::Missing { model: model.to_owned() })?,
        };
        // Old folders keep the special tokens in a file of their own.
        let map = read_object(&model.join("special_tokens_map.json"))?.unwrap_or_default();
        let token = |name: &str| config.get(name).and_then(token_text).or_else(|| map.get(name).and_then(token_text));
        let tokens = SPECIAL_TOKENS.iter().filter_map(|&name| Some((name.to_owned(), Value::String(token(name)?))));
        Self::new(&source, tokens.collect())
    }

    /// A template from its source. `special_tokens` maps names such as `bos_token` to their texts.
    ///
    /// # Errors
    /// A source that is not Jinja.
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<Self, ChatTemplateError> {
        let source = source.replace("\r\n", "\n");
        let mut environment = jinja::environment(Dialect::Chat).map_err(ChatTemplateError::Malformed)?;
        environment
            .add_template_owned(TEMPLATE_NAME, jinja::without_generation_tags(&source))
            .map_err(ChatTemplateError::Malformed)?;
        Ok(Self { environment, source, special_tokens })
    }

    /// The same template with a clock that stands at `unix_seconds`, in UTC. Without one, templates that print the date
    /// print the one they hold for that case, and a prompt is the same every day.
    #[must_use]
    pub fn at_time(mut self, unix_seconds: i64) -> Self {
        jinja::set_time(&mut self.environment, unix_seconds);
        self
    }

    /// The template's source.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `messages`. `variables` are what the template reads beside them: `tools`, `documents`,
    /// `enable_thinking`, ... (transformers' `chat_template_kwargs`).
    ///
    /// # Errors
    /// No messages, exceptions that the template raises, and a final message that cannot be continued.
    pub fn render(
        &self,
        messages: &[Message],
        ending: Ending,
        variables: &Map<String, Value>,
    ) -> Result<String, ChatTemplateError> {
        let mut messages: Vec<_> = messages.iter().map(Message::normalised).collect();
        let last = messages.last_mut().ok_or(ChatTemplateError::NoMessages)?;
        if ending != Ending::ContinueFinalMessage {
            return self.render_messages(&messages, ending, variables);
        }
        let content = last.append_to_content(CONTINUE_TAG).ok_or(ChatTemplateError::NothingToContinue)?;
        let rendered = self.render_messages(&messages, ending, variables)?;
        until_tag(&rendered, &content).map(str::to_owned).ok_or(ChatTemplateError::NotContinued { content })
    }

    fn render_messages(
        &self,
        messages: &[Message],
        ending: Ending,
        variables: &Map<String, Value>,
    ) -> Result<String, ChatTemplateError> {
        let mut context = self.special_tokens.clone();
        // Templates tell "no tools" by None.
        context.insert("tools".to_owned(), Value::Null);
        context.insert("documents".to_owned(), Value::Null);
        context.extend(variables.clone());
        context.insert("messages".to_owned(), json!(messages));
        context.insert("add_generation_prompt".to_owned(), json!(ending == Ending::GenerationPrompt));
        let template = self.environment.get_template(TEMPLATE_NAME).map_err(ChatTemplateError::Failed)?;
        template.render(minijinja::Value::from(Serde(context))).map_err(ChatTemplateError::Failed)
    }
}

impl Message {
    /// A message of text.
    #[must_use]
    pub fn new(role: &str, content: &str) -> Self {
        Self([("role".to_owned(), json!(role)), ("content".to_owned(), json!(content))].into_iter().collect())
    }

    /// As transformers hands it to a template: without fields that are null, reasoning under both its names.
    fn normalised(&self) -> Self {
        let fields = self.0.iter().filter(|(_, value)| !value.is_null());
        let mut fields: Map<String, Value> = fields.map(|(name, value)| (name.clone(), value.clone())).collect();
        let Some(reasoning) = REASONING_FIELDS.iter().find_map(|field| fields.get(*field)).cloned() else {
            return Self(fields);
        };
        fields.insert("reasoning_content".to_owned(), reasoning.clone());
        let thinking = fields.shift_remove("thinking").unwrap_or(reasoning);
        fields.shift_insert(0, "thinking".to_owned(), thinking);
        Self(fields)
    }

    /// Lengthens the content, or the last text block of it, and returns what it was.
    fn append_to_content(&mut self, tail: &str) -> Option<String> {
        let text = match self.0.get_mut("content")? {
            Value::Array(blocks) => blocks.iter_mut().rev().find_map(|block| block.get_mut("text"))?,
            content => content,
        };
        let Value::String(text) = text else { return None };
        let before = text.clone();
        text.push_str(tail);
        Some(before)
    }
}

/// The rendered text up to the tag after the final message, whose content must be in it. Where the template stripped
/// the message, the space before the tag goes as well.
fn until_tag<'a>(rendered: &'a str, content: &str) -> Option<&'a str> {
    let (before, after) = rendered.rsplit_once(CONTINUE_TAG.trim_end())?;
    if !rendered.contains(python_strip(content)) {
        return None;
    }
    Some(if after.starts_with(' ') { before } else { python_rstrip(before) })
}

/// The template in `tokenizer_config.json`: a text, or a list of `{"name", "template"}`.
fn template_of_config(value: Option<&Value>, path: &Path) -> Result<Option<String>, ChatTemplateError> {
    let templates = match value {
        Some(Value::String(source)) => return Ok(Some(source.clone())),
        Some(Value::Array(templates)) => templates,
        _ => return Ok(None),
    };
    let text = |template: &Value, field: &str| template.get(field).and_then(Value::as_str).map(str::to_owned);
    let default = templates.iter().find(|template| text(template, "name").as_deref() == Some("default"));
    match default.and_then(|template| text(template, "template")) {
        Some(source) => Ok(Some(source)),
        None => {
            let names = templates.iter().filter_map(|template| text(template, "name")).collect();
            Err(ChatTemplateError::NoDefault { path: path.to_owned(), names })
        }
    }
}

/// A special token is written as its text, or as an object with its text as `content`.
fn token_text(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, ChatTemplateError> {
    let Some(text) = read(path)? else { return Ok(None) };
    let object = serde_json::from_str(&text)
        .map_err(|error| ChatTemplateError::Unreadable { path: path.to_owned(), reason: error.to_string() })?;
    Ok(Some(object))
}

/// `None` where there is no such file.
fn read(path: &Path) -> Result<Option<String>, ChatTemplateError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ChatTemplateError::Unreadable { path: path.to_owned(), reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests;
