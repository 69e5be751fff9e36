//! What is kept of one request.

/// How a request ended badly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// No connection.
    Connect,
    /// Not done in time.
    Timeout,
    /// A status other than 200.
    Status(u16),
    /// An error told within the stream.
    StreamError,
    /// The connection broke, or the stream ended before the answer did.
    Truncated,
    /// What came was no answer of this API.
    BadResponse,
    /// An answer of no tokens.
    Empty,
}

impl Failure {
    /// Whether the server had too much to do and said so before it began: what a router sends elsewhere.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Status(429 | 503))
    }

    /// Its name in results.
    pub(crate) fn kind(&self) -> String {
        match self {
            Self::Connect => "connect".to_owned(),
            Self::Timeout => "timeout".to_owned(),
            Self::Status(code) => format!("http_{code}"),
            Self::StreamError => "stream_error".to_owned(),
            Self::Truncated => "truncated".to_owned(),
            Self::BadResponse => "bad_response".to_owned(),
            Self::Empty => "empty_answer".to_owned(),
        }
    }
}

/// One request; times in seconds, [`RequestRecord::start`] since the run began.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct RequestRecord {
    /// When it was sent.
    pub(crate) start: f64,
    /// From sending to the first token.
    pub(crate) ttft: f64,
    /// Between one arrival of tokens and the next.
    pub(crate) itls: Vec<f64>,
    /// From sending to the end of the stream.
    pub(crate) latency: f64,
    /// Tokens of the prompt, as the server counts them; else as this program did.
    pub(crate) prompt_tokens: u64,
    /// Tokens of the answer, as the server counts them; else the arrivals.
    pub(crate) output_tokens: u64,
    /// Whether the server counted.
    pub(crate) has_usage: bool,
    /// Tokens of the prompt that the server had cached, if it says.
    pub(crate) cached_tokens: Option<u64>,
    /// Why it failed.
    pub(crate) failure: Option<Failure>,
    /// A refusal that said when to come back (`Retry-After`).
    pub(crate) has_retry_after: bool,
    /// What the server or the connection said of the failure.
    pub(crate) message: Option<String>,
    /// The answer, if it is needed for the next turn.
    pub(crate) answer: String,
}

impl RequestRecord {
    /// Time for each token after the first; `None` for an answer of one.
    pub(crate) fn tpot(&self) -> Option<f64> {
        (self.output_tokens > 1).then(|| (self.latency - self.ttft) / (self.output_tokens - 1) as f64)
    }

    /// Failed with `failure` for the reason `message`.
    pub(crate) fn failed(mut self, failure: Failure, message: impl Into<String>) -> Self {
        self.failure = Some(failure);
        let mut message: String = message.into();
        if let Some((end, _)) = message.char_indices().nth(300) {
            message.truncate(end);
        }
        self.message = Some(message);
        self
    }
}
