//! What a client is told when something goes wrong: one type, one table, one body shape.
//!
//! Every non-2xx answer is `{"error":{"message","type","param","code"}}`. [`ErrorKind::row`] is the only place where a
//! kind of failure becomes a status, a type and a code. Messages are ours: input is quoted at most [`MAX_QUOTE`]
//! characters long, and nothing of the machine (paths, addresses, type names) is in them.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use ingle_engine::{EngineError, InvalidKind, InvalidRequest};
use serde::Serialize;
use utoipa::ToSchema;

/// Characters of client input that a message repeats at most.
const MAX_QUOTE: usize = 96;
/// Bytes of a message at most; with the rest of the object far below 8 KiB.
const MAX_MESSAGE: usize = 2048;

/// The kinds of failure a client can see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A parameter has a value that cannot be honoured.
    InvalidValue,
    /// The body is no JSON object.
    InvalidJson,
    /// Prompt and answer do not fit the model's context.
    ContextLength,
    /// No key, or a wrong one.
    Unauthorized,
    /// The request comes from a host or web page that may not ask.
    Forbidden,
    /// No model of that name is served.
    ModelNotFound,
    /// No such route.
    NotFound,
    /// The route has other methods.
    MethodNotAllowed,
    /// The body did not arrive in time.
    RequestTimeout,
    /// The body is too large.
    TooLarge,
    /// The body is not JSON, or is encoded.
    UnsupportedMediaType,
    /// The server has enough to do.
    Overloaded,
    /// The key has used what it may.
    RateLimited,
    /// The caller's time would be over before the first token.
    DeadlineUnreachable,
    /// A fault of ours.
    Internal,
    /// The model produced NaN or infinity.
    NonFiniteLogits,
    /// The model is not loaded yet.
    Loading,
    /// The server is going down.
    Draining,
    /// Work waits and the engine does not get on with it.
    Stalled,
    /// The engine has ended.
    EngineDead,
    /// The wall-clock limit of a request is used up.
    Deadline,
}

impl ErrorKind {
    /// Status, `type`, `code` and the seconds of `Retry-After`.
    fn row(self) -> (StatusCode, &'static str, &'static str, Option<u32>) {
        use StatusCode as S;
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        const LIMIT: &str = "rate_limit_error";
        match self {
            Self::InvalidValue => (S::BAD_REQUEST, INVALID, "invalid_value", None),
            Self::InvalidJson => (S::BAD_REQUEST, INVALID, "invalid_json", None),
            Self::ContextLength => (S::BAD_REQUEST, INVALID, "context_length_exceeded", None),
            Self::Unauthorized => (S::UNAUTHORIZED, "authentication_error", "invalid_api_key", None),
            Self::Forbidden => (S::FORBIDDEN, "permission_error", "forbidden_origin", None),
            Self::ModelNotFound => (S::NOT_FOUND, INVALID, "model_not_found", None),
            Self::NotFound => (S::NOT_FOUND, INVALID, "not_found", None),
            Self::MethodNotAllowed => (S::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed", None),
            Self::RequestTimeout => (S::REQUEST_TIMEOUT, INVALID, "request_timeout", None),
            Self::TooLarge => (S::PAYLOAD_TOO_LARGE, INVALID, "request_too_large", None),
            Self::UnsupportedMediaType => {
                (S::UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_media_type", None)
            }
            Self::Overloaded => (S::TOO_MANY_REQUESTS, LIMIT, "overloaded", Some(1)),
            Self::RateLimited => (S::TOO_MANY_REQUESTS, LIMIT, "rate_limit_exceeded", Some(1)),
            Self::DeadlineUnreachable => (S::TOO_MANY_REQUESTS, LIMIT, "deadline_unreachable", Some(1)),
            Self::Internal => (S::INTERNAL_SERVER_ERROR, SERVER, "internal_error", None),
            Self::NonFiniteLogits => (S::INTERNAL_SERVER_ERROR, SERVER, "non_finite_logits", None),
            Self::Loading => (S::SERVICE_UNAVAILABLE, "service_unavailable", "loading", Some(2)),
            Self::Draining => (S::SERVICE_UNAVAILABLE, "service_unavailable", "draining", Some(5)),
            Self::Stalled => (S::SERVICE_UNAVAILABLE, "service_unavailable", "stalled", Some(5)),
            Self::EngineDead => (S::SERVICE_UNAVAILABLE, "service_unavailable", "engine_dead", Some(10)),
            Self::Deadline => (S::GATEWAY_TIMEOUT, SERVER, "deadline_exceeded", None),
        }
    }
}

/// A failure on its way to the client.
#[derive(Debug, Clone)]
pub struct ApiError {
    kind: ErrorKind,
    message: String,
    param: Option<String>,
    retry_after: Option<u32>,
}

/// `Result` with [`ApiError`].
pub type ApiResult<T> = Result<T, ApiError>;

/// The body of every non-2xx answer, and the event that ends a failed stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The failure.
    pub error: ErrorObject,
}

/// A failure as clients parse it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorObject {
    /// A sentence for people.
    pub message: String,
    /// The family of the failure.
    pub r#type: &'static str,
    /// The request parameter at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: &'static str,
}

impl ApiError {
    /// A failure of `kind`; `message` is a sentence for the client.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MAX_MESSAGE {
            let mut end = MAX_MESSAGE;
            while !message.is_char_boundary(end) {
                end -= 1;
            }
            message.truncate(end);
        }
        Self { kind, message, param: None, retry_after: kind.row().3 }
    }

    /// A 400 that names the parameter.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidValue, message).with_param(param)
    }

    /// A 500 whose cause is in the log only, under an id that the client gets.
    pub fn internal(cause: &dyn std::fmt::Display) -> Self {
        let id = uuid::Uuid::new_v4().simple().to_string();
        tracing::error!(error_id = %id, cause = %cause, "internal error");
        Self::opaque(&id)
    }

    /// A 500 with nothing but an id.
    pub(crate) fn opaque(id: &str) -> Self {
        Self::new(ErrorKind::Internal, format!("The server failed to process the request (error id {id})."))
    }

    /// The same, naming `param`.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(quote(&param.into()));
        self
    }

    /// The same, asking to come back after `seconds`.
    #[must_use]
    pub fn with_retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The kind of failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.kind.row().0
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        let (_, r#type, code, _) = self.kind.row();
        ErrorBody {
            error: ErrorObject { message: self.message.clone(), r#type, param: self.param.clone(), code },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.kind == ErrorKind::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"ingle\""));
        }
        response
    }
}

/// At most [`MAX_QUOTE`] characters of `text`, control characters replaced.
pub(crate) fn quote(text: &str) -> String {
    let mut out: String =
        text.chars().take(MAX_QUOTE).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(MAX_QUOTE).is_some() {
        out.push('…');
    }
    out
}

/// The sentence gateways recognise, with both counts.
pub(crate) fn context_length(prompt: usize, answer: usize, max: usize) -> ApiError {
    let total = prompt.saturating_add(answer);
    let message = format!(
        "This model's maximum context length is {max} tokens. However, you requested {total} tokens ({prompt} in the \
         prompt, {answer} for the answer). Please shorten the prompt or ask for fewer tokens."
    );
    ApiError::new(ErrorKind::ContextLength, message)
}

/// The same for a text whose tokens nobody counted, because its length alone says that it cannot fit.
pub(crate) fn hopeless_length(at_least: usize, max: usize) -> ApiError {
    let message = format!(
        "This model's maximum context length is {max} tokens. However, your text has at least {at_least} tokens. Please \
         shorten the prompt."
    );
    ApiError::new(ErrorKind::ContextLength, message)
}

impl From<InvalidRequest> for ApiError {
    fn from(refusal: InvalidRequest) -> Self {
        match refusal.kind {
            InvalidKind::ContextLength { prompt_tokens, max_tokens, max_model_len } => {
                context_length(prompt_tokens, max_tokens as usize, max_model_len).with_param(refusal.param)
            }
            InvalidKind::Value => Self::invalid(refusal.param, refusal.message),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::NonFiniteLogits => {
                Self::new(ErrorKind::NonFiniteLogits, "The model produced numbers that are not finite.")
            }
            EngineError::Dead => engine_dead(),
            other => Self::internal(&other),
        }
    }
}

/// The 503 of an engine that has ended.
pub(crate) fn engine_dead() -> ApiError {
    ApiError::new(ErrorKind::EngineDead, "The engine has ended; this server has to be restarted.")
}

/// The 503 of a server that is going down.
pub(crate) fn draining() -> ApiError {
    ApiError::new(ErrorKind::Draining, "The server is shutting down and takes no new requests.")
}
