//! JSON files of a model folder, read with a size limit and typed accessors whose errors name file and key.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result, invalid};

/// No config.json or generation_config.json comes near this.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Reads a whole file of at most `max_bytes`.
pub(crate) fn read_file(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    // One byte more than allowed tells "too large" from "just fits", whatever the file's size claims to be.
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > max_bytes {
        return Err(invalid(path, format!("is larger than {max_bytes} bytes")));
    }
    Ok(bytes)
}

/// Reads a JSON object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = read_file(path, MAX_CONFIG_BYTES)?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(invalid(path, "is not a JSON object")),
        Err(error) => Err(invalid(path, format!("is not valid JSON: {error}"))),
    }
}

/// A JSON object of a config file. A key that is absent and one that is `null` mean the same.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConfigJson<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
}

impl<'a> ConfigJson<'a> {
    /// `path` is for messages.
    pub(crate) fn new(path: &'a Path, object: &'a Map<String, Value>) -> Self {
        Self { path, object }
    }

    /// Another object of the same file.
    pub(crate) fn with_object(&self, object: &'a Map<String, Value>) -> Self {
        Self { path: self.path, object }
    }

    /// An error that names the file.
    pub(crate) fn invalid(&self, message: impl Into<String>) -> Error {
        invalid(self.path, message)
    }

    fn wrong(&self, key: &str, want: &str, value: &Value) -> Error {
        let mut shown = value.to_string();
        if let Some((end, _)) = shown.char_indices().nth(60) {
            shown.truncate(end);
            shown.push_str("...");
        }
        self.invalid(format!("{key} must be {want}, not {shown}"))
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// A whole number in `1..=max`.
    /// The object without `key`.
    pub(crate) fn without(&self, key: &str) -> Map<String, Value> {
        let others = self.object.iter().filter(|(name, _)| *name != key);
        others.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// All keys, those with `null` included.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    pub(crate) fn len(&self) -> usize {
        self.object.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.object.is_empty()
    }

    pub(crate) fn opt_size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, &format!("a whole number from 1 to {max}"), value)),
        }
    }

    /// A whole number in `1..=max` that must be there.
    pub(crate) fn size(&self, key: &str, max: usize) -> Result<usize> {
        self.opt_size(key, max)?.ok_or_else(|| self.invalid(format!("{key} is missing")))
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.wrong(key, "a finite number", value)),
        }
    }

    /// A finite number above 0.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 || !(x as f32).is_normal() => {
                Err(self.invalid(format!("{key} must be a number above 0, not {x}")))
            }
            number => Ok(number),
        }
    }

    pub(crate) fn bool(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value))
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string", value))
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<ConfigJson<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(ConfigJson { path: self.path, object })),
            Some(value) => Err(self.wrong(key, "an object", value)),
        }
    }

    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(value) => Err(self.wrong(key, "a list", value)),
        }
    }

    /// A list of positive finite numbers.
    pub(crate) fn factors(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some(list) = self.list(key)? else { return Ok(None) };
        let factor = |value: &Value| {
            let factor = value.as_f64().unwrap_or(f64::NAN) as f32;
            if factor.is_normal() && factor > 0.0 {
                Ok(factor)
            } else {
                Err(self.wrong(key, "a list of numbers above 0", value))
            }
        };
        list.iter().map(factor).collect::<Result<_>>().map(Some)
    }

    /// A token id or a list of them; absent is the empty list.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.wrong(key, "a token id or a list of them", value))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }
}
