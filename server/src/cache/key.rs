//! Which requests have a key, and which key.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::{auth::Tenant, http::validate::Fields, state::AppState};

/// Parameters that change nothing about the answer.
const WITHOUT_EFFECT: [&str; 6] = ["user", "metadata", "store", "service_tier", "priority", "timeout"];

/// Tenant, model and request in one digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct CacheKey(pub(crate) [u8; 32]);

impl CacheKey {
    pub(crate) fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The key of a request to `route`; `None` if there is no cache, or another answer would be as right.
pub(crate) fn key(state: &AppState, tenant: Tenant, route: &str, fields: &Fields) -> Option<CacheKey> {
    state.cache()?;
    let map = fields.map();
    is_deterministic(map).then(|| {
        // Names that are answered alike share their answers: an alias those of what it stands for, unless it is repeated.
        let asked = map.get("model").and_then(Value::as_str).filter(|name| !name.is_empty());
        let asked = asked.unwrap_or_else(|| state.default_model());
        let answer = state.resolve(asked).map_or_else(|| asked.to_owned(), |name| name.answer);
        digest(state.fingerprint(), tenant, (route, &answer), map)
    })
}

fn is_deterministic(map: &Map<String, Value>) -> bool {
    let greedy = map.get("temperature").and_then(Value::as_f64) == Some(0.0);
    greedy || map.get("seed").is_some_and(Value::is_number)
}

/// `model` is what the answer will name; the name in `map` is not looked at.
fn digest(
    fingerprint: &str,
    tenant: Tenant,
    (route, model): (&str, &str),
    map: &Map<String, Value>,
) -> CacheKey {
    let mut hash = Sha256::new();
    for part in [fingerprint.as_bytes(), route.as_bytes(), model.as_bytes()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.update(tenant.0);
    let mut text = String::new();
    let known = map.iter().filter(|(name, _)| *name != "model" && !WITHOUT_EFFECT.contains(&name.as_str()));
    write_object(known, &mut text);
    hash.update(text.as_bytes());
    CacheKey(hash.finalize().into())
}

/// JSON with sorted keys, without nulls in objects: absent and null are the same to us.
fn write(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => write_object(map.iter(), out),
        Value::Array(items) => {
            out.push('[');
            for item in items {
                write(item, out);
                out.push(',');
            }
            out.push(']');
        }
        // `1` and `1.0` mean the same to every parameter; the text of both is that of the float where it is exact.
        Value::Number(number) => match number.as_f64() {
            Some(float) if float.fract() == 0.0 && float.abs() < 9e15 => {
                out.push_str(&format!("{float:.0}"));
            }
            _ => out.push_str(&number.to_string()),
        },
        other => out.push_str(&other.to_string()),
    }
}

fn write_object<'a>(entries: impl Iterator<Item = (&'a String, &'a Value)>, out: &mut String) {
    let mut entries: Vec<_> = entries.filter(|(_, value)| !value.is_null()).collect();
    entries.sort_unstable_by_key(|(name, _)| *name);
    out.push('{');
    for (name, value) in entries {
        out.push_str(&Value::String(name.clone()).to_string());
        out.push(':');
        write(value, out);
        out.push(',');
    }
    out.push('}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(tenant: u8, route: &str, value: Value) -> CacheKey {
        digest("model", Tenant([tenant; 32]), (route, "m"), value.as_object().unwrap())
    }

    #[test]
    fn the_same_request_has_the_same_key() {
        let key = of(1, "chat", json!({"temperature": 0, "messages": [{"role": "user", "content": "x"}]}));
        let same = json!({"messages": [{"content": "x", "role": "user", "name": null}], "temperature": 0.0, "user": "u", "stop": null});
        assert_eq!(of(1, "chat", same), key);
    }

    #[test]
    fn whatever_changes_the_answer_changes_the_key() {
        let base =
            json!({"temperature": 0, "messages": [{"role": "user", "content": "x"}], "stop": ["a", "b"]});
        let key = of(1, "chat", base.clone());
        assert_ne!(of(2, "chat", base.clone()), key);
        assert_ne!(of(1, "completions", base.clone()), key);
        let named = |fingerprint: &str, model: &str| {
            digest(fingerprint, Tenant([1; 32]), ("chat", model), base.as_object().unwrap())
        };
        assert_eq!(named("model", "m"), key);
        assert_ne!(named("other", "m"), key);
        assert_ne!(named("model", "alias"), key);
        for (name, value) in [
            ("stream", json!(true)),
            ("max_tokens", json!(5)),
            ("stop", json!(["b", "a"])),
            ("stop", json!(["a,b"])),
            ("temperature", json!(0.5)),
            ("messages", json!([{"role": "user", "content": "y"}])),
        ] {
            let mut other = base.clone();
            other[name] = value;
            assert_ne!(of(1, "chat", other), key, "{name}");
        }
    }

    #[test]
    fn only_deterministic_requests_have_one() {
        for (value, expected) in [
            (json!({}), false),
            (json!({"temperature": 0.7}), false),
            (json!({"temperature": null, "seed": null}), false),
            (json!({"temperature": 0}), true),
            (json!({"temperature": 1, "seed": 7}), true),
        ] {
            assert_eq!(is_deterministic(value.as_object().unwrap()), expected, "{value}");
        }
    }
}
