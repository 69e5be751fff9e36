//! From the bytes of a request to one JSON object.
//!
//! In order: the encoding (415) and type (415) are checked, the length that is announced (413), then bytes are read
//! under a limit (413), a pause limit and a total limit (408), and parsed once. The parser refuses duplicate keys,
//! nesting deeper than [`MAX_DEPTH`], lone surrogates, and numbers no `f64` holds.

use std::{fmt, time::Duration};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, header},
};
use futures::StreamExt;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::validate::Fields;
use crate::{
    error::{ApiError, ApiResult, ErrorKind, quote},
    state::AppState,
};

/// Arrays and objects inside each other at most.
const MAX_DEPTH: usize = 64;
/// Time a body may take in all.
const BODY_TOTAL: Duration = Duration::from_secs(300);

/// Reads and parses the body of `request`.
pub(crate) async fn read_fields(state: &AppState, request: Request) -> ApiResult<Fields> {
    let (parts, body) = request.into_parts();
    check_type(&parts.headers)?;
    let bytes = read_bytes(state, &parts.headers, body).await?;
    let value = parse(&bytes)?;
    drop(bytes);
    match value {
        Value::Object(map) => Ok(Fields::new(map)),
        other => {
            let message =
                format!("The body must be a JSON object, not {}.", super::validate::kind_of(&other));
            Err(ApiError::new(ErrorKind::InvalidJson, message))
        }
    }
}

fn check_type(headers: &HeaderMap) -> ApiResult<()> {
    let unsupported = |message: &str| Err(ApiError::new(ErrorKind::UnsupportedMediaType, message));
    let encoded = headers
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .any(|value| !value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity"));
    if encoded {
        return unsupported("Encoded bodies are not accepted: send plain JSON without Content-Encoding.");
    }
    let essence = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .map(|value| value.split(';').next().unwrap_or("").trim().to_ascii_lowercase());
    match essence.as_deref() {
        Some(t) if t == "application/json" || (t.starts_with("application/") && t.ends_with("+json")) => {
            Ok(())
        }
        _ => unsupported("The body must be JSON: send Content-Type: application/json."),
    }
}

async fn read_bytes(state: &AppState, headers: &HeaderMap, body: Body) -> ApiResult<Vec<u8>> {
    let limit = state.config().max_body_bytes;
    let too_large = || {
        ApiError::new(
            ErrorKind::TooLarge,
            format!("The body is larger than {limit} bytes, the limit of this server."),
        )
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let timeout = |what: &str| {
        ApiError::new(ErrorKind::RequestTimeout, format!("The body did not arrive in time ({what})."))
    };
    let read = async {
        // The announced length is the client's word: it reserves little before bytes are there.
        let mut bytes = Vec::with_capacity(announced.unwrap_or(0).min(64 << 10) as usize);
        let mut chunks = body.into_data_stream();
        loop {
            match tokio::time::timeout(state.config().body_idle_timeout, chunks.next()).await {
                Err(_) => return Err(timeout("it stopped")),
                Ok(None) => return Ok(bytes),
                Ok(Some(Err(_))) => {
                    return Err(ApiError::new(
                        ErrorKind::InvalidJson,
                        "The body broke off or is wrongly framed.",
                    ));
                }
                Ok(Some(Ok(chunk))) => {
                    if bytes.len().saturating_add(chunk.len()) > limit {
                        return Err(too_large());
                    }
                    bytes.extend_from_slice(&chunk);
                }
            }
        }
    };
    tokio::time::timeout(BODY_TOTAL, read).await.unwrap_or_else(|_| Err(timeout("too slow")))
}

/// Parses `bytes` strictly.
fn parse(bytes: &[u8]) -> ApiResult<Value> {
    let invalid = |error: serde_json::Error| {
        ApiError::new(
            ErrorKind::InvalidJson,
            format!("The body is not valid JSON: {}.", quote(&error.to_string())),
        )
    };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Strict { depth: 0 }.deserialize(&mut deserializer).map_err(invalid)?;
    deserializer.end().map_err(invalid)?;
    Ok(value)
}

/// Builds a [`Value`], refusing duplicate keys and deep nesting.
#[derive(Clone, Copy)]
struct Strict {
    depth: usize,
}

impl Strict {
    fn deeper<E: de::Error>(self) -> Result<Self, E> {
        if self.depth >= MAX_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_DEPTH}")));
        }
        Ok(Self { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(inner)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(inner)?;
            if object.contains_key(&key) {
                return Err(de::Error::custom(format_args!("duplicate key {:?}", quote(&key))));
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_values_are_what_serde_json_makes_of_them() {
        for text in
            [r#"{"a":[1,-2,3.5,"x",null,true,{"b":{}}],"c":"\ud83d\ude00 \u0000"}"#, "7", r#""s""#, "[]"]
        {
            assert_eq!(parse(text.as_bytes()).expect(text), serde_json::from_str::<Value>(text).expect(text));
        }
    }

    #[test]
    fn hostile_bodies_are_refused() {
        let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(parse(deep(64).as_bytes()).is_ok());
        let refused: Vec<Vec<u8>> = vec![
            b"".to_vec(),
            b"{".to_vec(),
            b"{}x".to_vec(),
            b"\xef\xbb\xbf{}".to_vec(),
            b"{\"a\":\"\xff\"}".to_vec(),
            br#"{"a":"\ud800"}"#.to_vec(),
            br#"{"a":"\udc00\ud800"}"#.to_vec(),
            br#"{"a":NaN}"#.to_vec(),
            br#"{"a":Infinity}"#.to_vec(),
            br#"{"a":1e400}"#.to_vec(),
            format!("{{\"a\":{}}}", "9".repeat(5000)).into_bytes(),
            br#"{"a":1,"a":2}"#.to_vec(),
            br#"{"x":{"a":1,"a":1}}"#.to_vec(),
            deep(65).into_bytes(),
            deep(100_000).into_bytes(),
            "{\"a\":".repeat(100_000).into_bytes(),
        ];
        for body in refused {
            let head =
                String::from_utf8_lossy(body.get(..body.len().min(40)).unwrap_or_default()).into_owned();
            let error = parse(&body).expect_err(&head);
            assert_eq!(error.kind(), ErrorKind::InvalidJson, "{head}");
        }
    }
}
