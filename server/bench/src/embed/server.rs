//! An embedding server: which model it is asked for, and what it answers.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::EmbedApi;
use crate::codec::Codec;
use crate::serve::{Access, base_url, http_client, root_cause};

/// A server that was reached.
pub(super) struct Server {
    pub(super) name: String,
    url: String,
    api: EmbedApi,
    /// Name of the model there, if it has names.
    pub(super) model: Option<String>,
    /// What the server says of itself.
    pub(super) about: Value,
    api_key: Option<String>,
    http: reqwest::Client,
    timeout: Duration,
}

/// A request that was answered.
pub(super) struct Answer {
    pub(super) seconds: f64,
    /// Tokens of all its texts, if the server counts.
    pub(super) tokens: Option<u64>,
    pub(super) dimensions: usize,
}

impl Server {
    /// Finds out what the server serves. One without the routes that tell may well know its only model without a name.
    ///
    /// # Errors
    /// If a header of `access` is malformed.
    pub(super) async fn reach(access: &Access, api: EmbedApi) -> anyhow::Result<Self> {
        let mut server = Self {
            name: access.name.clone(),
            url: base_url(&access.url),
            api,
            model: access.model.clone(),
            about: Value::Null,
            api_key: access.api_key.clone(),
            http: http_client(access)?,
            timeout: access.timeout,
        };
        let mut about = Map::new();
        let list = server.get("/v1/models").await;
        let cards = || list["data"].as_array().into_iter().flatten();
        if server.model.is_none() && api == EmbedApi::OpenAi {
            // Beside a model that chats, the one that embeds is not the first; servers that name no task have one model.
            let chosen = cards().find(|card| card["task"] == "embed").or_else(|| cards().next());
            server.model = chosen.and_then(|card| card["id"].as_str()).map(str::to_owned);
        }
        if let Some(card) = cards().find(|card| card["id"].as_str() == server.model.as_deref()) {
            about.insert("model".to_owned(), card.clone());
        }
        let info = server.get("/info").await;
        if api == EmbedApi::Tei && server.model.is_none() {
            server.model = info["model_id"].as_str().map(str::to_owned);
        }
        let version = [server.get("/version").await, info];
        if let Some(version) = version.iter().find_map(|answer| answer["version"].as_str()) {
            about.insert("version".to_owned(), version.into());
        }
        server.about = Value::Object(about);
        Ok(server)
    }

    /// The JSON at `path`; null if there is none.
    async fn get(&self, path: &str) -> Value {
        let mut request = self.http.get(format!("{}{path}", self.url)).timeout(Duration::from_secs(30));
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        match request.send().await {
            Ok(answer) if answer.status().is_success() => answer.json().await.unwrap_or_default(),
            _ => Value::Null,
        }
    }

    /// The server's own tokenizer.
    pub(super) fn codec(&self) -> Codec {
        Codec::Server {
            http: self.http.clone(),
            url: format!("{}/tokenize", self.url),
            model: self.model.clone().unwrap_or_default(),
            api_key: self.api_key.clone(),
        }
    }

    /// The vectors of `texts`.
    ///
    /// # Errors
    /// The kind of the failure, and what the server or the connection said.
    pub(super) async fn ask(&self, texts: &[String]) -> Result<Answer, (String, String)> {
        let (path, body) = match self.api {
            EmbedApi::OpenAi => ("/v1/embeddings", json!({"model": self.model, "input": texts})),
            EmbedApi::Tei => ("/embed", json!({"inputs": texts})),
        };
        let mut request = self
            .http
            .post(format!("{}{path}", self.url))
            .timeout(self.timeout)
            .header("content-type", "application/json")
            .body(body.to_string());
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        let failed = |error: reqwest::Error| {
            let kind = if error.is_timeout() {
                "timeout"
            } else if error.is_connect() {
                "connect"
            } else {
                "truncated"
            };
            (kind.to_owned(), root_cause(&error))
        };
        let begin = Instant::now();
        let answer = request.send().await.map_err(failed)?;
        let status = answer.status();
        let bytes = answer.bytes().await.map_err(failed)?;
        // Reading the numbers is the client's own work, not the server's.
        let seconds = begin.elapsed().as_secs_f64();
        if !status.is_success() {
            return Err((format!("http_{}", status.as_u16()), String::from_utf8_lossy(&bytes).into_owned()));
        }
        let bad = |what: &str| ("bad_response".to_owned(), what.to_owned());
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| bad(&error.to_string()))?;
        let vectors: Vec<&Value> = match self.api {
            EmbedApi::OpenAi => {
                value["data"].as_array().into_iter().flatten().map(|item| &item["embedding"]).collect()
            }
            EmbedApi::Tei => value.as_array().into_iter().flatten().collect(),
        };
        if vectors.len() != texts.len() {
            return Err(bad(&format!("{} vectors for {} texts", vectors.len(), texts.len())));
        }
        let dimensions = vectors.first().and_then(|vector| vector.as_array()).map_or(0, Vec::len);
        if dimensions == 0 {
            return Err(bad("the vectors are no lists of numbers"));
        }
        Ok(Answer { seconds, tokens: value["usage"]["prompt_tokens"].as_u64(), dimensions })
    }
}
