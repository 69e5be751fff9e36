//! Token ids to text and back: everything between the wire types and the engine that knows about characters.
//!
//! The way of a request: [`template`] turns messages into one string and then into token ids with the help of
//! [`tokenizer`]; both run on a worker of [`pool`], never on the threads that serve sockets. The way back:
//! [`detokenizer`] turns ids into text as they come, [`stop`] holds back what may become a stop string.
//!
//! Nothing here speaks HTTP. Failures are a [`TextError`], which the HTTP side maps to a status.

pub mod detokenizer;
pub mod frame;
pub mod guard;
pub mod pool;
pub mod precheck;
pub mod pyjson;
pub(crate) mod reach;
pub mod splitter;
pub mod stages;
pub mod stop;
pub mod template;
pub mod token_table;
pub mod tokenizer;

pub use detokenizer::Detokenizer;
pub use frame::{Frame, Framed, Side};
pub use pool::{TextLimits, TextPool};
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatInput, ChatTemplate};
pub use tokenizer::{Specials, Tokenizer};

/// Why text could not be turned into ids, or messages into text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// The text is larger than the limit. A client error (413 or 400).
    #[error("the text is {bytes} bytes long; at most {limit} bytes are accepted")]
    TooLong {
        /// Size of the text that was refused.
        bytes: usize,
        /// The limit in force.
        limit: usize,
    },
    /// The model's own split pattern gave up on this text. A client error (400).
    #[error("the text cannot be split into tokens within the work limit of this model's tokenizer")]
    TooComplex,
    /// All workers are busy and the queue is full. The client may retry (429 or 503).
    #[error("too many requests are waiting to be tokenized")]
    Busy,
    /// The work did not finish before its deadline (503).
    #[error("tokenizing took longer than {seconds} s")]
    Timeout {
        /// The deadline in force.
        seconds: u64,
    },
    /// The text cannot fit the model, whatever its tokens are. A client error (400).
    #[error("the text has at least {at_least} tokens; at most {max} fit")]
    TooManyTokens {
        /// Tokens that it has at least.
        at_least: usize,
        /// Tokens that fit.
        max: usize,
    },
    /// Nobody waits for the result any more.
    #[error("the work was given up")]
    GivenUp,
    /// The model has no chat template. A client error (400).
    #[error("this model has no chat template; start the server with --chat-template, or use /v1/completions")]
    NoTemplate,
    /// The chat template refused these messages, or failed on them. A client error (400).
    #[error("{0}")]
    Template(String),
    /// The rendered chat is larger than the limit. A client error (400).
    #[error("the rendered chat is larger than {limit} bytes")]
    OutputTooLong {
        /// The limit in force.
        limit: usize,
    },
    /// The request itself makes no sense, for example a reserved name among the template arguments (400).
    #[error("{0}")]
    Invalid(String),
    /// A file of the model is missing or not usable. Only while loading.
    #[error("{0}")]
    Load(String),
    /// A fault of ours or of a library: the request ends with 500, the server goes on.
    #[error("internal error while handling text")]
    Internal,
}
