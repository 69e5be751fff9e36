//! A router that writes down what it is told, and answers as it is told to.

use std::sync::{Arc, Mutex, PoisonError};

use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinHandle};

use crate::PATIENCE;

/// One request to the router.
#[derive(Debug, Clone)]
pub struct Told {
    /// `GET`, `POST`, ...
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The key it brought.
    pub key: Option<String>,
    /// The body as it came.
    pub bytes: Bytes,
    /// The body as JSON; null if it is none.
    pub json: Value,
}

type Answer = Box<dyn FnMut(&Told) -> (u16, Value) + Send>;

#[derive(Clone)]
struct Shared {
    told: Arc<Mutex<Vec<Told>>>,
    answer: Arc<Mutex<Answer>>,
}

/// See the module's words. Ends when dropped.
pub struct FakeRouter {
    address: String,
    shared: Shared,
    task: JoinHandle<()>,
}

impl Drop for FakeRouter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn take(State(shared): State<Shared>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, 8 << 20).await.unwrap_or_default();
    let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let told = Told {
        method: parts.method.to_string(),
        path: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
        key: header("authorization").and_then(|text| text.strip_prefix("Bearer ")).map(str::to_owned),
        json: serde_json::from_slice(&bytes).unwrap_or_default(),
        bytes,
    };
    let (status, body) = (shared.answer.lock().unwrap_or_else(PoisonError::into_inner))(&told);
    shared.told.lock().unwrap_or_else(PoisonError::into_inner).push(told);
    (StatusCode::from_u16(status).expect("a status"), axum::Json(body)).into_response()
}

impl FakeRouter {
    /// Listens on any free port.
    pub async fn start(answer: impl FnMut(&Told) -> (u16, Value) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let shared = Shared { told: Arc::default(), answer: Arc::new(Mutex::new(Box::new(answer))) };
        let app = Router::new().fallback(take).with_state(shared.clone());
        let task = tokio::spawn(async move { axum::serve(listener, app).await.expect("it serves") });
        Self { address, shared, task }
    }

    /// Host and port.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// All it was told so far.
    #[must_use]
    pub fn told(&self) -> Vec<Told> {
        self.shared.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `done` holds for what it was told.
    ///
    /// # Panics
    /// If that takes too long.
    pub async fn wait_for(&self, what: &str, done: impl Fn(&[Told]) -> bool) -> Vec<Told> {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let told = self.told();
            if done(&told) {
                return told;
            }
            assert!(std::time::Instant::now() < deadline, "not {what}: {told:?}");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}
