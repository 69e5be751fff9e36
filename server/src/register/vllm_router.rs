//! vLLM's router: `POST /add_worker?url=`, `POST /remove_worker?url=`, `GET /list_workers`.
//!
//! It answers an addition when it has found us healthy, and a second one with 400 "already exists".

use reqwest::{Method, Url};

use super::{Adapter, Announcement, Presence, Told, target::Line};

pub(super) struct VllmRouter {
    line: Line,
}

impl VllmRouter {
    pub(super) fn new(line: Line) -> Self {
        Self { line }
    }
}

/// `path?url=...` with the address escaped.
fn with_url(path: &str, url: &str) -> String {
    // The host is only there to have an address to build on.
    let built = Url::parse_with_params("http://router/", [("url", url)]);
    let query = built.ok().and_then(|url| url.query().map(str::to_owned)).unwrap_or_default();
    format!("{path}?{query}")
}

impl Adapter for VllmRouter {
    fn register<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()> {
        Box::pin(async move {
            let answer = self.line.send(Method::POST, &with_url("/add_worker", &me.url), None).await?;
            if answer.status == 400 && answer.text.contains("already exists") {
                return Ok(());
            }
            answer.ok().map(|_| ())
        })
    }

    fn heartbeat<'a>(&'a self, me: &'a Announcement) -> Told<'a, Presence> {
        Box::pin(async move {
            let list = self.line.send(Method::GET, "/list_workers", None).await?.ok()?.json();
            let urls = list["urls"].as_array().cloned().unwrap_or_default();
            let known = urls
                .iter()
                .any(|url| url.as_str().map(|url| url.trim_end_matches('/')) == Some(me.url.as_str()));
            Ok(if known { Presence::Known } else { Presence::Unknown })
        })
    }

    fn deregister<'a>(&'a self, me: &'a Announcement) -> Told<'a, ()> {
        Box::pin(async move {
            self.line.send(Method::POST, &with_url("/remove_worker", &me.url), None).await?.ok().map(|_| ())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::with_url;

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(
            with_url("/add_worker", "http://[::1]:80/a?b&c"),
            "/add_worker?url=http%3A%2F%2F%5B%3A%3A1%5D%3A80%2Fa%3Fb%26c"
        );
    }
}
