//! SMG: `POST /workers`, `PUT /workers/{id}`, `GET /workers`, `DELETE /workers/{id}`.
//!
//! The router gives each worker an id, found again by our address. It takes a worker off in the background; from the
//! moment it calls it draining it sends nothing new. Its `cost` must be above 0 and 1 is the usual one: what costs
//! nothing here is announced as [`FREE`].

use std::{sync::Mutex, sync::PoisonError, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{Adapter, Announcement, Presence, Told, target::Line};

/// The cost announced for tokens that are free.
const FREE: f64 = 0.001;
/// How often the router is asked whether it has taken us off.
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(super) struct Smg {
    line: Line,
    /// Our id there. A lock, because the adapter is shared; it is held for a copy.
    id: Mutex<Option<String>>,
}

impl Smg {
    pub(super) fn new(line: Line) -> Self {
        Self { line, id: Mutex::new(None) }
    }

    fn id(&self) -> Option<String> {
        self.id.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_id(&self, id: Option<String>) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    fn spec(me: &Announcement) -> Value {
        // It looks at our list itself and keeps the first name; others it learns as aliases of that.
        let own = me.models.iter().filter(|model| model.name == model.own);
        let models: Vec<Value> = own
            .map(|own| {
                let others = me.models.iter().filter(|model| model.own == own.own && model.name != own.own);
                let aliases: Vec<&str> = others.map(|model| model.name.as_str()).collect();
                json!({"id": own.name, "aliases": aliases})
            })
            .collect();
        let cost = me.models.first().and_then(|model| model.cost_per_1k).unwrap_or(0.0);
        let mut spec = json!({
            "url": me.url,
            "models": models,
            // Our API is vLLM's where both have a word for it; without this the router has to guess.
            "runtime_type": "vllm",
            "cost": cost.max(FREE),
            "labels": {
                "tier": "local",
                "engine": "ingle",
                "instance_id": me.instance_id,
                "epoch": me.epoch.to_string(),
                "cost_per_1k": cost.to_string(),
            },
        });
        if let Some(latency) = me.models.first().and_then(|model| model.latency_p95) {
            spec["labels"]["latency_p95_ms"] = json!(format!("{latency:.1}"));
        }
        if let Some(key) = &me.api_key {
            spec["api_key"] = json!(key);
        }
        spec
    }

    /// Finds our entry by our address.
    async fn find(&self, me: &Announcement) -> Result<Option<Value>, super::AdapterError> {
        let answer = self.line.send(Method::GET, "/workers", None).await?.ok()?.json();
        let workers = answer["workers"].as_array().cloned().unwrap_or_default();
        let ours = |worker: &Value| {
            worker["url"].as_str().map(|url| url.trim_end_matches('/')) == Some(me.url.as_str())
        };
        Ok(workers.into_iter().find(ours))
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

impl Adapter for Smg {
    fn register<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()> {
        Box::pin(async move {
            let spec = Self::spec(me);
            if let Some(known) = self.find(me).await? {
                let id = text(&known["id"]);
                if let Some(id) = &id {
                    self.line.send(Method::PUT, &format!("/workers/{id}"), Some(&spec)).await?.ok()?;
                }
                self.set_id(id);
                return Ok(());
            }
            let answer = self.line.send(Method::POST, "/workers", Some(&spec)).await?.ok()?;
            self.set_id(text(&answer.json()["worker_id"]));
            Ok(())
        })
    }

    fn heartbeat<'a>(&'a self, me: &'a Announcement) -> Told<'a, Presence> {
        Box::pin(async move {
            if let Some(id) = self.id() {
                let answer = self.line.send(Method::GET, &format!("/workers/{id}"), None).await?;
                match answer.status {
                    404 | 400 => self.set_id(None),
                    _ => return answer.ok().map(|_| Presence::Known),
                }
            }
            let found = self.find(me).await?;
            self.set_id(found.as_ref().and_then(|worker| text(&worker["id"])));
            Ok(if found.is_some() { Presence::Known } else { Presence::Unknown })
        })
    }

    fn keeps_the_card(&self) -> bool {
        true
    }

    fn deregister<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()> {
        Box::pin(async move {
            let id = match self.id() {
                Some(id) => Some(id),
                None => self.find(me).await?.and_then(|worker| text(&worker["id"])),
            };
            let Some(id) = id else { return Ok(()) };
            let path = format!("/workers/{id}");
            let answer = self.line.send(Method::DELETE, &path, None).await?;
            if answer.status == 404 {
                return Ok(());
            }
            answer.ok()?;
            loop {
                let answer = self.line.send(Method::GET, &path, None).await?;
                if answer.status == 404 || answer.json()["status"] == "draining" {
                    return Ok(());
                }
                sleep(LOOK_EVERY).await;
            }
        })
    }

    fn check<'a>(&'a self, me: &'a Announcement) -> Told<'a, Presence> {
        Box::pin(async move {
            Ok(if self.find(me).await?.is_some() { Presence::Known } else { Presence::Unknown })
        })
    }
}
