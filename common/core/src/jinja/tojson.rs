//! The filter `tojson` with the text of Python's `json.dumps`, which models were trained on.

use std::fmt::Write;

use minijinja::value::{Kwargs, Value as Input, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value;

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, nothing escaped for HTML.
pub(super) fn tojson(value: &Input, arguments: Kwargs) -> Result<Input, Error> {
    let style = Style::from_arguments(&arguments)?;
    let value = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, "no JSON value").with_source(error))?;
    let mut writer = Writer { text: String::new(), style, depth: 0 };
    writer.value(&value);
    Ok(Input::from(writer.text))
}

struct Style {
    ensure_ascii: bool,
    sort_keys: bool,
    /// What a level of nesting is indented by; `None` puts everything on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

impl Style {
    fn from_arguments(arguments: &Kwargs) -> Result<Self, Error> {
        let indent = arguments.get::<Option<Input>>("indent")?.filter(|indent| !indent.is_none());
        let indent = match indent {
            Some(indent) if indent.kind() == ValueKind::String => Some(indent.to_string()),
            Some(indent) => Some(" ".repeat(u16::try_from(indent)?.into())),
            None => None,
        };
        let separators = arguments.get::<Option<Vec<String>>>("separators")?;
        let (item_separator, key_separator) = match separators.as_deref() {
            Some([item, key]) => (item.clone(), key.clone()),
            Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators must be a pair")),
            None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
            None => (", ".to_owned(), ": ".to_owned()),
        };
        let flag = |name| arguments.get::<Option<bool>>(name).map(Option::unwrap_or_default);
        let style = Self {
            ensure_ascii: flag("ensure_ascii")?,
            sort_keys: flag("sort_keys")?,
            indent,
            item_separator,
            key_separator,
        };
        arguments.assert_all_used()?;
        Ok(style)
    }
}

struct Writer {
    text: String,
    style: Style,
    depth: usize,
}

impl Writer {
    fn value(&mut self, value: &Value) {
        match value {
            Value::Null | Value::Bool(_) => self.text.push_str(&value.to_string()),
            Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => self.text.push_str(&python_float(float)),
                None => self.text.push_str(&number.to_string()),
            },
            Value::String(string) => self.string(string),
            Value::Array(items) => self.container(['[', ']'], items, |writer, item| writer.value(item)),
            Value::Object(object) => {
                let mut entries: Vec<_> = object.iter().collect();
                if self.style.sort_keys {
                    entries.sort_by_key(|(name, _)| *name);
                }
                self.container(['{', '}'], &entries, |writer, (name, value)| {
                    writer.string(name);
                    writer.text.push_str(&writer.style.key_separator);
                    writer.value(value);
                });
            }
        }
    }

    fn container<T>(&mut self, [open, close]: [char; 2], items: &[T], write: impl Fn(&mut Self, &T)) {
        self.text.push(open);
        self.depth += 1;
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.text.push_str(&self.style.item_separator);
            }
            self.line_break();
            write(self, item);
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.line_break();
        }
        self.text.push(close);
    }

    fn line_break(&mut self) {
        if let Some(indent) = &self.style.indent {
            self.text.push('\n');
            self.text.push_str(&indent.repeat(self.depth));
        }
    }

    fn string(&mut self, string: &str) {
        self.text.push('"');
        for c in string.chars() {
            match c {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\x08' => self.text.push_str("\\b"),
                '\x0c' => self.text.push_str("\\f"),
                c if c < ' ' || (self.style.ensure_ascii && !(' '..='~').contains(&c)) => self.escape(c),
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }

    fn escape(&mut self, c: char) {
        for unit in c.encode_utf16(&mut [0; 2]) {
            write!(self.text, "\\u{unit:04x}").expect("a String takes every write");
        }
    }
}

/// `repr(float)`: the shortest digits that read back equal, with an exponent below 1e-4 and from 1e16 on.
fn python_float(float: f64) -> String {
    let scientific = format!("{float:e}");
    match scientific.split_once('e').and_then(|(mantissa, exponent)| Some((mantissa, exponent.parse::<i32>().ok()?))) {
        Some((mantissa, exponent)) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{float:?}"),
    }
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(value: Value, filter: &str, expect: &str) {
        let environment = crate::jinja::environment(crate::jinja::Dialect::Chat).unwrap();
        let context = minijinja::Value::from(Serde(json!({"value": value})));
        let text = environment.render_str(&format!("{{{{ value | {filter} }}}}"), context).unwrap();
        assert_eq!(text, expect);
    }

    /// The expected texts are what Python 3.11's `json.dumps` writes.
    #[test]
    fn the_text_is_python_s() {
        check(json!({"b": [1, 2.0, null, true], "a": {}}), "tojson", r#"{"b": [1, 2.0, null, true], "a": {}}"#);
        check(json!("a<b>&'\"\\\n\u{1}\u{7f}é😀"), "tojson", "\"a<b>&'\\\"\\\\\\n\\u0001\u{7f}é😀\"");
        check(json!("é😀\u{7f}"), "tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude00\u007f""#);
        check(json!({"b": 1, "a": []}), "tojson(sort_keys=true)", r#"{"a": [], "b": 1}"#);
        check(json!({"b": [1], "a": {}}), "tojson(indent=2)", "{\n  \"b\": [\n    1\n  ],\n  \"a\": {}\n}");
        check(json!([1, {"a": 2}]), "tojson(separators=(',', ':'))", r#"[1,{"a":2}]"#);
        check(
            json!([1e-5, 1e-4, 1e15, 1e16, 1.5e300, -0.0]),
            "tojson",
            "[1e-05, 0.0001, 1000000000000000.0, 1e+16, 1.5e+300, -0.0]",
        );
        check(json!([u64::MAX, i64::MIN]), "tojson", "[18446744073709551615, -9223372036854775808]");
    }
}
