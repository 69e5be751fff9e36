//! The generic one: JSON to an address of your own.
//!
//! ```text
//! POST   URL                 {"event": "register", "instance_id", "epoch", "url", "api_key"?, "tier": {...}}
//! PUT    URL/{instance_id}   the same with "heartbeat"; 404 or 410 makes us register again
//! DELETE URL/{instance_id}   when we go down, before anything else; 404 is as good as 200
//! GET    URL/{instance_id}   `ingle register --check`: 200 or 404
//! ```
//!
//! `tier` is the body of `GET /tier`. Of two registrations with one `instance_id` the one with the greater `epoch` counts.

use reqwest::Method;
use serde_json::{Value, json};

use super::{Adapter, Announcement, Presence, Told, target::Line};

pub(super) struct Webhook {
    line: Line,
}

impl Webhook {
    pub(super) fn new(line: Line) -> Self {
        Self { line }
    }
}

fn body(event: &str, me: &Announcement) -> Value {
    let mut body = json!({
        "event": event,
        "instance_id": me.instance_id,
        "epoch": me.epoch,
        "url": me.url,
        "tier": me.tier,
    });
    if let Some(key) = &me.api_key {
        body["api_key"] = json!(key);
    }
    body
}

fn path(me: &Announcement) -> String {
    format!("/{}", me.instance_id)
}

impl Adapter for Webhook {
    fn register<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()> {
        Box::pin(async move {
            self.line.send(Method::POST, "", Some(&body("register", me))).await?.ok().map(|_| ())
        })
    }

    fn heartbeat<'a>(&'a self, me: &'a Announcement) -> Told<'a, Presence> {
        Box::pin(async move {
            let answer = self.line.send(Method::PUT, &path(me), Some(&body("heartbeat", me))).await?;
            match answer.status {
                404 | 410 => Ok(Presence::Unknown),
                _ => answer.ok().map(|_| Presence::Known),
            }
        })
    }

    fn deregister<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()> {
        Box::pin(async move {
            let answer = self.line.send(Method::DELETE, &path(me), None).await?;
            if matches!(answer.status, 404 | 410) {
                return Ok(());
            }
            answer.ok().map(|_| ())
        })
    }

    fn check<'a>(&'a self, me: &'a Announcement) -> Told<'a, Presence> {
        Box::pin(async move {
            let answer = self.line.send(Method::GET, &path(me), None).await?;
            match answer.status {
                404 | 410 => Ok(Presence::Unknown),
                _ => answer.ok().map(|_| Presence::Known),
            }
        })
    }
}
