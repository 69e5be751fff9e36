//! Who may ask: API keys, the `Host` of a loopback server, the `Origin` of a web page.
//!
//! Keys are kept as SHA-256 and compared in constant time with all of them, so neither their text nor their number
//! of right characters can be read from the time an answer takes. The decision is made on the route axum matched,
//! never on the text of the path, and a route is closed unless [`OPEN_ROUTES`] names it.

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::{
    error::{ApiError, ErrorKind},
    state::AppState,
};

/// Routes that need no key.
const OPEN_ROUTES: [&str; 2] = ["/health", "/ready"];

/// Whose request it is: the digest of the key, or zeros where no key is asked for. Part of the prefix cache's salt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tenant(pub [u8; 32]);

/// The keys that are accepted.
#[derive(Clone, Default)]
pub struct ApiKeys {
    digests: Vec<[u8; 32]>,
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiKeys").field("num_keys", &self.digests.len()).finish()
    }
}

impl ApiKeys {
    /// Keeps the digests of `keys`; empty ones are left out.
    pub fn new<S: AsRef<str>>(keys: impl IntoIterator<Item = S>) -> Self {
        let digests = keys
            .into_iter()
            .map(|key| key.as_ref().trim().to_owned())
            .filter(|key| !key.is_empty())
            .map(|key| Sha256::digest(key.as_bytes()).into())
            .collect();
        Self { digests }
    }

    /// Whether no key is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// The tenant of `key`, if it is one of ours. Looks at every key, whatever it finds.
    #[must_use]
    pub fn check(&self, key: &[u8]) -> Option<Tenant> {
        let digest: [u8; 32] = Sha256::digest(key).into();
        let mut found = Choice::from(0);
        for known in &self.digests {
            found |= known.ct_eq(&digest);
        }
        bool::from(found).then_some(Tenant(digest))
    }
}

/// The key in `Authorization: Bearer ...`, or in `x-api-key`.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let bytes = value.as_bytes();
        let (scheme, key) = bytes.split_at_checked(7)?;
        return scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii());
    }
    headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii())
}

/// Lets a request pass if it brings a key, if the route is open, or if no key is asked for.
pub(crate) async fn require_key(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let keys = state.keys();
    if keys.is_empty() {
        request.extensions_mut().insert(Tenant::default());
        return next.run(request).await;
    }
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let open = route.is_some_and(|route| {
        OPEN_ROUTES.contains(&route) || (route == "/metrics" && state.config().open_metrics)
    });
    if open {
        return next.run(request).await;
    }
    match presented(request.headers()).and_then(|key| keys.check(key)) {
        Some(tenant) => {
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        None => {
            ApiError::new(ErrorKind::Unauthorized, "A valid API key is needed: Authorization: Bearer KEY.")
                .into_response()
        }
    }
}

/// Refuses an odd `Host` (400) and, on a loopback server without keys, one that is not this machine's, and web pages
/// of other origins (403): a page in a browser must not reach a server that only its machine may use.
pub(crate) async fn check_host(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let host = match host_of(&request) {
        Ok(host) => host,
        Err(refusal) => return refusal.into_response(),
    };
    let config = state.config();
    if config.host_check && state.keys().is_empty() {
        if let Some(host) = &host
            && !is_local(host)
            && !config.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(host))
        {
            return ApiError::new(ErrorKind::Forbidden, "This server answers to local host names only.")
                .into_response();
        }
        if let Some(origin) = headers.get(header::ORIGIN) {
            let origin = origin.to_str().unwrap_or("");
            let listed = config.cors_origins.iter().any(|allowed| allowed == origin || allowed == "*");
            let local = origin.split_once("://").is_some_and(|(_, host)| is_local(strip_port(host)));
            if !listed && !local {
                return ApiError::new(
                    ErrorKind::Forbidden,
                    "Web pages of this origin may not ask this server.",
                )
                .into_response();
            }
        }
    }
    next.run(request).await
}

/// The host a request names, without port; `Err` if it cannot be one.
fn host_of(request: &Request) -> Result<Option<String>, ApiError> {
    let odd = || ApiError::new(ErrorKind::InvalidValue, "The Host header is not valid.").with_param("Host");
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let from_header = match hosts.next() {
        None => None,
        Some(value) => Some(value.to_str().map_err(|_| odd())?),
    };
    if hosts.next().is_some() {
        return Err(odd());
    }
    let Some(host) = from_header.or_else(|| request.uri().authority().map(|a| a.as_str())) else {
        return Ok(None);
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']' | '%');
    if host.len() > 255 || !host.chars().all(legal) {
        return Err(odd());
    }
    Ok(Some(strip_port(host).to_owned()))
}

/// `host` without `:port`; the brackets of an IPv6 address stay.
fn strip_port(host: &str) -> &str {
    if host.starts_with('[') {
        return host.find(']').and_then(|end| host.get(..=end)).unwrap_or(host);
    }
    host.split_once(':').map_or(host, |(name, _)| name)
}

/// Whether `host` can only mean this machine.
fn is_local(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.is_empty()
        || bare.eq_ignore_ascii_case("localhost")
        || bare.to_ascii_lowercase().ends_with(".localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_pass() {
        let keys = ApiKeys::new(["alpha-key", "beta-key", " ", ""]);
        assert!(keys.check(b"alpha-key").is_some());
        assert!(keys.check(b"beta-key").is_some());
        assert_ne!(keys.check(b"alpha-key"), keys.check(b"beta-key"));
        for wrong in
            [&b""[..], b"alpha-ke", b"alpha-key ", b"alpha-key2", b"ALPHA-KEY", b" ", "k\u{e9}y".as_bytes()]
        {
            assert_eq!(keys.check(wrong), None, "{wrong:?}");
        }
        assert!(!format!("{keys:?}").contains("alpha"));
    }

    #[test]
    fn local_names() {
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "[::1]", "app.localhost"] {
            assert!(is_local(strip_port(host)), "{host}");
            assert!(is_local(strip_port(&format!("{host}:8080"))), "{host}:8080");
        }
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "[::2]"]
        {
            assert!(!is_local(strip_port(host)), "{host}");
        }
    }
}
