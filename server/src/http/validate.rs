//! Reading fields out of a JSON object, each at most once, with errors that name the parameter.
//!
//! `null` is the same as absent, everywhere. What is left at the end nobody knew: it is accepted and reported in the
//! response header `x-ignored-params`.

use serde_json::{Map, Value};

use crate::error::{ApiError, ApiResult, quote};

/// Names in `x-ignored-params` at most.
const MAX_IGNORED: usize = 16;

/// The fields of a request that were not read yet.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Goes before the name of a parameter in errors, such as `stream_options.`.
    prefix: String,
}

/// What kind of JSON `value` is, for a sentence.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// `value` as a whole number, also when written like `5.0`.
pub(crate) fn integer(value: &Value) -> Option<i128> {
    let number = value.as_number()?;
    if let Some(n) = number.as_i64() {
        return Some(n.into());
    }
    if let Some(n) = number.as_u64() {
        return Some(n.into());
    }
    // Up to 2^53 a float of no fraction is an exact integer.
    let n = number.as_f64()?;
    (n.fract() == 0.0 && n.abs() <= 9_007_199_254_740_992.0).then_some(n as i128)
}

impl Fields {
    pub(crate) fn new(map: Map<String, Value>) -> Self {
        Self { map, prefix: String::new() }
    }

    /// What was not read yet.
    pub(crate) fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The name of `name` in errors.
    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn wrong(&self, name: &str, wanted: &str, got: &Value) -> ApiError {
        let path = self.path(name);
        let shown = match got {
            Value::Number(n) => quote(&n.to_string()),
            other => kind_of(other).to_owned(),
        };
        ApiError::invalid(&path, format!("'{path}' must be {wanted}, not {shown}."))
    }

    /// Takes `name` if it is there and not null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        // `swap_remove` keeps this O(1); the order of what is left does not matter.
        self.map.swap_remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn bool(&mut self, name: &str) -> ApiResult<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(other) => Err(self.wrong(name, "true or false", &other)),
        }
    }

    pub(crate) fn string(&mut self, name: &str) -> ApiResult<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(name, "a string", &other)),
        }
    }

    /// A whole number from `low` to `high`.
    pub(crate) fn int<T: TryFrom<i128>>(
        &mut self,
        name: &str,
        low: i128,
        high: i128,
    ) -> ApiResult<Option<T>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = integer(&value).filter(|n| (low..=high).contains(n));
        match number.and_then(|n| T::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(self.wrong(name, &format!("a whole number from {low} to {high}"), &value)),
        }
    }

    /// A number for which `legal` holds; `range` says in words what that is.
    pub(crate) fn float(
        &mut self,
        name: &str,
        range: &str,
        legal: fn(f64) -> bool,
    ) -> ApiResult<Option<f32>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(n) if value.is_number() && n.is_finite() && legal(n) => Ok(Some(n as f32)),
            _ => Err(self.wrong(name, &format!("a number {range}"), &value)),
        }
    }

    /// A list of whole numbers from 0 to below `end`, at most `max_len` of them.
    pub(crate) fn token_ids(
        &mut self,
        name: &str,
        end: usize,
        max_len: usize,
    ) -> ApiResult<Option<Vec<u32>>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let Value::Array(items) = value else {
            return Err(self.wrong(name, "an array of token ids", &value));
        };
        if items.len() > max_len {
            let path = self.path(name);
            return Err(ApiError::invalid(
                &path,
                format!("'{path}' has {} entries; {max_len} are allowed.", items.len()),
            ));
        }
        token_ids(&self.path(name), &items, end).map(Some)
    }

    /// The fields of an object inside.
    pub(crate) fn object(&mut self, name: &str) -> ApiResult<Option<Self>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, prefix: format!("{}.", self.path(name)) })),
            Some(other) => Err(self.wrong(name, "an object", &other)),
        }
    }

    /// A 400 if `name` is there with a value for which `neutral` does not hold.
    pub(crate) fn refuse_unless(
        &mut self,
        name: &str,
        why: &str,
        neutral: fn(&Value) -> bool,
    ) -> ApiResult<()> {
        match self.take(name) {
            Some(value) if !neutral(&value) => {
                let path = self.path(name);
                Err(ApiError::invalid(&path, format!("'{path}' is not supported: {why}.")))
            }
            _ => Ok(()),
        }
    }

    /// The names nobody took, fit for a header, or `None` if there are none.
    pub(crate) fn ignored(self) -> Option<String> {
        let total = self.map.len();
        let mut names: Vec<String> = self
            .map
            .iter()
            .filter(|(_, value)| !value.is_null())
            .take(MAX_IGNORED)
            .map(|(name, _)| {
                let legal = |c: char| if c.is_ascii_graphic() && c != ',' { c } else { '?' };
                name.chars().take(64).map(legal).collect()
            })
            .collect();
        names.sort_unstable();
        if total > MAX_IGNORED {
            names.push("...".to_owned());
        }
        (!names.is_empty()).then(|| names.join(", "))
    }
}

/// `items` as token ids below `end`.
pub(crate) fn token_ids(path: &str, items: &[Value], end: usize) -> ApiResult<Vec<u32>> {
    let legal =
        |item: &Value| integer(item).and_then(|n| u32::try_from(n).ok()).filter(|id| (*id as usize) < end);
    items
        .iter()
        .enumerate()
        .map(|(i, item)| {
            legal(item).ok_or_else(|| {
                let shown = match item {
                    Value::Number(n) => quote(&n.to_string()),
                    other => kind_of(other).to_owned(),
                };
                ApiError::invalid(
                    path,
                    format!(
                        "'{path}[{i}]' must be a token id from 0 to {}, not {shown}.",
                        end.saturating_sub(1)
                    ),
                )
            })
        })
        .collect()
}
