//! Looks through `tokenizer.json` before the tokenizer library sees it.
//!
//! The library trusts the file: a merge longer than the longest token makes it write past a buffer, a padding rule
//! can make it loop, an id of 2^31 would make us allocate a table of that size. Each is refused here by name.

use serde_json::Value;
use std::collections::HashMap;

/// Ids at or above this are refused; the largest vocabularies in use have about 2^18.
pub(crate) const MAX_TOKEN_ID: u64 = 1 << 22;
/// The longest token in bytes.
const MAX_TOKEN_BYTES: usize = 1 << 16;
/// The longest regular expression in bytes.
const MAX_PATTERN_BYTES: usize = 1 << 14;

/// Checks the file and removes what the server decides itself (padding and truncation).
pub(crate) fn check(json: &mut Value) -> Result<(), String> {
    let Some(file) = json.as_object_mut() else {
        return Err("tokenizer.json is not a JSON object".into());
    };
    file.remove("padding");
    file.remove("truncation");
    let model = file.get("model").ok_or("tokenizer.json has no `model`")?;
    let longest = check_vocab(model)?;
    check_merges(model, longest)?;
    check_added_tokens(file.get("added_tokens").unwrap_or(&Value::Null))?;
    check_post_processor(file.get("post_processor").unwrap_or(&Value::Null), 0)?;
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        check_part(part, file.get(part).unwrap_or(&Value::Null), 0)?;
    }
    Ok(())
}

/// Returns the length of the longest token in bytes.
fn check_vocab(model: &Value) -> Result<usize, String> {
    let mut longest = 0;
    let mut see = |token: &str| {
        longest = longest.max(token.len());
        if token.len() > MAX_TOKEN_BYTES {
            return Err(format!("a token of {} bytes; at most {MAX_TOKEN_BYTES} are allowed", token.len()));
        }
        Ok(())
    };
    match &model["vocab"] {
        Value::Object(vocab) => {
            for (token, id) in vocab {
                see(token)?;
                check_id(token, id)?;
            }
            let unk = model["unk_token"].as_str();
            if let Some(unk) = unk
                && !vocab.contains_key(unk)
            {
                return Err(format!("the unknown token {unk:?} is not in the vocabulary"));
            }
        }
        // Unigram: the place in the list is the id.
        Value::Array(pieces) => {
            if pieces.len() as u64 >= MAX_TOKEN_ID {
                return Err(format!("{} tokens; fewer than {MAX_TOKEN_ID} are allowed", pieces.len()));
            }
            for piece in pieces {
                let token = piece[0].as_str().ok_or("a Unigram entry without a token")?;
                let score = piece[1].as_f64().ok_or_else(|| format!("token {token:?} has no score"))?;
                if !score.is_finite() {
                    return Err(format!("the score of token {token:?} is not a number"));
                }
                see(token)?;
            }
            if let Some(unk) = model["unk_id"].as_u64()
                && unk >= pieces.len() as u64
            {
                return Err(format!("the unknown id {unk} is outside the vocabulary of {}", pieces.len()));
            }
        }
        _ => return Err("the model has no vocabulary".into()),
    }
    Ok(longest)
}

fn check_merges(model: &Value, longest: usize) -> Result<(), String> {
    let merges = match &model["merges"] {
        Value::Null => return Ok(()),
        Value::Array(merges) => merges,
        _ => return Err("`merges` is not a list".into()),
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    for (rank, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(text) => text.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        let (left, right) = pair.ok_or_else(|| format!("merge {rank} is not a pair of tokens"))?;
        if !right.starts_with(prefix) {
            return Err(format!("merge {rank}: {right:?} does not begin with {prefix:?}"));
        }
        let merged = left.len() + right.len() - prefix.len();
        if merged > longest {
            return Err(format!(
                "merge {rank} makes a token of {merged} bytes; the longest one has {longest}"
            ));
        }
    }
    Ok(())
}

fn check_added_tokens(added: &Value) -> Result<(), String> {
    let tokens = match added {
        Value::Null => return Ok(()),
        Value::Array(tokens) => tokens,
        _ => return Err("`added_tokens` is not a list".into()),
    };
    let mut by_id = HashMap::new();
    for token in tokens {
        let content = token["content"].as_str().ok_or("an added token without `content`")?;
        if content.is_empty() || content.len() > MAX_TOKEN_BYTES {
            return Err(format!("an added token of {} bytes", content.len()));
        }
        let id = check_id(content, &token["id"])?;
        if let Some(other) = by_id.insert(id, content)
            && other != content
        {
            return Err(format!("the added tokens {other:?} and {content:?} share the id {id}"));
        }
    }
    Ok(())
}

fn check_id(token: &str, id: &Value) -> Result<u64, String> {
    let short: String = token.chars().take(40).collect();
    match id.as_u64() {
        Some(id) if id < MAX_TOKEN_ID => Ok(id),
        _ => Err(format!("token {short:?} has the id {id}; ids are whole numbers below {MAX_TOKEN_ID}")),
    }
}

/// The ids that templates add must be sane as well, at any depth.
fn check_post_processor(part: &Value, depth: usize) -> Result<(), String> {
    if depth > 8 {
        return Err("the post processor is nested too deeply".into());
    }
    if let Some(tokens) = part["special_tokens"].as_object() {
        for (name, token) in tokens {
            for id in token["ids"].as_array().into_iter().flatten() {
                check_id(name, id)?;
            }
        }
    }
    for inner in part["processors"].as_array().into_iter().flatten() {
        check_post_processor(inner, depth + 1)?;
    }
    Ok(())
}

/// Patterns, fixed lengths and nesting of a normalizer, pre-tokenizer or decoder.
fn check_part(name: &str, part: &Value, depth: usize) -> Result<(), String> {
    if depth > 8 {
        return Err(format!("the {name} is nested too deeply"));
    }
    if part["type"] == "FixedLength" && part["length"].as_u64().is_none_or(|length| length == 0) {
        return Err(format!("the {name} has a fixed length of {}", part["length"]));
    }
    if let Some(text) = part["pattern"]["String"].as_str()
        && text.is_empty()
    {
        return Err(format!("the {name} splits or replaces at an empty string"));
    }
    if let Some(pattern) = part["pattern"]["Regex"].as_str() {
        if pattern.len() > MAX_PATTERN_BYTES {
            return Err(format!("the {name} has a pattern of {} bytes", pattern.len()));
        }
        // Split patterns run in our own stage, which reports the engine's work limit. Everywhere else the library
        // swallows it, so only patterns that need no backtracking are let in there.
        if part["type"] != "Split" && regex_syntax::parse(pattern).is_err() {
            return Err(format!("the {name} uses the pattern {pattern:?}, which needs backtracking"));
        }
    }
    for list in ["normalizers", "pretokenizers", "decoders"] {
        for inner in part[list].as_array().into_iter().flatten() {
            check_part(name, inner, depth + 1)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bpe() -> Value {
        json!({
            "version": "1.0",
            "padding": {"strategy": "BatchLongest"},
            "truncation": {"max_length": 2, "stride": 9},
            "added_tokens": [{"id": 3, "content": "<s>", "special": true}],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
        })
    }

    #[test]
    fn a_good_file_passes_and_loses_padding_and_truncation() {
        let mut file = bpe();
        check(&mut file).expect("good");
        assert!(file.get("padding").is_none() && file.get("truncation").is_none());
    }

    #[test]
    fn each_fault_is_named() {
        let cases: [(&str, Value, &str); 13] = [
            ("/model/merges", json!([["ab", "ab"]]), "makes a token of 4 bytes"),
            ("/model/merges", json!(["ab"]), "not a pair"),
            ("/model/merges", json!([["a", 1]]), "not a pair"),
            ("/model/vocab", json!({"a": 1_u64 << 31}), "2147483648"),
            ("/model/vocab", json!({"a": -1}), "-1"),
            ("/model/vocab", json!({"a": 1.5}), "1.5"),
            ("/model/vocab", json!([["a", null]]), "no score"),
            ("/model/vocab", json!(7), "no vocabulary"),
            ("/added_tokens", json!([{"id": 4, "content": ""}]), "0 bytes"),
            (
                "/added_tokens",
                json!([{"id": 4, "content": "x"}, {"id": 4, "content": "y"}]),
                "share the id 4",
            ),
            ("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "fixed length of 0"),
            (
                "/normalizer",
                json!({"type": "Replace", "pattern": {"Regex": "(?=a)"}, "content": ""}),
                "backtracking",
            ),
            ("/post_processor", json!({"special_tokens": {"x": {"ids": [4294967296_u64]}}}), "4294967296"),
        ];
        for (place, value, want) in cases {
            let mut file = bpe();
            file["pre_tokenizer"] = Value::Null;
            file["normalizer"] = Value::Null;
            file["post_processor"] = Value::Null;
            *file.pointer_mut(place).expect("the place exists") = value;
            let error = check(&mut file).expect_err(want);
            assert!(error.contains(want), "{error:?} does not say {want:?}");
        }
    }

    #[test]
    fn prefixes_longer_than_the_token_are_refused() {
        let mut file = bpe();
        file["model"]["continuing_subword_prefix"] = json!("######");
        assert!(check(&mut file).is_err());
    }

    #[test]
    fn deep_nesting_is_refused() {
        let mut part = json!({"type": "Digits"});
        for _ in 0..20 {
            part = json!({"type": "Sequence", "pretokenizers": [part]});
        }
        let mut file = bpe();
        file["pre_tokenizer"] = part;
        assert!(check(&mut file).expect_err("deep").contains("nested"));
    }
}
