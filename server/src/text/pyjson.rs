//! Values as Python writes them.
//!
//! Chat templates are written for Python: `tojson` there is `json.dumps`, and a printed list or truth value looks
//! like Python source. Models were trained on exactly those characters, so they are reproduced here.

use serde_json::Value;

/// How `json.dumps` is asked to write.
#[derive(Debug, Clone, Default)]
pub(crate) struct JsonStyle {
    /// Spaces per level, or everything on one line.
    pub indent: Option<usize>,
    /// Escape everything outside ASCII.
    pub ensure_ascii: bool,
    /// Order the keys of objects.
    pub sort_keys: bool,
    /// Between items, and between key and value; Python's defaults if absent.
    pub separators: Option<(String, String)>,
}

/// `json.dumps(value)` in this style.
pub(crate) fn to_json(value: &Value, style: &JsonStyle) -> String {
    let (item, key) = match (&style.separators, style.indent) {
        (Some((item, key)), _) => (item.as_str(), key.as_str()),
        (None, Some(_)) => (",", ": "),
        (None, None) => (", ", ": "),
    };
    let mut out = String::new();
    Json { style, item, key }.write(value, 0, &mut out);
    out
}

struct Json<'a> {
    style: &'a JsonStyle,
    item: &'a str,
    key: &'a str,
}

impl Json<'_> {
    fn write(&self, value: &Value, level: usize, out: &mut String) {
        match value {
            Value::Null => out.push_str("null"),
            Value::Bool(true) => out.push_str("true"),
            Value::Bool(false) => out.push_str("false"),
            Value::Number(number) => push_number(number, out),
            Value::String(text) => self.string(text, out),
            Value::Array(items) if items.is_empty() => out.push_str("[]"),
            Value::Array(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(i, level + 1, out);
                    self.write(item, level + 1, out);
                }
                self.line(level, out);
                out.push(']');
            }
            Value::Object(map) if map.is_empty() => out.push_str("{}"),
            Value::Object(map) => {
                out.push('{');
                let mut entries: Vec<_> = map.iter().collect();
                if self.style.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(b.0));
                }
                for (i, (name, item)) in entries.into_iter().enumerate() {
                    self.separate(i, level + 1, out);
                    self.string(name, out);
                    out.push_str(self.key);
                    self.write(item, level + 1, out);
                }
                self.line(level, out);
                out.push('}');
            }
        }
    }

    fn separate(&self, index: usize, level: usize, out: &mut String) {
        if index > 0 {
            out.push_str(self.item);
        }
        self.line(level, out);
    }

    fn line(&self, level: usize, out: &mut String) {
        if let Some(indent) = self.style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent.saturating_mul(level)));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{C}' => out.push_str("\\f"),
                c if c < ' ' || (self.style.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `str(value)`: strings bare, everything else as [`repr`].
pub(crate) fn to_str(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => {
            let mut out = String::new();
            repr(other, &mut out);
            out
        }
    }
}

/// `repr(value)`.
fn repr(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Number(number) => push_number(number, out),
        Value::String(text) => repr_string(text, out),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr(item, out);
            }
            out.push(']');
        }
        Value::Object(map) => {
            out.push('{');
            for (i, (name, item)) in map.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr_string(name, out);
                out.push_str(": ");
                repr(item, out);
            }
            out.push('}');
        }
    }
}

fn repr_string(text: &str, out: &mut String) {
    // Single quotes, unless that would need escapes and double quotes would not.
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c < ' ' || c == '\u{7F}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
}

fn push_number(number: &serde_json::Number, out: &mut String) {
    match number.as_f64() {
        Some(float) if number.is_f64() => out.push_str(&python_float(float)),
        _ => out.push_str(&number.to_string()),
    }
}

/// `repr(float)`: the shortest digits that read back, with an exponent below 1e-4 and from 1e16 on.
pub(crate) fn python_float(value: f64) -> String {
    if !value.is_finite() {
        let name = if value.is_nan() { "NaN" } else { "Infinity" };
        return if value < 0.0 { format!("-{name}") } else { name.to_owned() };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn floats_as_python_writes_them() {
        for (value, want) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5, "-2.5"),
        ] {
            assert_eq!(python_float(value), want);
        }
    }

    /// The expected strings are what CPython's `json.dumps` prints.
    #[test]
    fn json_as_python_writes_it() {
        let value = json!({"b": [1, 2.0, null, true], "a": "é<\"\n\u{1}\u{7f}😀", "e": [], "o": {}});
        let plain = JsonStyle::default();
        assert_eq!(
            to_json(&value, &plain),
            "{\"b\": [1, 2.0, null, true], \"a\": \"é<\\\"\\n\\u0001\u{7f}😀\", \"e\": [], \"o\": {}}"
        );
        let ascii = JsonStyle { ensure_ascii: true, sort_keys: true, ..JsonStyle::default() };
        assert_eq!(
            to_json(&value, &ascii),
            "{\"a\": \"\\u00e9<\\\"\\n\\u0001\u{7f}\\ud83d\\ude00\", \"b\": [1, 2.0, null, true], \"e\": [], \"o\": {}}"
        );
        let indented = JsonStyle { indent: Some(2), ..JsonStyle::default() };
        assert_eq!(
            to_json(&json!({"a": [1, {"b": 2}]}), &indented),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ]\n}"
        );
        let tight = JsonStyle { separators: Some((",".into(), ":".into())), ..JsonStyle::default() };
        assert_eq!(to_json(&json!({"a": [1, 2]}), &tight), "{\"a\":[1,2]}");
    }

    #[test]
    fn text_as_python_prints_it() {
        assert_eq!(to_str(&json!("plain")), "plain");
        assert_eq!(to_str(&json!([true, null, "it's", "\"'"])), r#"[True, None, "it's", '"\'']"#);
        assert_eq!(to_str(&json!({"k": 1.0})), "{'k': 1.0}");
    }
}
