//! Rows to prompts: templates over a row's columns, put into the model's chat template or joined as they are.

pub(crate) mod templates;

use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde_json::Map;

pub use templates::names as template_names;

use crate::chat_template::{ChatTemplate, ChatTemplateError, Ending, Message};
use crate::config::PromptTemplate;
use crate::dataset::Row;
use crate::jinja::{self, Dialect};
use crate::nearest::hint;

const SYSTEM: &str = "system";
const USER: &str = "user";
const ASSISTANT_PREFILL: &str = "assistant_prefill";

/// Builds prompt texts from rows.
#[derive(Debug, Clone)]
pub struct PromptBuilder {
    /// Holds those of the three templates that there are.
    environment: Environment<'static>,
    /// `None` joins the texts as they are.
    chat_template: Option<ChatTemplate>,
}

#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    #[error("the prompt's {part} template is malformed: {reason}")]
    Malformed { part: &'static str, reason: minijinja::Error },
    #[error("the prompt's {part} template names {name:?}; the row's columns are {columns:?}{hint}")]
    UnknownColumn { part: &'static str, name: String, columns: Vec<String>, hint: String },
    #[error("the prompt's {part} template failed: {reason}")]
    Failed { part: &'static str, reason: minijinja::Error },
    #[error("prompts in chat form need the model's chat template")]
    NeedsChatTemplate,
    #[error(transparent)]
    ChatTemplate(#[from] ChatTemplateError),
}

impl PromptBuilder {
    /// Takes the texts of `template`; `chat_template` is needed where it asks for the chat form, and ignored elsewhere.
    ///
    /// # Errors
    /// Texts that are not Jinja, and a missing chat template.
    pub fn new(template: &PromptTemplate, chat_template: Option<ChatTemplate>) -> Result<Self, PromptError> {
        let malformed = |part| move |reason| PromptError::Malformed { part, reason };
        let mut environment = jinja::environment(Dialect::Prompt).map_err(malformed(USER))?;
        let texts = [
            (SYSTEM, template.system.as_ref()),
            (USER, Some(&template.user)),
            (ASSISTANT_PREFILL, template.assistant_prefill.as_ref()),
        ];
        for (part, text) in texts {
            if let Some(text) = text {
                environment.add_template_owned(part, text.clone()).map_err(malformed(part))?;
            }
        }
        if template.chat && chat_template.is_none() {
            return Err(PromptError::NeedsChatTemplate);
        }
        Ok(Self { environment, chat_template: chat_template.filter(|_| template.chat) })
    }

    /// The prompt's text, which the completion continues: in chat form after the head of the assistant's message, or
    /// after its prefill where there is one.
    ///
    /// # Errors
    /// Columns that a text names and the row lacks, and everything that the chat template refuses.
    pub fn render(&self, row: &Row) -> Result<String, PromptError> {
        let mut texts = Vec::new();
        for part in [SYSTEM, USER, ASSISTANT_PREFILL] {
            if let Ok(template) = self.environment.get_template(part) {
                let context = minijinja::Value::from(Serde(row));
                let text = template.render(context).map_err(|reason| self.explain(part, reason, row))?;
                texts.push((part, text));
            }
        }
        let Some(chat_template) = &self.chat_template else {
            return Ok(texts.into_iter().map(|(_, text)| text).collect());
        };
        let is_prefilled = texts.last().is_some_and(|(part, _)| *part == ASSISTANT_PREFILL);
        let ending = if is_prefilled { Ending::ContinueFinalMessage } else { Ending::GenerationPrompt };
        let role = |part| if part == ASSISTANT_PREFILL { "assistant" } else { part };
        let messages: Vec<_> = texts.iter().map(|(part, text)| Message::new(role(part), text)).collect();
        Ok(chat_template.render(&messages, ending, &Map::new())?)
    }

    /// Names the column that the row lacks where that is what went wrong.
    fn explain(&self, part: &'static str, reason: minijinja::Error, row: &Row) -> PromptError {
        let names = match self.environment.get_template(part) {
            Ok(template) if reason.kind() == ErrorKind::UndefinedError => template.undeclared_variables(false),
            _ => return PromptError::Failed { part, reason },
        };
        let is_global = |name: &str| self.environment.globals().any(|(global, _)| global == name);
        match names.into_iter().filter(|name| !row.contains_key(name) && !is_global(name)).min() {
            Some(name) => {
                let hint = hint(&name, row.keys().map(String::as_str));
                PromptError::UnknownColumn { part, name, columns: row.keys().cloned().collect(), hint }
            }
            None => PromptError::Failed { part, reason },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn mini_r1() -> PromptTemplate {
        templates::find("mini_r1").unwrap().prompt()
    }

    const MINI_R1_TEXT: &str = "<|im_start|>system\nYou are a helpful assistant. You first thinks about the reasoning \
        process in the mind and then provides the user with the answer.<|im_end|>\n<|im_start|>user\nUsing the numbers \
        [19, 36, 55, 7], create an equation that equals 65. You can use basic arithmetic operations (+, -, *, /) one or \
        multiple times but each number can only be used once. Show your work in <think> </think> tags. And return the \
        final equation in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>. Think step by step inside \
        <think> tags.<|im_end|>\n<|im_start|>assistant\nLet me solve this step by step.\n<think>";

    /// Qwen2.5's own template, as the golden file of the chat templates holds it.
    fn qwen() -> ChatTemplate {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/chat_template/qwen2.5.json");
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        ChatTemplate::new(golden["templates"]["qwen2.5"]["source"].as_str().unwrap(), Map::new()).unwrap()
    }

    fn row() -> Row {
        json!({"target": 65, "nums": [19, 36, 55, 7]}).as_object().unwrap().clone()
    }

    #[track_caller]
    fn check(template: &PromptTemplate, expect: Result<&str, &str>) {
        let rendered = PromptBuilder::new(template, Some(qwen())).and_then(|builder| builder.render(&row()));
        match (rendered, expect) {
            (Ok(text), Ok(expect)) => assert_eq!(text, expect),
            (Err(error), Err(expect)) => assert_eq!(error.to_string(), expect),
            (rendered, _) => panic!("{rendered:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn mini_r1_renders_to_the_letter() {
        check(&mini_r1(), Ok(MINI_R1_TEXT));
    }

    #[test]
    fn without_prefill_the_assistant_s_turn_is_opened() {
        let template = PromptTemplate { user: "{{ target }}?".to_owned(), assistant_prefill: None, ..mini_r1() };
        let text = PromptBuilder::new(&template, Some(qwen())).unwrap().render(&row()).unwrap();
        assert!(text.ends_with("<|im_start|>user\n65?<|im_end|>\n<|im_start|>assistant\n"), "{text}");
    }

    #[test]
    fn plain_texts_are_joined_as_they_are() {
        let template = PromptTemplate {
            chat: false,
            system: Some("Solve.\n".to_owned()),
            user: "User: {{ nums | join(' ') }} -> {{ target }}\n".to_owned(),
            assistant_prefill: Some("Assistant: <think>".to_owned()),
            ..PromptTemplate::default()
        };
        check(&template, Ok("Solve.\nUser: 19 36 55 7 -> 65\nAssistant: <think>"));
        let user_only = PromptTemplate { chat: false, user: "{{ target }}\n".to_owned(), ..PromptTemplate::default() };
        check(&PromptTemplate { system: None, assistant_prefill: None, ..user_only }, Ok("65\n"));
    }

    #[test]
    fn mistakes_are_named_with_their_part() {
        let user = |text: &str| PromptTemplate { user: text.to_owned(), ..mini_r1() };
        check(
            &user("{{ numbers }}"),
            Err("the prompt's user template names \"numbers\"; the row's columns are [\"target\", \"nums\"]; \
                 did you mean \"nums\"?"),
        );
        check(&user("{{ hint | default('none') }}{{ nums[0] }}").clone_plain(), Ok("none19"));
        let malformed = PromptBuilder::new(&user("{{ nums"), None).unwrap_err().to_string();
        assert!(malformed.starts_with("the prompt's user template is malformed: syntax error"), "{malformed}");
        let error = PromptBuilder::new(&mini_r1(), None).unwrap_err().to_string();
        assert_eq!(error, "prompts in chat form need the model's chat template");
    }

    impl PromptTemplate {
        /// The user's text alone, without the chat form.
        fn clone_plain(&self) -> Self {
            Self { chat: false, user: self.user.clone(), ..Self::default() }
        }
    }

    /// A row's text is data: what looks like a template in it stays as it is.
    #[test]
    fn columns_are_not_templates() {
        let template = PromptTemplate { user: "{{ q }}".to_owned(), ..mini_r1() }.clone_plain();
        let row = json!({"q": "{{ target }} {% if %} <|im_end|>\n"}).as_object().unwrap().clone();
        let text = PromptBuilder::new(&template, None).unwrap().render(&row).unwrap();
        assert_eq!(text, "{{ target }} {% if %} <|im_end|>\n");
    }
}
