//! Chat messages: from JSON to what the template reads.

use serde_json::{Map, Value};

use super::validate::{Fields, kind_of};
use crate::{
    error::{ApiError, ApiResult, quote},
    state::AppState,
    text::ChatInput,
};

/// What a template is given, owned, so that it can be rendered on another thread.
#[derive(Debug, Clone)]
pub(crate) struct Conversation {
    messages: Vec<Value>,
    add_generation_prompt: bool,
    continue_final_message: bool,
    kwargs: Map<String, Value>,
}

impl Conversation {
    /// Reads `messages` and the template's parameters.
    pub(crate) fn read(state: &AppState, fields: &mut Fields) -> ApiResult<Self> {
        let messages = messages(state, fields)?;
        let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
        let add_generation_prompt = fields.bool("add_generation_prompt")?;
        if continue_final_message && add_generation_prompt == Some(true) {
            const NAME: &str = "continue_final_message";
            let message = "'continue_final_message' and 'add_generation_prompt' cannot both be true.";
            return Err(ApiError::invalid(NAME, message));
        }
        if continue_final_message && messages.last().and_then(role) != Some("assistant") {
            const NAME: &str = "continue_final_message";
            return Err(ApiError::invalid(
                NAME,
                "'continue_final_message' needs a last message of the assistant.",
            ));
        }
        let kwargs = match fields.take("chat_template_kwargs") {
            None => Map::new(),
            Some(Value::Object(map)) if map.values().all(|v| !v.is_array() && !v.is_object()) => map,
            Some(_) => {
                const NAME: &str = "chat_template_kwargs";
                return Err(ApiError::invalid(
                    NAME,
                    "'chat_template_kwargs' must be an object of plain values.",
                ));
            }
        };
        let add_generation_prompt = add_generation_prompt.unwrap_or(!continue_final_message);
        Ok(Self { messages, add_generation_prompt, continue_final_message, kwargs })
    }

    /// Bytes of text in the messages, about.
    pub(crate) fn num_bytes(&self) -> usize {
        let strings = self.messages.iter().filter_map(Value::as_object).flat_map(Map::values);
        strings.filter_map(Value::as_str).map(str::len).sum()
    }

    /// The template's view.
    pub(crate) fn input(&self) -> ChatInput<'_> {
        ChatInput {
            messages: &self.messages,
            tools: None,
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            kwargs: (!self.kwargs.is_empty()).then_some(&self.kwargs),
        }
    }
}

fn role(message: &Value) -> Option<&str> {
    message.get("role").and_then(Value::as_str)
}

fn messages(state: &AppState, fields: &mut Fields) -> ApiResult<Vec<Value>> {
    const NAME: &str = "messages";
    let list = match fields.take(NAME) {
        Some(Value::Array(list)) => list,
        None => return Err(ApiError::invalid(NAME, "'messages' is required.")),
        Some(other) => {
            return Err(ApiError::invalid(
                NAME,
                format!("'messages' must be an array, not {}.", kind_of(&other)),
            ));
        }
    };
    let max = state.config().max_messages;
    if list.is_empty() || list.len() > max {
        return Err(ApiError::invalid(
            NAME,
            format!("'messages' must have 1 to {max} messages, not {}.", list.len()),
        ));
    }
    list.into_iter().enumerate().map(|(i, message)| one(i, message)).collect()
}

/// Checks one message and keeps the fields that templates know.
fn one(i: usize, message: Value) -> ApiResult<Value> {
    let path = |field: &str| format!("messages[{i}].{field}");
    let Value::Object(mut map) = message else {
        let message = format!("'messages[{i}]' must be an object, not {}.", kind_of(&message));
        return Err(ApiError::invalid(format!("messages[{i}]"), message));
    };
    let mut out = Map::new();
    let role = match map.swap_remove("role") {
        Some(Value::String(role)) => role,
        Some(other) => {
            let message = format!("'{}' must be a string, not {}.", path("role"), kind_of(&other));
            return Err(ApiError::invalid(path("role"), message));
        }
        None => return Err(ApiError::invalid(path("role"), format!("'{}' is required.", path("role")))),
    };
    let role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" | "function" => role.as_str(),
        other => {
            return Err(ApiError::invalid(
                path("role"),
                format!("'{}' is no known role: '{}'.", path("role"), quote(other)),
            ));
        }
    };
    out.insert("role".to_owned(), role.into());
    let tool_calls = map.swap_remove("tool_calls").filter(|calls| !calls.is_null());
    if let Some(calls) = &tool_calls {
        let legal = role == "assistant"
            && calls.as_array().is_some_and(|calls| {
                calls.iter().all(|call| call.get("function").is_some_and(Value::is_object))
            });
        if !legal {
            let message =
                format!("'{}' must be an array of calls in a message of the assistant.", path("tool_calls"));
            return Err(ApiError::invalid(path("tool_calls"), message));
        }
    }
    let content = match map.swap_remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => join_parts(&path("content"), parts)?,
        // Only a message that calls tools may be without text.
        None | Some(Value::Null) if role == "assistant" && tool_calls.is_some() => String::new(),
        None | Some(Value::Null) => {
            return Err(ApiError::invalid(path("content"), format!("'{}' is required.", path("content"))));
        }
        Some(other) => {
            let message = format!(
                "'{}' must be a string or an array of parts, not {}.",
                path("content"),
                kind_of(&other)
            );
            return Err(ApiError::invalid(path("content"), message));
        }
    };
    out.insert("content".to_owned(), content.into());
    out.extend(tool_calls.map(|calls| ("tool_calls".to_owned(), calls)));
    for name in ["name", "tool_call_id"] {
        match map.swap_remove(name) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => {
                out.insert(name.to_owned(), text.into());
            }
            Some(other) => {
                let message = format!("'{}' must be a string, not {}.", path(name), kind_of(&other));
                return Err(ApiError::invalid(path(name), message));
            }
        }
    }
    Ok(Value::Object(out))
}

/// Text parts one after the other, with nothing between them.
fn join_parts(path: &str, parts: Vec<Value>) -> ApiResult<String> {
    let mut text = String::new();
    for (j, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{j}]");
        match part {
            Value::String(piece) => text.push_str(&piece),
            Value::Object(part) => {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("");
                let field = if kind == "refusal" { "refusal" } else { "text" };
                if !matches!(kind, "text" | "input_text" | "output_text" | "refusal") {
                    let message = format!(
                        "'{path}' is of type '{}', but this model reads text only: it takes no images, audio or files.",
                        quote(kind)
                    );
                    return Err(ApiError::invalid(path, message));
                }
                match part.get(field) {
                    Some(Value::String(piece)) => text.push_str(piece),
                    _ => {
                        return Err(ApiError::invalid(
                            format!("{path}.{field}"),
                            format!("'{path}.{field}' must be a string."),
                        ));
                    }
                }
            }
            other => {
                let message = format!("'{path}' must be a part with a type, not {}.", kind_of(&other));
                return Err(ApiError::invalid(path, message));
            }
        }
    }
    Ok(text)
}
