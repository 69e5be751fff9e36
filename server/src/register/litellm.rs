//! LiteLLM's proxy: `POST /model/new`, `POST /model/delete`, `GET /model/info`.
//!
//! Each name is a deployment of its own whose `model_info.id` is made of our instance id and the name, so a restart
//! replaces its own entries and no others. The proxy keeps deployments in its database: it must have one, and
//! `STORE_MODEL_IN_DB` must be set; the key in the address must be an administrator's.

use reqwest::Method;
use serde_json::{Value, json};

use super::{Adapter, Announcement, Presence, Told, announcement::Model, target::Line};

pub(super) struct LiteLlm {
    line: Line,
}

impl LiteLlm {
    pub(super) fn new(line: Line) -> Self {
        Self { line }
    }

    async fn delete(&self, id: &str) -> Result<(), super::AdapterError> {
        let answer = self.line.send(Method::POST, "/model/delete", Some(&json!({"id": id}))).await?;
        if answer.is_ok() || is_unknown(answer.status, &answer.text) { Ok(()) } else { Err(answer.refusal()) }
    }
}

/// The stable id of `model` of this instance.
fn deployment_id(me: &Announcement, model: &Model) -> String {
    format!("{}/{}", me.instance_id, model.name)
}

/// The proxy says 400 for an id it does not know.
fn is_unknown(status: u16, text: &str) -> bool {
    status == 404 || (status == 400 && text.contains("not found"))
}

fn deployment(me: &Announcement, model: &Model) -> Value {
    let (mode, provider) = match model.task.as_str() {
        "embeddings" => ("embedding", "hosted_vllm"),
        "rerank" => ("rerank", "hosted_vllm"),
        "completion" => ("completion", "hosted_vllm"),
        _ => ("chat", "hosted_vllm"),
    };
    let per_token = model.cost_per_1k.unwrap_or(0.0) / 1000.0;
    let card = me.tier["models"]
        .as_array()
        .and_then(|cards| cards.iter().find(|card| card["name"] == json!(model.name)))
        .cloned()
        .unwrap_or_default();
    json!({
        "model_name": model.name,
        "litellm_params": {
            "model": format!("{provider}/{}", model.name),
            "api_base": format!("{}/v1", me.url),
            "api_key": me.api_key.clone().unwrap_or_else(|| "none".to_owned()),
            "input_cost_per_token": per_token,
            "output_cost_per_token": per_token,
        },
        "model_info": {
            "id": deployment_id(me, model),
            "mode": mode,
            "max_tokens": model.max_tokens,
            "max_input_tokens": model.context,
            "ingle": {"tier": "local", "instance_id": me.instance_id, "epoch": me.epoch, "card": card},
        },
    })
}

impl Adapter for LiteLlm {
    fn register<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()> {
        Box::pin(async move {
            for model in &me.models {
                // What an earlier life of ours left there.
                self.delete(&deployment_id(me, model)).await?;
                self.line.send(Method::POST, "/model/new", Some(&deployment(me, model))).await?.ok()?;
            }
            Ok(())
        })
    }

    fn heartbeat<'a>(&'a self, me: &'a Announcement) -> Told<'a, Presence> {
        Box::pin(async move {
            // Reads are over when one name is missing: registering replaces them all.
            let answer = self.line.send(Method::GET, "/model/info", None).await?;
            if is_unknown(answer.status, &answer.text) {
                return Ok(Presence::Unknown);
            }
            let info = answer.ok()?.json();
            let there: Vec<&str> = info["data"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|entry| entry["model_info"]["id"].as_str())
                .collect();
            let prefix = format!("{}/", me.instance_id);
            let known = if me.models.is_empty() {
                there.iter().any(|id| id.starts_with(&prefix))
            } else {
                me.models.iter().all(|model| there.contains(&deployment_id(me, model).as_str()))
            };
            Ok(if known { Presence::Known } else { Presence::Unknown })
        })
    }

    fn keeps_the_card(&self) -> bool {
        true
    }

    fn deregister<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()> {
        Box::pin(async move {
            for model in &me.models {
                self.delete(&deployment_id(me, model)).await?;
            }
            Ok(())
        })
    }
}
