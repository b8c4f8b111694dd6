//! The Jinja dialect that chat and prompt templates are written in: that of transformers' `apply_chat_template`.

mod strftime;
mod tojson;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};

use crate::text::is_python_space;

/// Instructions that one rendering may take: thousands of messages, but not an endless loop.
const FUEL: u64 = 10_000_000;

/// What differs between the templates that come with models and those that people write in recipes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// As in transformers: one line break at the end is dropped, what is undefined prints as nothing.
    Chat,
    /// The text stands as it is written, and what is undefined is an error.
    Prompt,
}

/// An environment with transformers' settings, filters and functions, and without `strftime_now`.
pub(crate) fn environment(dialect: Dialect) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .keep_trailing_newline(dialect == Dialect::Prompt)
        .build()?;
    environment.set_syntax(syntax);
    if dialect == Dialect::Prompt {
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
    }
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(python_method);
    environment.add_filter("tojson", tojson::tojson);
    environment.add_filter("trim", trim);
    environment.add_function("raise_exception", raise_exception);
    Ok(environment)
}

/// Gives templates `strftime_now`, for `unix_seconds` in UTC. Without it they fall back on a date of their own.
pub(crate) fn set_time(environment: &mut Environment<'static>, unix_seconds: i64) {
    environment.add_function("strftime_now", move |format: &str| strftime::strftime(format, unix_seconds));
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which mark the assistant's text for a mask that is taken from
/// tokens here, by tags that do nothing, so that the white space around them is treated alike.
pub(crate) fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        text.push_str(before);
        text.push_str("{%");
        rest = tag;
        let Some((inside, _)) = tag.split_once("%}") else { break };
        let name = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match name {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        text.push_str(&inside.replacen(name, replacement, 1));
        rest = &tag[inside.len()..];
    }
    text.push_str(rest);
    text
}

fn raise_exception(message: &str) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// Jinja's `trim`.
fn trim(value: &Value, characters: Option<&str>) -> String {
    let text = value.to_string();
    match characters {
        Some(characters) => text.trim_matches(|c| characters.contains(c)).to_owned(),
        None => text.trim_matches(is_python_space).to_owned(),
    }
}

/// The methods of Python's types. Stripping is our own, since Python counts more characters as space than Rust.
fn python_method(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), method, arguments) {
        (Some(text), "strip", []) => Ok(text.trim_matches(is_python_space).into()),
        (Some(text), "lstrip", []) => Ok(text.trim_start_matches(is_python_space).into()),
        (Some(text), "rstrip", []) => Ok(text.trim_end_matches(is_python_space).into()),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(source: &str, context: serde_json::Value, expect: &str) {
        let environment = environment(Dialect::Chat).unwrap();
        assert_eq!(environment.render_str(source, minijinja::Value::from(Serde(context))).unwrap(), expect);
    }

    #[test]
    fn values_print_as_in_python() {
        check("{{ a }}", json!({"a": [19, 36, 55, 7]}), "[19, 36, 55, 7]");
        check("{{ a }}", json!({"a": ["x", "it's"]}), "['x', \"it's\"]");
        check("{{ a }} {{ b }} {{ c }}", json!({"a": true, "b": null, "c": 1.0}), "True None 1.0");
        check("{{ a }}", json!({"a": {"z": 1, "b": [null, false]}}), "{'z': 1, 'b': [None, False]}");
    }

    #[test]
    fn python_methods_loops_and_namespaces_work() {
        check("{{ a.strip().split('</think>')[-1].lstrip('\\n') }}", json!({"a": " x</think>\ny "}), "y");
        check("{{ a.strip() }}{{ a | trim }}{{ a.strip('\x1c') }}", json!({"a": "\x1c x \x1f"}), "xx x \x1f");
        check("{{ a | trim('x') }}{{ 5 | trim }}", json!({"a": "xaxbx"}), "axb5");
        check("{% for x in a %}{% if x > 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", json!({"a": [1, 2, 3]}), "12");
        check(
            "{% set n = namespace(last=0) %}{% for x in a[::-1] %}{% set n.last = x %}{% endfor %}{{ n.last }}",
            json!({"a": [1, 2, 3]}),
            "1",
        );
    }

    #[test]
    fn generation_tags_do_nothing() {
        let source = without_generation_tags("a\n  {%- generation %}\nb{% endgeneration -%}  c");
        assert_eq!(source, "a\n  {%- if true %}\nb{% endif -%}  c");
        check(&source, json!({}), "abc");
        assert_eq!(without_generation_tags("{% generations %}{% x"), "{% generations %}{% x");
    }

    #[test]
    fn endless_templates_run_out_of_fuel() {
        let environment = environment(Dialect::Chat).unwrap();
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}";
        assert_eq!(environment.render_str(source, ()).unwrap_err().kind(), ErrorKind::OutOfFuel);
    }

    #[test]
    fn dates_need_a_time() {
        let mut environment = environment(Dialect::Chat).unwrap();
        let source = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'no date' }}";
        assert_eq!(environment.render_str(source, ()).unwrap(), "no date");
        set_time(&mut environment, 1_700_000_000);
        assert_eq!(environment.render_str(source, ()).unwrap(), "14 Nov 2023");
    }
}
