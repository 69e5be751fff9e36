//! What must be the same of two results before their figures mean anything side by side: machine, model, weights, threads
//! and what was asked. Versions, commands and servers may differ: they are what is compared.

use serde_json::Value;

/// What differs, each as `what: in the first and in the second`. What only one of the results says (an older one may say
/// less) is no difference.
pub(super) fn differences(kind: &str, before: &Value, after: &Value) -> Vec<String> {
    let (was, is) = (conditions(kind, before), conditions(kind, after));
    let differs = |(name, value): &(String, Value)| {
        let (_, other) = is.iter().find(|(other, _)| other == name)?;
        (other != value).then(|| format!("{name}: {} and {}", plain(value), plain(other)))
    };
    was.iter().filter_map(differs).collect()
}

/// A value without the marks of JSON.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "not given".to_owned(),
        other => other.to_string(),
    }
}

fn conditions(kind: &str, result: &Value) -> Vec<(String, Value)> {
    let mut found = Found(Vec::new());
    found.fields(&result["environment"], &[("cpu", "processor"), ("num_cpus", "processors")]);
    // What a server does not say of itself, its user may.
    found.fields(&result["metadata"], &[("threads", "threads"), ("weights", "weights")]);
    match kind {
        "model" | "startup" => {
            for name in ["model", "weights", "threads", "device", "task"] {
                found.add(name, &result[name]);
            }
            found.fields(result, &[("num_parameters", "parameters")]);
        }
        _ => {
            for (name, value) in result["workload"].as_object().into_iter().flatten() {
                // The same load from other seeds, more of it, or other objectives.
                if !["seed", "words_seed", "repeats", "num_warmups", "goodput"].contains(&name.as_str()) {
                    found.0.push((name.clone(), value.clone()));
                }
            }
            for point in result["points"].as_array().into_iter().flatten() {
                let peer = point["peer"].as_str().unwrap_or_default();
                found.add(&format!("model of {peer}"), &point["model"]);
                found.add(&format!("lengths of prompts for {peer}"), &point["prompt_lengths"]);
            }
            for (peer, about) in result["servers"].as_object().into_iter().flatten() {
                let card = &about["model"]["tier_card"];
                for name in ["dtype", "quantization"] {
                    if let Some(value) = card.get(name) {
                        found.0.push((format!("{name} of {peer}"), value.clone()));
                    }
                }
            }
        }
    }
    let command: Vec<&str> =
        result["server_command"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for name in ["--threads", "--quantization", "--dtype", "--kv-cache-dtype", "--device"] {
        if !command.is_empty() {
            found.0.push((name.to_owned(), flag(&command, name).into()));
        }
    }
    found.0
}

/// The value of the flag `name` in a command line.
fn flag<'a>(command: &[&'a str], name: &str) -> Option<&'a str> {
    let with_value = |arg: &&'a str| arg.strip_prefix(name).and_then(|rest| rest.strip_prefix('='));
    let place = command.iter().position(|arg| *arg == name);
    place.and_then(|place| command.get(place + 1).copied()).or_else(|| command.iter().find_map(with_value))
}

struct Found(Vec<(String, Value)>);

impl Found {
    /// What is not said is no condition; what is said twice is one.
    fn add(&mut self, name: &str, value: &Value) {
        if !value.is_null() && !self.0.iter().any(|(known, _)| known == name) {
            self.0.push((name.to_owned(), value.clone()));
        }
    }

    fn fields(&mut self, of: &Value, names: &[(&str, &str)]) {
        for (name, label) in names {
            self.add(label, &of[*name]);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_condition_is_seen_and_what_may_differ_is_not() {
        let serve = json!({
            "kind": "serve",
            "environment": {"cpu": "a", "num_cpus": 2, "ingle_version": "1", "command": ["x"], "date": "d"},
            "metadata": {"threads": "2", "commit": "abc"},
            "workload": {"input_len": 128, "output_len": 64, "dataset_name": "random", "seed": 1, "repeats": 3},
            "servers": {"s": {"version": "1", "model": {"tier_card": {"dtype": "bf16", "quantization": null}}}},
            "points": [{"peer": "s", "model": "m", "prompt_lengths": "exact"}],
        });
        assert!(differences("serve", &serve, &serve).is_empty());
        let changed = |place: &str, value: Value| {
            let mut other = serve.clone();
            *other.pointer_mut(place).unwrap() = value;
            differences("serve", &serve, &other)
        };
        for (place, value, wanted) in [
            ("/workload/input_len", json!(512), "input_len: 128 and 512"),
            ("/workload/dataset_name", json!("sharegpt"), "dataset_name: random and sharegpt"),
            ("/environment/num_cpus", json!(4), "processors: 2 and 4"),
            ("/environment/cpu", json!("b"), "processor: a and b"),
            ("/metadata/threads", json!("1"), "threads: 2 and 1"),
            ("/points/0/model", json!("n"), "model of s: m and n"),
            ("/points/0/prompt_lengths", json!("estimated"), "lengths of prompts for s: exact and estimated"),
            ("/servers/s/model/tier_card/dtype", json!("f16"), "dtype of s: bf16 and f16"),
            (
                "/servers/s/model/tier_card/quantization",
                json!("int8"),
                "quantization of s: not given and int8",
            ),
        ] {
            assert_eq!(changed(place, value), [wanted], "{place}");
        }
        for (place, value) in [
            ("/environment/ingle_version", json!("2")),
            ("/environment/command", json!(["y"])),
            ("/servers/s/version", json!("2")),
            ("/workload/seed", json!(7)),
            ("/workload/repeats", json!(5)),
            ("/metadata/commit", json!("def")),
        ] {
            assert!(changed(place, value).is_empty(), "{place}");
        }
        assert!(differences("serve", &serve, &json!({"points": []})).is_empty(), "it says nothing");
    }

    #[test]
    fn models_and_starts_are_held_to_their_own_conditions() {
        let model = |weights: &str, threads: u64| json!({"model": "m", "weights": weights, "threads": threads, "isa": weights});
        assert_eq!(
            differences("model", &model("bf16", 1), &model("int8", 2)),
            ["weights: bf16 and int8", "threads: 1 and 2"]
        );
        let start = |flags: &[&str]| {
            let command = [&["ingle", "serve", "m"], flags].concat();
            json!({"model": "m", "server_command": command})
        };
        let (one, two) = (start(&["--port", "1", "--threads", "1"]), start(&["--threads=2", "--port", "2"]));
        assert_eq!(differences("startup", &one, &two), ["--threads: 1 and 2"]);
        assert_eq!(differences("startup", &one, &start(&[])), ["--threads: 1 and not given"]);
    }
}
