//! What routers are told.

use crate::{http::tier, state::AppState};

/// Who we are at this moment.
#[derive(Debug, Clone)]
pub struct Announcement {
    /// Where we are reached, without a path and without a slash at the end.
    pub url: String,
    /// The key that routers must send us.
    pub api_key: Option<String>,
    /// The same after every restart at the same address.
    pub instance_id: String,
    /// Seconds since 1970 at our start.
    pub epoch: u64,
    /// The body of `GET /tier`.
    pub tier: serde_json::Value,
    /// The names requests may use, each with its task and cost.
    pub models: Vec<Model>,
}

/// One name.
#[derive(Debug, Clone)]
pub struct Model {
    /// The name.
    pub name: String,
    /// The model it stands for, by its own name.
    pub own: String,
    /// `chat`, `completion`, `embeddings` or `rerank`.
    pub task: String,
    /// Cost of a thousand tokens, where it is known.
    pub cost_per_1k: Option<f64>,
    /// 95th percentile of whole requests in milliseconds, where it is known.
    pub latency_p95: Option<f64>,
    /// Prompt plus answer at most.
    pub context: usize,
    /// Answer tokens at most.
    pub max_tokens: usize,
}

impl Announcement {
    /// Of the server `state`.
    #[must_use]
    pub fn new(state: &AppState, url: &str, api_key: Option<String>) -> Self {
        let body = tier::body(state);
        let models = body
            .models
            .iter()
            .zip(state.names())
            .map(|(card, (_, own))| Model {
                name: card.name.clone(),
                own,
                task: card.task.to_owned(),
                cost_per_1k: card.cost_per_1k,
                latency_p95: card.latency_p95,
                context: card.context,
                max_tokens: card.max_tokens,
            })
            .collect();
        Self {
            url: url.trim_end_matches('/').to_owned(),
            api_key,
            instance_id: body.instance_id.clone(),
            epoch: body.epoch,
            models,
            tier: serde_json::to_value(&body).unwrap_or_default(),
        }
    }

    /// Of a server that is known by its address alone, for looking it up.
    #[must_use]
    pub fn of_address(url: &str, instance_id: String) -> Self {
        Self {
            url: url.trim_end_matches('/').to_owned(),
            api_key: None,
            instance_id,
            epoch: 0,
            tier: serde_json::Value::Null,
            models: Vec::new(),
        }
    }
}
