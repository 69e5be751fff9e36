//! The error of this crate.

/// What can go wrong in an operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An argument does not fit the operation; the message names both.
    #[error("{op}: {message}")]
    Argument {
        /// The operation that refused.
        op: &'static str,
        /// What was given and what was wanted.
        message: String,
    },
    /// Rows of a matrix could not be read while it was laid out.
    #[error("part {part} of a matrix cannot be read: {source}")]
    Unreadable {
        /// Which of the stacked matrices.
        part: usize,
        /// Why.
        source: std::io::Error,
    },
}

/// Result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

pub(crate) fn argument(op: &'static str, message: impl Into<String>) -> Error {
    Error::Argument { op, message: message.into() }
}
