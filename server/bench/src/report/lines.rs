//! A result as JSON lines: a measurement a line, each with what it means nothing without.

use serde::Serialize;
use serde_json::{Map, Value};

/// A line a point of `result`: kind, machine and versions, what the result says once for all its points (model, weights,
/// threads ...), what the point's server says of itself, and the point.
///
/// # Errors
/// If the result cannot be written as JSON.
pub fn lines(result: &impl Serialize) -> anyhow::Result<Vec<String>> {
    let result = serde_json::to_value(result)?;
    let mut common = Map::new();
    for (name, value) in result.as_object().into_iter().flatten() {
        if !value.is_object() && !value.is_array() && !value.is_null() {
            common.insert(name.clone(), value.clone());
        }
    }
    for name in ["date", "ingle_version", "cpu", "num_cpus", "os"] {
        if let Some(value) = result["environment"].get(name) {
            common.insert(name.to_owned(), value.clone());
        }
    }
    let mut lines = Vec::new();
    for point in result["points"].as_array().into_iter().flatten() {
        let mut line = common.clone();
        if let Some(about) = point["peer"].as_str().and_then(|peer| result["servers"].get(peer)) {
            let card = &about["model"]["tier_card"];
            let facts = [
                ("server_version", &about["version"]),
                ("dtype", &card["dtype"]),
                ("quantization", &card["quantization"]),
            ];
            for (name, value) in facts.into_iter().filter(|(_, value)| !value.is_null()) {
                line.insert(name.to_owned(), value.clone());
            }
        }
        // What a server does not say of itself, its user may.
        for name in ["threads", "weights"] {
            if let Some(value) = result["metadata"].get(name) {
                line.entry(name).or_insert_with(|| value.clone());
            }
        }
        line.extend(point.as_object().cloned().unwrap_or_default());
        lines.push(Value::Object(line).to_string());
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_says_what_was_measured_on_what() {
        let result = json!({
            "kind": "serve", "environment": {"cpu": "a", "num_cpus": 2, "ingle_version": "1", "command": ["x"]},
            "servers": {"s": {"version": "2", "model": {"tier_card": {"dtype": "bf16", "quantization": null}}}},
            "metadata": {"threads": "2"}, "points": [{"peer": "s", "model": "m", "failed": 0}],
        });
        let found: Value = serde_json::from_str(&lines(&result).unwrap()[0]).unwrap();
        let wanted = json!({
            "kind": "serve", "ingle_version": "1", "cpu": "a", "num_cpus": 2, "server_version": "2", "dtype": "bf16",
            "threads": "2", "peer": "s", "model": "m", "failed": 0,
        });
        assert_eq!(found, wanted);
        let model = json!({"kind": "model", "weights": "int8", "threads": 1, "limits": {}, "points": [{"test": "pp8"}]});
        let found: Value = serde_json::from_str(&lines(&model).unwrap()[0]).unwrap();
        assert_eq!(found, json!({"kind": "model", "weights": "int8", "threads": 1, "test": "pp8"}));
    }
}
