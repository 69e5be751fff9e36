//! A server under test: where it is, what it is called, what it can be asked.

use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::codec::Codec;

/// Which route answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Api {
    /// `/v1/completions`: prompts of text or of token ids, without a chat template.
    #[value(name = "openai", alias = "completions", alias = "vllm")]
    Completions,
    /// `/v1/chat/completions`: messages.
    #[value(name = "openai-chat", alias = "chat")]
    Chat,
}

impl Api {
    /// As `--backend` spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Completions => "openai",
            Self::Chat => "openai-chat",
        }
    }
}

/// How to reach a server.
#[derive(Debug, Clone)]
pub struct Access {
    /// Name in reports.
    pub name: String,
    /// Address, with or without `/v1`.
    pub url: String,
    /// Name of the model; the first that the server lists if not given.
    pub model: Option<String>,
    /// Bearer token.
    pub api_key: Option<String>,
    /// Further headers.
    pub headers: Vec<(String, String)>,
    /// Seconds that one request may take.
    pub timeout: Duration,
}

/// A server that was reached.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) base: String,
    pub(crate) route: String,
    pub(crate) api: Api,
    pub(crate) model: String,
    pub(crate) api_key: Option<String>,
    pub(crate) http: reqwest::Client,
    pub(crate) timeout: Duration,
    /// Fields put into every request.
    pub(crate) extra_body: serde_json::Map<String, Value>,
    /// What the server says of itself.
    pub(crate) about: Value,
}

/// A client for all requests to `access`.
///
/// # Errors
/// If a header is malformed.
pub(crate) fn http_client(access: &Access) -> anyhow::Result<reqwest::Client> {
    let mut headers = reqwest::header::HeaderMap::new();
    for (name, value) in &access.headers {
        let name = reqwest::header::HeaderName::try_from(name).with_context(|| format!("header {name}"))?;
        headers.insert(name, reqwest::header::HeaderValue::try_from(value).context("value of a header")?);
    }
    reqwest::Client::builder()
        .default_headers(headers)
        .tcp_nodelay(true)
        .pool_max_idle_per_host(usize::MAX)
        // Shorter than servers keep an idle connection.
        .pool_idle_timeout(Duration::from_secs(2))
        // A proxy of the environment would be measured along with the server.
        .no_proxy()
        .connect_timeout(Duration::from_secs(30))
        .build()
        .context("the HTTP client could not be made")
}

/// `url` without `/v1` and slashes at its end.
pub(crate) fn base_url(url: &str) -> String {
    let url = url.trim_end_matches('/');
    let url = url.strip_suffix("/v1").unwrap_or(url);
    if url.contains("://") { url.to_owned() } else { format!("http://{url}") }
}

impl Target {
    /// Reaches the server and finds the model's name.
    ///
    /// # Errors
    /// If the server does not answer or has no model.
    pub(crate) async fn reach(access: &Access, api: Api, endpoint: Option<&str>) -> anyhow::Result<Self> {
        let base = base_url(&access.url);
        let http = http_client(access)?;
        let get = |path: &str| {
            let request = http.get(format!("{base}{path}")).timeout(Duration::from_secs(30));
            match &access.api_key {
                Some(key) => request.bearer_auth(key),
                None => request,
            }
        };
        let mut about = serde_json::Map::new();
        let models = get("/v1/models").send().await;
        let model = match (&access.model, models) {
            (Some(model), Err(_)) => model.clone(),
            (None, Err(error)) => {
                bail!("{} at {base} does not answer: {}", access.name, root_cause(&error))
            }
            (model, Ok(answer)) => {
                if let Some(server) = answer.headers().get("server").and_then(|value| value.to_str().ok()) {
                    about.insert("server".into(), server.into());
                }
                let status = answer.status();
                let list: Value = answer.json().await.unwrap_or_default();
                match model.clone().or_else(|| list["data"][0]["id"].as_str().map(str::to_owned)) {
                    Some(model) => {
                        let card =
                            list["data"].as_array().into_iter().flatten().find(|card| card["id"] == *model);
                        if let Some(card) = card {
                            about.insert("model".into(), card.clone());
                        }
                        model
                    }
                    None => bail!(
                        "{} at {base} lists no model (status {status} at /v1/models); name one with --model",
                        access.name
                    ),
                }
            }
        };
        if let Ok(answer) = get("/version").send().await
            && let Ok(version) = answer.json::<Value>().await
            && let Some(version) = version.get("version")
        {
            about.insert("version".into(), version.clone());
        }
        let route = endpoint.unwrap_or(match api {
            Api::Completions => "/v1/completions",
            Api::Chat => "/v1/chat/completions",
        });
        Ok(Self {
            name: access.name.clone(),
            route: format!("{base}/{}", route.trim_start_matches('/')),
            base,
            api,
            model,
            api_key: access.api_key.clone(),
            http,
            timeout: access.timeout,
            extra_body: serde_json::Map::new(),
            about: Value::Object(about),
        })
    }

    /// The server's own tokenizer, if it has the route.
    pub(crate) async fn codec(&self) -> Option<Codec> {
        let codec = Codec::Server {
            http: self.http.clone(),
            url: format!("{}/tokenize", self.base),
            model: self.model.clone(),
            api_key: self.api_key.clone(),
        };
        codec.encode("one two", false).await.ok().filter(|ids| !ids.is_empty()).map(|_| codec)
    }

    /// The tokens that the server counts in `prompt` (text or ids); `None` if it refuses the prompt or does not count.
    pub(crate) async fn count_prompt(&self, prompt: Value) -> Option<u64> {
        let mut body = json!({"model": self.model, "max_tokens": 1, "temperature": 0});
        match self.api {
            Api::Completions => body["prompt"] = prompt,
            Api::Chat => body["messages"] = json!([{"role": "user", "content": prompt}]),
        }
        let mut request = self.http.post(&self.route).timeout(self.timeout).json(&body);
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        let answer = request.send().await.ok()?;
        if !answer.status().is_success() {
            return None;
        }
        answer.json::<Value>().await.ok()?["usage"]["prompt_tokens"].as_u64()
    }
}

/// The innermost cause: the sentences around it only name layers.
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::base_url;

    #[test]
    fn an_address_may_be_written_in_many_ways() {
        for url in ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/", "a:1"] {
            assert_eq!(base_url(url), "http://a:1", "{url}");
        }
    }
}
