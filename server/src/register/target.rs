//! A router's address: `smg+http://...`, `vllm-router+http://...`, `litellm+http://...`, `webhook+http://...`.
//!
//! A key for the router stands before an `@`: `litellm+http://sk-1234@router:4000`. It is never shown or logged.

use std::str::FromStr;

use reqwest::Url;

use super::{Adapter, litellm::LiteLlm, smg::Smg, vllm_router::VllmRouter, webhook::Webhook};

/// The languages routers speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// SMG, the model gateway that grew out of SGLang's router.
    Smg,
    /// vLLM's router.
    VllmRouter,
    /// LiteLLM's proxy.
    LiteLlm,
    /// Anything that takes JSON.
    Webhook,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Smg, Self::VllmRouter, Self::LiteLlm, Self::Webhook];

    /// The word before the `+`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Smg => "smg",
            Self::VllmRouter => "vllm-router",
            Self::LiteLlm => "litellm",
            Self::Webhook => "webhook",
        }
    }
}

/// A router to register with.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    kind: Kind,
    url: Url,
    key: Option<String>,
    shown: String,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("kind", &self.kind).field("url", &self.shown).finish()
    }
}

/// Why an address cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The word before the `+` is missing or unknown.
    #[error(
        "a router's address begins with smg+http://, vllm-router+http://, litellm+http:// or webhook+http:// (or https)"
    )]
    Kind,
    /// The rest is no address.
    #[error("the router's address cannot be used: {0}")]
    Url(String),
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let (word, rest) = text.split_once('+').ok_or(TargetError::Kind)?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == word).ok_or(TargetError::Kind)?;
        let mut url = Url::parse(rest).map_err(|error| TargetError::Url(error.to_string()))?;
        if !["http", "https"].contains(&url.scheme()) || url.host_str().is_none() {
            return Err(TargetError::Url("it must be http or https and name a host".to_owned()));
        }
        let key = match (url.username(), url.password()) {
            ("", None) => None,
            (user, None) => Some(user.to_owned()),
            (_, Some(password)) => Some(password.to_owned()),
        };
        // Neither can fail for an address with a host.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        let shown = format!("{word}+{}", url.as_str().trim_end_matches('/'));
        Ok(Self { kind, url, key, shown })
    }
}

impl Target {
    /// Its language.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its address without the key.
    #[must_use]
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// Who speaks to it.
    #[must_use]
    pub fn adapter(&self, client: reqwest::Client) -> Box<dyn Adapter> {
        let line =
            Line { client, base: self.url.as_str().trim_end_matches('/').to_owned(), key: self.key.clone() };
        match self.kind {
            Kind::Smg => Box::new(Smg::new(line)),
            Kind::VllmRouter => Box::new(VllmRouter::new(line)),
            Kind::LiteLlm => Box::new(LiteLlm::new(line)),
            Kind::Webhook => Box::new(Webhook::new(line)),
        }
    }
}

/// How a router is reached.
pub(super) struct Line {
    client: reqwest::Client,
    base: String,
    key: Option<String>,
}

/// What a router answered.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) text: String,
}

/// Bytes of a router's answer that are read at most.
const MAX_ANSWER: usize = 4 << 20;
/// Characters of it that are shown.
const MAX_SHOWN: usize = 200;

impl Answer {
    pub(super) fn is_ok(&self) -> bool {
        (200..300).contains(&self.status)
    }

    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    pub(super) fn refusal(&self) -> super::AdapterError {
        let message: String =
            self.text.chars().take(MAX_SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
        super::AdapterError::Refused { status: self.status, message }
    }

    pub(super) fn ok(self) -> Result<Self, super::AdapterError> {
        if self.is_ok() { Ok(self) } else { Err(self.refusal()) }
    }
}

/// The last of the errors that led to `error`. Those before it say where, and may repeat the address; it says what.
fn root_cause(error: &dyn std::error::Error) -> String {
    let last = std::iter::successors(error.source(), |error| error.source()).last();
    last.map_or_else(|| "no answer".to_owned(), ToString::to_string)
}

impl Line {
    /// Sends `body` to `path` under the router's address.
    pub(super) async fn send(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<Answer, super::AdapterError> {
        let unreachable = |error: reqwest::Error| super::AdapterError::Unreachable(root_cause(&error));
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let mut response = request.send().await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            if bytes.len().saturating_add(chunk.len()) > MAX_ANSWER {
                return Err(super::AdapterError::Unreachable("its answer is too long".to_owned()));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Answer { status, text: String::from_utf8_lossy(&bytes).into_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cause_is_told() {
        #[derive(Debug, thiserror::Error)]
        #[error("connect to http://secret")]
        struct Outer(#[source] std::io::Error);
        let refused = || std::io::Error::from_raw_os_error(111);
        let nested = Outer(std::io::Error::other(Outer(refused())));
        assert_eq!(root_cause(&nested), refused().to_string());
        assert_eq!(root_cause(&refused()), "no answer");
    }

    #[test]
    fn addresses() {
        let target: Target = "litellm+http://sk-secret@router:4000/".parse().unwrap();
        assert_eq!((target.kind(), target.shown()), (Kind::LiteLlm, "litellm+http://router:4000"));
        assert_eq!(target.key.as_deref(), Some("sk-secret"));
        assert!(!format!("{target:?}").contains("secret"));
        let target: Target = "webhook+https://u:pw@hooks.example/a/b?c=d".parse().unwrap();
        assert_eq!(
            (target.key.as_deref(), target.shown()),
            (Some("pw"), "webhook+https://hooks.example/a/b?c=d")
        );
        assert_eq!("smg+http://127.0.0.1:30000".parse::<Target>().unwrap().key, None);
        for wrong in ["http://router", "smg", "nginx+http://router", "smg+ftp://router", "smg+router:1"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
