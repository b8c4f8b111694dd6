//! Rendering against transformers' own texts, and how templates are found.

use super::*;

#[derive(Deserialize)]
struct Golden {
    /// Name to source and special tokens.
    templates: Map<String, Value>,
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Case {
    template: String,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Map<String, Value>,
    /// `None` where transformers raises.
    expected: Option<String>,
}

/// `tests/golden/make_chat_templates.py` writes the cases with transformers.
#[test]
fn every_text_is_transformers_own() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/chat_template");
    let mut cases = 0;
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let golden: Golden = serde_json::from_str(&text).unwrap();
        for case in &golden.cases {
            let template = &golden.templates[&case.template];
            let tokens = template["special_tokens"].as_object().unwrap().clone();
            let template = ChatTemplate::new(template["source"].as_str().unwrap(), tokens).unwrap();
            let ending = match (case.add_generation_prompt, case.continue_final_message) {
                (false, false) => Ending::Closed,
                (true, false) => Ending::GenerationPrompt,
                (_, true) => Ending::ContinueFinalMessage,
            };
            let rendered = template.render(&case.messages, ending, &case.variables);
            if rendered.as_ref().ok() != case.expected.as_ref() {
                wrong.push(format!("{case:#?}\nbut got {rendered:?}"));
            }
            cases += 1;
        }
    }
    assert!(cases > 500, "{cases}");
    assert!(wrong.is_empty(), "{} of {cases} are not:\n{}", wrong.len(), wrong.join("\n\n"));
}

fn render(source: &str, messages: &[Message], ending: Ending) -> Result<String, ChatTemplateError> {
    ChatTemplate::new(source, Map::new()).unwrap().render(messages, ending, &Map::new())
}

#[track_caller]
fn check_error(source: &str, messages: &[Message], ending: Ending, expect: &str) {
    let error = render(source, messages, ending).unwrap_err().to_string();
    assert!(error.contains(expect), "{error}");
}

#[test]
fn failures_say_what_was_wrong() {
    let user = [Message::new("user", "hi")];
    check_error("x", &[], Ending::Closed, "no messages");
    check_error("{{ raise_exception('roles must alternate') }}", &user, Ending::Closed, "roles must alternate");
    check_error("{{ messages[9].content }}", &user, Ending::Closed, "failed: undefined value");
    check_error("content", &user, Ending::ContinueFinalMessage, "content \"hi\" as it is");
    let silent = [Message([("role".to_owned(), json!("assistant"))].into_iter().collect())];
    check_error("content", &silent, Ending::ContinueFinalMessage, "no text in \"content\"");
    let malformed = ChatTemplate::new("{% if %}", Map::new()).unwrap_err().to_string();
    assert!(malformed.contains("malformed: syntax error"), "{malformed}");
}

/// Writes `files` into a model folder and renders one message with the template that is found there.
#[track_caller]
fn check_found(files: &[(&str, Value)], expect: Result<&str, &str>) {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let rendered = ChatTemplate::load(folder.path())
        .and_then(|template| template.render(&[Message::new("user", "hi")], Ending::Closed, &Map::new()));
    match (rendered, expect) {
        (Ok(text), Ok(expect)) => assert_eq!(text, expect),
        (Err(error), Err(expect)) => assert!(error.to_string().contains(expect), "{error}"),
        (rendered, _) => panic!("{rendered:?}, expected {expect:?}"),
    }
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let file = ("chat_template.jinja", json!("file {{ messages[0].content }}\n"));
    let text = ("tokenizer_config.json", json!({"chat_template": "config", "bos_token": "<s>"}));
    check_found(&[file.clone(), text.clone()], Ok("file hi"));
    check_found(&[text], Ok("config"));
    let tokens = json!({"chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}", "bos_token": {"content": "<s>"},
                        "pad_token": null});
    let map = ("special_tokens_map.json", json!({"eos_token": "</s>", "bos_token": "ignored"}));
    check_found(&[("tokenizer_config.json", tokens), map], Ok("<s></s>"));
    let named = |name: &str| json!({"chat_template": [{"name": name, "template": "named"}]});
    check_found(&[("tokenizer_config.json", named("default"))], Ok("named"));
    check_found(&[("tokenizer_config.json", named("rag"))], Err("[\"rag\"]"));
    check_found(&[("tokenizer_config.json", json!({}))], Err("has no chat template"));
    check_found(&[], Err("has no chat template"));
    check_found(&[("tokenizer_config.json", json!("{"))], Err("tokenizer_config.json: EOF"));
}

#[test]
fn the_clock_is_the_caller_s() {
    let source = "{{ strftime_now('%Y') if strftime_now is defined else 'undated' }}";
    let template = ChatTemplate::new(source, Map::new()).unwrap();
    let messages = [Message::new("user", "hi")];
    assert_eq!(template.render(&messages, Ending::Closed, &Map::new()).unwrap(), "undated");
    assert_eq!(template.at_time(0).render(&messages, Ending::Closed, &Map::new()).unwrap(), "1970");
}
