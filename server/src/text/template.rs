//! Chat templates: messages to one text, and that text to token ids.
//!
//! A template comes with the model and is a small program, so it runs with bounds: a budget of steps (which also
//! bounds memory), a recursion limit, a cap on its output. It can call nothing but `raise_exception` and
//! `strftime_now`, and cannot load other templates. Syntax and white-space rules are those that `transformers` sets;
//! values print as in Python. Each template is tried at load, so a broken one stops the start, not a request.

use crate::text::TextError;
use crate::text::guard::{ControlTokens, Guard, random_mark};
use crate::text::pyjson::{JsonStyle, to_json, to_str};
use crate::text::tokenizer::{Specials, Tokenizer, token_name};
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value as Jinja,
};
use serde_json::{Map, Value, json};
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

/// Steps that one rendering may take; each also pays for 64 bytes of data.
const FUEL: u64 = 10_000_000;
/// How deep macros and blocks may nest.
const RECURSION: usize = 64;
/// The widest indentation a template may ask for.
const MAX_INDENT: usize = 64;
/// How long the try at load may take.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);
/// The cap on the output until [`ChatTemplate::set_max_output`] sets another.
const DEFAULT_MAX_OUTPUT: usize = 16 << 20;
/// The largest template file.
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// Names that a request's template arguments may not use: the server or the template language sets them.
const RESERVED: [&str; 14] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "loop",
    "self",
    "caller",
    "chat_template",
];

/// What a chat template is rendered with.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChatInput<'a> {
    /// The messages, as in the API.
    pub messages: &'a [Value],
    /// Tool definitions, as in the API.
    pub tools: Option<&'a Value>,
    /// Ends with the header of a new assistant message.
    pub add_generation_prompt: bool,
    /// Leaves the last message open, to be continued.
    pub continue_final_message: bool,
    /// More arguments from the request (`enable_thinking`, for example): strings, numbers and truth values.
    pub kwargs: Option<&'a Map<String, Value>>,
}

/// A chat template, compiled and tried.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// Whether there is a template of its own for requests with tools.
    has_tool_template: bool,
    /// `bos_token` and the like, as the template sees them.
    token_names: Map<String, Value>,
    control: ControlTokens,
    max_output: usize,
    takes_parts: bool,
    source: String,
}

impl ChatTemplate {
    /// Finds the model's template: `override_file` if given, else `chat_template.jinja`, `chat_template` in
    /// `tokenizer_config.json`, or `chat_template.json`. `None` if the model has none.
    pub fn load(
        dir: &Path,
        override_file: Option<&Path>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>, TextError> {
        let read = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            // `dir` is a file when the model is one (GGUF): nothing lies beside its template.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(TextError::Load(format!("{}: {e}", path.display()))),
        };
        if let Some(path) = override_file {
            let source = read(path)?
                .ok_or_else(|| TextError::Load(format!("{}: no such chat template", path.display())))?;
            return Self::from_source(&source, None, tokenizer).map(Some);
        }
        let mut tools = read(&dir.join("additional_chat_templates/tool_use.jinja"))?;
        if let Some(source) = read(&dir.join("chat_template.jinja"))? {
            return Self::from_source(&source, tools.as_deref(), tokenizer).map(Some);
        }
        let named = match tokenizer.config().get("chat_template") {
            None | Some(Value::Null) => match read(&dir.join("chat_template.json"))? {
                Some(text) => serde_json::from_str::<Value>(&text)
                    .map_err(|e| TextError::Load(format!("chat_template.json: {e}")))?["chat_template"]
                    .take(),
                None => return Ok(None),
            },
            Some(value) => value.clone(),
        };
        match named {
            Value::String(source) => Self::from_source(&source, tools.as_deref(), tokenizer).map(Some),
            Value::Array(list) => {
                let by_name = |name: &str| {
                    list.iter()
                        .find(|t| t["name"] == name)
                        .and_then(|t| t["template"].as_str())
                        .map(str::to_owned)
                };
                tools = by_name("tool_use").or(tools);
                let Some(source) = by_name("default") else { return Ok(None) };
                Self::from_source(&source, tools.as_deref(), tokenizer).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Compiles and tries a template. `tools` is a second one, used when a request has tools.
    pub fn from_source(source: &str, tools: Option<&str>, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let mut env = environment();
        for (name, source) in [("chat", Some(source)), ("tools", tools)] {
            let Some(source) = source else { continue };
            if source.len() > MAX_SOURCE_BYTES {
                return Err(TextError::Load(format!("the chat template has {} bytes", source.len())));
            }
            env.add_template_owned(name, without_generation_blocks(source))
                .map_err(|e| TextError::Load(format!("the chat template is not valid: {}", describe(&e))))?;
        }
        let all = format!("{source}{}", tools.unwrap_or_default());
        let template = Self {
            env,
            has_tool_template: tools.is_some(),
            token_names: token_names(tokenizer.config()),
            control: ControlTokens::new(tokenizer.added_tokens(), &all),
            max_output: DEFAULT_MAX_OUTPUT,
            takes_parts: false,
            source: source.to_owned(),
        };
        template.probe()
    }

    /// The model's template as it is written in its file.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Caps the rendered text; a good value is a few times the context length in bytes.
    pub fn set_max_output(&mut self, bytes: usize) {
        self.max_output = bytes;
    }

    /// Whether the template reads `content` as a list of parts. If not, join the text parts first.
    pub fn takes_parts(&self) -> bool {
        self.takes_parts
    }

    /// Messages to text, exactly as the template writes it.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        self.render_messages(input, input.messages.to_vec(), input.tools.cloned(), input.kwargs.cloned())
    }

    /// Messages to token ids. The template's control tokens become tokens; the same names inside the client's
    /// strings stay ordinary text.
    pub fn encode_chat(&self, tokenizer: &Tokenizer, input: &ChatInput<'_>) -> Result<Vec<u32>, TextError> {
        self.encode_chat_within(tokenizer, input, usize::MAX)
    }

    /// As [`ChatTemplate::encode_chat`]. What has more than `max` tokens by its mere length is refused before it is
    /// tokenized; what passes may still have more.
    pub fn encode_chat_within(
        &self,
        tokenizer: &Tokenizer,
        input: &ChatInput<'_>,
        max: usize,
    ) -> Result<Vec<u32>, TextError> {
        let mut messages = input.messages.to_vec();
        let mut tools = input.tools.cloned();
        let mut kwargs = input.kwargs.map(|k| Value::Object(k.clone()));
        let texts: Vec<&Value> = messages.iter().chain(&tools).chain(&kwargs).collect();
        let mut guard = Guard::new(&texts);
        messages.iter_mut().for_each(|m| guard.message(&self.control, m));
        tools.iter_mut().chain(&mut kwargs).for_each(|v| guard.other(&self.control, v));
        let kwargs = kwargs.and_then(|k| match k {
            Value::Object(map) => Some(map),
            _ => None,
        });
        let rendered = match self.render_messages(input, messages, tools, kwargs) {
            Ok(text) => guard.unescape(text),
            // A message of the template may quote the client; it must not show our marks.
            Err(TextError::Template(message)) => return Err(TextError::Template(guard.strip(message))),
            Err(e) => return Err(e),
        };
        tokenizer.check_length(&rendered, guard.mark(), max)?;
        tokenizer.encode_marked(&rendered, Specials::Parse, false, guard.mark())
    }

    fn render_messages(
        &self,
        input: &ChatInput<'_>,
        mut messages: Vec<Value>,
        tools: Option<Value>,
        kwargs: Option<Map<String, Value>>,
    ) -> Result<String, TextError> {
        if messages.is_empty() {
            return Err(TextError::Invalid("`messages` is empty".into()));
        }
        for message in &mut messages {
            let Value::Object(fields) = message else {
                return Err(TextError::Invalid("each message must be an object".into()));
            };
            tidy_message(fields);
        }
        let continued = if input.continue_final_message {
            if input.add_generation_prompt {
                return Err(TextError::Invalid(
                    "`continue_final_message` and `add_generation_prompt` exclude each other".into(),
                ));
            }
            Some(tag_final_message(messages.last_mut())?)
        } else {
            None
        };
        let name = if self.has_tool_template && tools.is_some() { "tools" } else { "chat" };
        let mut context = self.token_names.clone();
        for (key, value) in kwargs.into_iter().flatten() {
            if RESERVED.contains(&key.as_str()) || self.token_names.contains_key(&key) {
                return Err(TextError::Invalid(format!("the template argument `{key}` is reserved")));
            }
            if value.is_array() || value.is_object() {
                return Err(TextError::Invalid(format!(
                    "the template argument `{key}` must be a string, a number or a truth value"
                )));
            }
            context.insert(key, value);
        }
        context.insert("messages".into(), Value::Array(messages));
        context.insert("tools".into(), tools.unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), Value::Bool(input.add_generation_prompt));
        let text = self.run(name, context)?;
        match continued {
            Some(tag) => cut_at_tag(text, &tag),
            None => Ok(text),
        }
    }

    fn run(&self, name: &str, context: Map<String, Value>) -> Result<String, TextError> {
        let template = self.env.get_template(name).map_err(|_| TextError::NoTemplate)?;
        let mut output = Capped { bytes: Vec::new(), limit: self.max_output, full: false };
        let done = template
            .render_captured_to(Jinja::from(minijinja::value::Serde(&context)), &mut output)
            .map(drop);
        if output.full {
            return Err(TextError::OutputTooLong { limit: self.max_output });
        }
        match done {
            Ok(()) => String::from_utf8(output.bytes).map_err(|_| TextError::Internal),
            Err(e) => Err(TextError::Template(describe(&e))),
        }
    }

    /// Renders a few conversations; at least one must work. A template that hangs is given up after the deadline.
    fn probe(mut self) -> Result<Self, TextError> {
        let (sender, receiver) = mpsc::channel();
        std::thread::Builder::new()
            .name("template-probe".into())
            .stack_size(16 << 20)
            .spawn(move || {
                let result = self.try_conversations().map(|takes_parts| {
                    self.takes_parts = takes_parts;
                    self
                });
                // Nobody listens after the deadline.
                let _ = sender.send(result);
            })
            .map_err(|e| TextError::Load(format!("no thread to try the chat template: {e}")))?;
        receiver.recv_timeout(PROBE_DEADLINE).unwrap_or_else(|e| {
            Err(TextError::Load(match e {
                mpsc::RecvTimeoutError::Timeout => {
                    format!("the chat template took longer than {} s", PROBE_DEADLINE.as_secs())
                }
                mpsc::RecvTimeoutError::Disconnected => "the chat template crashes its engine".into(),
            }))
        })
    }

    /// Whether it takes lists of parts, or why nothing could be rendered.
    fn try_conversations(&self) -> Result<bool, TextError> {
        let message = |role: &str, content: Value| json!({"role": role, "content": content});
        let conversations = [
            vec![message("user", json!("probe-u"))],
            vec![message("system", json!("probe-s")), message("user", json!("probe-u"))],
            vec![
                message("user", json!("a")),
                message("assistant", json!("b")),
                message("user", json!("probe-u")),
            ],
        ];
        let render = |messages: &[Value]| {
            self.render(&ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() })
        };
        let mut first_error = None;
        let mut rendered = false;
        for messages in &conversations {
            match render(messages) {
                Ok(_) => rendered = true,
                Err(e) => {
                    first_error.get_or_insert(e);
                }
            }
        }
        let parts = [message("user", json!([{"type": "text", "text": "probe-u"}]))];
        let with_parts = render(&parts);
        let takes_parts = with_parts
            .as_ref()
            .is_ok_and(|t| t.contains("probe-u") && !t.contains("'type'") && !t.contains("\"type\""));
        match first_error {
            Some(e) if !rendered && !takes_parts => {
                Err(TextError::Load(format!("the chat template cannot render a simple chat: {e}")))
            }
            _ => Ok(takes_parts),
        }
    }
}

/// A writer that stops at a limit.
struct Capped {
    bytes: Vec<u8>,
    limit: usize,
    full: bool,
}

impl Write for Capped {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len().saturating_add(part.len()) > self.limit {
            self.full = true;
            return Err(std::io::Error::other("the output is too long"));
        }
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The template language as `transformers` sets it up.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters are valid"));
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(print);
    env.add_filter("tojson", tojson);
    env.add_filter("indent", indent);
    env.add_filter("string", |value: &Jinja| python_text(value));
    env.add_function("raise_exception", |message: &Jinja| -> Result<Jinja, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, RAISED.to_owned() + &python_text(message)))
    });
    env.add_function("strftime_now", strftime_now);
    env
}

/// Marks the message of `raise_exception`, which is shown to the client as it is.
const RAISED: &str = "\u{1}raised\u{1}";

/// What an error says to a client or operator: what went wrong and in which line, no source text.
fn describe(error: &Error) -> String {
    let detail = error.detail().unwrap_or_default();
    if let Some(message) = detail.strip_prefix(RAISED) {
        return message.to_owned();
    }
    let line = error.line().map(|line| format!(" in line {line}")).unwrap_or_default();
    let colon = if detail.is_empty() { "" } else { ": " };
    format!("the chat template failed{line}: {}{colon}{detail}", error.kind())
}

fn print(out: &mut Output, state: &mut State, value: &Jinja) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::String => minijinja::escape_formatter(out, state, value),
        ValueKind::Number if value.is_integer() => minijinja::escape_formatter(out, state, value),
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            out.write_str(&python_text(value)).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// `str(value)` in Python; what has no such form prints as the engine prints it.
fn python_text(value: &Jinja) -> String {
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            serde_json::to_value(value).map_or_else(|_| value.to_string(), |v| to_str(&v))
        }
        _ => value.to_string(),
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(value: &Jinja, args: Rest<ValueOrKwargs>) -> Result<Jinja, Error> {
    let args = args.into_values();
    let (positional, kwargs): (&[Jinja], Kwargs) = from_args(&args)?;
    let argument = |index: usize, name: &str| -> Result<Option<Jinja>, Error> {
        let value = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Jinja>>(name)?,
        };
        Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let mut style = JsonStyle {
        ensure_ascii: argument(0, "ensure_ascii")?.is_some_and(|v| v.is_true()),
        indent: argument(1, "indent")?.map(|v| width(&v)).transpose()?,
        ..JsonStyle::default()
    };
    if let Some(separators) = argument(2, "separators")? {
        let part = |index: usize| {
            let part = separators.get_item_by_index(index).ok().and_then(|v| v.as_str().map(str::to_owned));
            part.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "`separators` must be two strings"))
        };
        style.separators = Some((part(0)?, part(1)?));
    }
    style.sort_keys = argument(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "an undefined value has no JSON form"));
    }
    let value = serde_json::to_value(value)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, format!("no JSON form: {e}")))?;
    Ok(Jinja::from(to_json(&value, &style)))
}

fn width(value: &Jinja) -> Result<usize, Error> {
    let width = i64::try_from(value.clone())?;
    match usize::try_from(width.max(0)) {
        Ok(width) if width <= MAX_INDENT => Ok(width),
        _ => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("an indentation of {width}; at most {MAX_INDENT}"),
        )),
    }
}

/// Jinja's `indent(width=4, first=False, blank=False)`.
fn indent(text: &str, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (positional, kwargs): (&[Jinja], Kwargs) = from_args(&args)?;
    let argument = |index: usize, name: &str| match positional.get(index) {
        Some(value) => Ok(Some(value.clone())),
        None => kwargs.get::<Option<Jinja>>(name),
    };
    let unit = match argument(0, "width")? {
        Some(value) => match value.as_str() {
            Some(text) if text.len() <= MAX_INDENT => text.to_owned(),
            Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "the indentation is too wide")),
            None => " ".repeat(width(&value)?),
        },
        None => " ".repeat(4),
    };
    let first = argument(1, "first")?.is_some_and(|v| v.is_true());
    let blank = argument(2, "blank")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let mut out = String::with_capacity(text.len() + unit.len());
    for (number, line) in text.split('\n').enumerate() {
        if number > 0 {
            out.push('\n');
        }
        let wanted = if number == 0 { first } else { blank || !line.is_empty() };
        if wanted {
            out.push_str(&unit);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Python's `datetime.now().strftime(format)`.
fn strftime_now(format: &str) -> Result<String, Error> {
    use chrono::format::{Item, StrftimeItems};
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if format.len() > 1024 || items.contains(&Item::Error) {
        return Err(Error::new(ErrorKind::InvalidOperation, "the date format is not valid"));
    }
    Ok(chrono::Local::now().format_with_items(items.into_iter()).to_string())
}

/// `{% generation %}` only marks what a model wrote, for training; here it is a block that is always taken.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let inner = tag.trim_start_matches(['-', '+']);
        let word = inner.trim_start();
        let replacement =
            [("endgeneration", "endif"), ("generation", "if true")].into_iter().find(|(name, _)| {
                word.strip_prefix(name)
                    .is_some_and(|after| after.trim_start().trim_start_matches(['-', '+']).starts_with("%}"))
            });
        rest = tag;
        if let Some((name, with)) = replacement {
            let skipped = tag.len() - word.len();
            out.push_str(&tag[..skipped]);
            out.push_str(with);
            rest = &tag[skipped + name.len()..];
        }
    }
    out.push_str(rest);
    out
}

/// `bos_token`, `eos_token` and so on, as strings.
fn token_names(config: &Map<String, Value>) -> Map<String, Value> {
    let mut names = Map::new();
    for (key, value) in config {
        let is_name = key.ends_with("_token") && !key.starts_with("add_");
        if let Some(text) = token_name(value).filter(|_| is_name) {
            names.insert(key.clone(), Value::from(text));
        }
    }
    if let Some(extra) = config.get("extra_special_tokens").and_then(Value::as_object) {
        for (key, value) in extra {
            if let Some(text) = token_name(value) {
                names.insert(key.clone(), Value::from(text));
            }
        }
    }
    names
}

/// As `transformers` does: absent instead of null, and reasoning under all of its names.
fn tidy_message(fields: &mut Map<String, Value>) {
    fields.retain(|_, value| !value.is_null());
    let reasoning =
        ["reasoning_content", "thinking", "reasoning"].iter().find_map(|name| fields.get(*name)).cloned();
    if let Some(reasoning) = reasoning {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".into(), reasoning);
    }
}

/// Appends a mark and a space to the text of the message that is to be continued, and returns the mark.
fn tag_final_message(message: Option<&mut Value>) -> Result<String, TextError> {
    let nothing =
        || TextError::Invalid("`continue_final_message`: the last message has no text to continue".into());
    let tag = random_mark();
    let text = match message.map(|m| &mut m["content"]) {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => match parts.iter_mut().rev().find_map(|part| part.get_mut("text")) {
            Some(Value::String(text)) => text,
            _ => return Err(nothing()),
        },
        _ => return Err(nothing()),
    };
    text.push_str(&tag);
    text.push(' ');
    Ok(tag)
}

/// Cuts the text where the tagged message ends. If the template trimmed the message, so is the text.
fn cut_at_tag(mut text: String, tag: &str) -> Result<String, TextError> {
    let Some(at) = text.rfind(tag) else {
        return Err(TextError::Template("the chat template leaves out the message to be continued".into()));
    };
    let kept_space = text[at + tag.len()..].starts_with(' ');
    text.truncate(at);
    if !kept_space {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
