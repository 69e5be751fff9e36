//! Text to tokens and back, by a local tokenizer or by the server under test.

use std::sync::Arc;

use serde_json::{Value, json};

/// A tokenizer, handed in by the binary.
pub trait TextCodec: Send + Sync {
    /// Token ids of `text`; with the tokens that the tokenizer puts around a text if `specials`.
    ///
    /// # Errors
    /// One sentence.
    fn encode(&self, text: &str, specials: bool) -> Result<Vec<u32>, String>;
}

/// Who counts tokens.
#[derive(Clone)]
pub(crate) enum Codec {
    /// A tokenizer of this process.
    Local(Arc<dyn TextCodec>),
    /// `POST /tokenize` of a server.
    Server {
        /// Its client.
        http: reqwest::Client,
        /// Address of the route.
        url: String,
        /// Name of the model there.
        model: String,
        /// Bearer token.
        api_key: Option<String>,
    },
}

impl Codec {
    /// How a report calls it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Local(_) => "local tokenizer",
            Self::Server { .. } => "the server's /tokenize",
        }
    }

    /// Token ids of `text`.
    ///
    /// # Errors
    /// One sentence.
    pub(crate) async fn encode(&self, text: &str, specials: bool) -> Result<Vec<u32>, String> {
        match self {
            Self::Local(codec) => codec.encode(text, specials),
            Self::Server { http, url, model, api_key } => {
                // vLLM and Ingle read `prompt` and `add_special_tokens`, llama.cpp `content` and `add_special`.
                let body = json!({
                    "model": model, "prompt": text, "add_special_tokens": specials,
                    "content": text, "add_special": specials,
                });
                let mut request = http.post(url).json(&body);
                if let Some(key) = api_key {
                    request = request.bearer_auth(key);
                }
                let answer = request.send().await.map_err(|error| error.to_string())?;
                let status = answer.status();
                let answer: Value = answer.json().await.map_err(|error| error.to_string())?;
                let ids = answer["tokens"].as_array().ok_or_else(|| format!("no tokens, status {status}"))?;
                ids.iter()
                    .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
                    .collect::<Option<Vec<u32>>>()
                    .ok_or_else(|| "the tokens are no ids".to_owned())
            }
        }
    }
}
