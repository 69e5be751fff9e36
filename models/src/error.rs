//! The error of this crate.

use std::path::{Path, PathBuf};

/// What can go wrong when a model is loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file's content is not what it must be; the message says what and where.
    #[error("{path}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, with offset or key where there is one.
        message: String,
    },
    /// The architecture named by the model is not one of ours.
    #[error("architecture {name:?} is not supported; known are: {known}")]
    UnknownArchitecture {
        /// As the model's config names it.
        name: String,
        /// All known names, comma separated.
        known: String,
    },
    /// The step's batch contradicts itself or the model: a fault of the caller.
    #[error("batch: {0}")]
    Batch(String),
    /// The ranks of a model over several devices could not finish a step together.
    #[error("tensor parallelism: {0}")]
    Parallel(String),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] ingle_kernels::Error),
    /// A candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

pub(crate) fn invalid(path: &Path, message: impl Into<String>) -> Error {
    Error::Invalid { path: path.to_owned(), message: message.into() }
}
