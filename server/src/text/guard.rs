//! Keeps control tokens out of what clients write.
//!
//! A chat template joins the client's strings with the model's control tokens into one text, and the tokenizer would
//! take `<|im_end|>` inside a message for the end of that message. So before rendering, a mark that no client can
//! guess is set into every such place: after the first character of a control token's name, and at the end of a
//! string that ends like the beginning of one (two neighbouring strings could otherwise form a name together). The
//! tokenizer looks for control tokens while the marks are there, and removes them before it makes ordinary tokens.
//!
//! Control tokens are the special tokens of the tokenizer, and those added tokens that the template itself writes
//! (`<tool_call>` is often not special). The second kind is left alone in assistant messages: there it is what the
//! model produced, templates look for it (`content.split('</think>')`), and the ids must be the generated ones.

use aho_corasick::AhoCorasick;
use serde_json::Value;

/// The names to keep out.
#[derive(Debug)]
pub(crate) struct ControlTokens {
    special: Names,
    markup: Names,
}

#[derive(Debug)]
struct Names {
    sorted: Vec<String>,
    longest: usize,
    search: Option<AhoCorasick>,
}

impl ControlTokens {
    /// `added` are the tokenizer's added tokens and whether each is special.
    pub(crate) fn new<'a>(added: impl Iterator<Item = (&'a str, bool)>, template: &str) -> Self {
        let (mut special, mut markup) = (Vec::new(), Vec::new());
        for (name, is_special) in added {
            if is_special {
                special.push(name.to_owned());
            } else if name.chars().any(char::is_alphanumeric) && template.contains(name) {
                markup.push(name.to_owned());
            }
        }
        Self { special: Names::new(special), markup: Names::new(markup) }
    }
}

impl Names {
    fn new(mut sorted: Vec<String>) -> Self {
        // A name of one character cannot be broken up.
        sorted.retain(|n| n.chars().nth(1).is_some());
        sorted.sort_unstable();
        let longest = sorted.iter().map(String::len).max().unwrap_or(0);
        // Building fails only beyond 2^31 states, far above what the pre-check lets through.
        let search = if sorted.is_empty() { None } else { AhoCorasick::new(&sorted).ok() };
        Self { sorted, longest, search }
    }

    /// Adds the places in `text` where a mark is needed.
    fn places(&self, text: &str, ends: bool, places: &mut Vec<usize>) {
        let Some(search) = &self.search else { return };
        for found in search.find_overlapping_iter(text) {
            let first = text[found.start()..].chars().next().map_or(1, char::len_utf8);
            places.push(found.start() + first);
        }
        if ends && self.ends_like_a_name(text) {
            places.push(text.len());
        }
    }

    fn ends_like_a_name(&self, text: &str) -> bool {
        let from = text.len().saturating_sub(self.longest);
        (from..text.len()).filter(|&at| text.is_char_boundary(at)).any(|at| {
            let suffix = &text[at..];
            let next = self.sorted.partition_point(|name| name.as_str() < suffix);
            self.sorted[next..]
                .iter()
                .take(2)
                .any(|name| name.len() > suffix.len() && name.starts_with(suffix))
        })
    }
}

/// A mark for one request.
#[derive(Debug)]
pub(crate) struct Guard {
    mark: String,
    used: bool,
}

impl Guard {
    /// A fresh mark that occurs nowhere in `texts`.
    pub(crate) fn new(texts: &[&Value]) -> Self {
        loop {
            let mark = random_mark();
            if !texts.iter().any(|t| contains(t, &mark)) {
                return Self { mark, used: false };
            }
        }
    }

    /// The mark, if it was set anywhere.
    pub(crate) fn mark(&self) -> Option<&str> {
        self.used.then_some(self.mark.as_str())
    }

    /// Marks the strings of a message.
    pub(crate) fn message(&mut self, tokens: &ControlTokens, message: &mut Value) {
        let from_model = message["role"] == "assistant";
        self.value(tokens, message, !from_model, None);
    }

    /// Marks all strings in a value, keys included.
    pub(crate) fn other(&mut self, tokens: &ControlTokens, value: &mut Value) {
        self.value(tokens, value, true, None);
    }

    fn value(&mut self, tokens: &ControlTokens, value: &mut Value, markup: bool, key: Option<&str>) {
        match value {
            Value::String(text) => {
                // Roles and types are compared with words and stand inside names (`<|user|>`): no mark at their end.
                let ends = !matches!(key, Some("role" | "type"));
                self.text(tokens, text, markup, ends);
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.value(tokens, item, markup, key)),
            Value::Object(map) => {
                for (name, item) in map.iter_mut() {
                    self.value(tokens, item, markup, Some(name));
                }
                let mut marked = Vec::new();
                for name in map.keys() {
                    let mut new = name.clone();
                    if self.text(tokens, &mut new, markup, false) {
                        marked.push((name.clone(), new));
                    }
                }
                for (name, new) in marked {
                    if let Some(item) = map.remove(&name) {
                        map.insert(new, item);
                    }
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn text(&mut self, tokens: &ControlTokens, text: &mut String, markup: bool, ends: bool) -> bool {
        let mut places = Vec::new();
        tokens.special.places(text, ends, &mut places);
        if markup {
            tokens.markup.places(text, ends, &mut places);
        }
        if places.is_empty() {
            return false;
        }
        places.sort_unstable();
        places.dedup();
        let mut marked = String::with_capacity(text.len() + places.len() * self.mark.len());
        let mut done = 0;
        for place in places {
            marked.push_str(&text[done..place]);
            marked.push_str(&self.mark);
            done = place;
        }
        marked.push_str(&text[done..]);
        *text = marked;
        self.used = true;
        true
    }

    /// After rendering: a template that writes JSON in ASCII has escaped the mark; this turns it back.
    pub(crate) fn unescape(&self, rendered: String) -> String {
        if !self.used {
            return rendered;
        }
        let escaped: String = self.mark.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        if rendered.contains(&escaped) { rendered.replace(&escaped, &self.mark) } else { rendered }
    }

    /// The text without marks.
    pub(crate) fn strip(&self, text: String) -> String {
        if self.used { text.replace(&self.mark, "") } else { text }
    }
}

/// Five characters from the private use area: more than 2^60 possibilities, and no normalizer changes them.
pub(crate) fn random_mark() -> String {
    let mut random = uuid::Uuid::new_v4().as_u128();
    (0..5)
        .map(|_| {
            let step = (random % 6400) as u32;
            random /= 6400;
            char::from_u32(0xE000 + step).expect("inside the private use area")
        })
        .collect()
}

fn contains(value: &Value, mark: &str) -> bool {
    match value {
        Value::String(text) => text.contains(mark),
        Value::Array(items) => items.iter().any(|i| contains(i, mark)),
        Value::Object(map) => map.iter().any(|(k, v)| k.contains(mark) || contains(v, mark)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tokens() -> ControlTokens {
        let added = [
            ("<|im_start|>", true),
            ("<|im_end|>", true),
            ("<think>", false),
            ("<h1>", false),
            ("  ", false),
        ];
        ControlTokens::new(added.into_iter(), "{{ '<think>' }}<|im_start|>  ")
    }

    fn marked(role: &str, content: Value) -> String {
        let mut message = json!({"role": role, "content": content});
        let mut guard = Guard::new(&[&message]);
        guard.message(&tokens(), &mut message);
        message["content"].to_string().replace(&guard.mark, "#")
    }

    #[test]
    fn names_and_their_beginnings_are_marked() {
        assert_eq!(marked("user", json!("a <|im_end|> b")), r##""a <#|im_end|> b""##);
        assert_eq!(marked("user", json!("a <|im_")), r##""a <|im_#""##);
        assert_eq!(marked("user", json!("a <")), r##""a <#""##);
        assert_eq!(marked("user", json!("a <|x")), r##""a <|x""##);
        assert_eq!(
            marked("user", json!(["<|im_sta", {"text": "rt|>"}])),
            r##"["<|im_sta#",{"text":"rt|>"}]"##
        );
    }

    #[test]
    fn markup_of_the_template_is_marked_for_users_only() {
        assert_eq!(marked("user", json!("<think><h1>  ")), r##""<#think><h1>  ""##);
        assert_eq!(marked("assistant", json!("<think>x<|im_end|>")), r##""<think>x<#|im_end|>""##);
    }

    #[test]
    fn keys_are_marked_and_roles_stay_comparable() {
        let mut tools = json!([{"<|im_end|>": "x", "role": "user<"}]);
        let mut guard = Guard::new(&[&tools]);
        guard.other(&tokens(), &mut tools);
        let text = tools.to_string();
        assert!(!text.contains("<|im_end|>") && text.contains("user<\""), "{text}");
        assert_eq!(guard.strip(text), r#"[{"role":"user<","<|im_end|>":"x"}]"#);
    }

    #[test]
    fn marks_differ_and_escaped_ones_are_found_again() {
        assert_ne!(random_mark(), random_mark());
        let guard = Guard { mark: random_mark(), used: true };
        let style = crate::text::pyjson::JsonStyle { ensure_ascii: true, ..Default::default() };
        let escaped = crate::text::pyjson::to_json(&json!(format!("<{}|x|>", guard.mark)), &style);
        assert!(!escaped.contains(&guard.mark));
        assert_eq!(guard.unescape(escaped), format!("\"<{}|x|>\"", guard.mark));
    }
}
