//! GGUF files of the Llama class, read as if they were transformers checkpoints.
//!
//! [`open`] checks the header ([`header`]), writes the config that transformers would have ([`config`]) and offers the
//! tensors under transformers' names with llama.cpp's reordering of query and key rows undone ([`tensors`]).
//! [`text_files`] recovers tokenizer and chat template ([`tokenizer`]). Nothing here runs a model.

mod config;
mod header;
#[cfg(test)]
mod hostile_tests;
mod tensors;
#[cfg(test)]
mod tests;
mod tokenizer;
mod vocabulary;
#[cfg(test)]
pub(crate) mod writer;

use std::fs::File;
use std::path::Path;

use serde_json::Value as Json;

use crate::error::{Error, Result, invalid};
use header::Header;
pub(crate) use tensors::GgufSource;

/// A GGUF file opened as a checkpoint.
pub(crate) struct GgufModel {
    /// What transformers' `config.json` would say.
    pub(crate) config: Json,
    /// What transformers' `generation_config.json` would say.
    pub(crate) generation_config: Json,
    /// The tensors.
    pub(crate) source: GgufSource,
}

/// What a server needs to tokenise for a GGUF file: the same content that `ingle convert` writes.
#[derive(Debug, Clone)]
pub struct GgufText {
    /// Content of `tokenizer.json`.
    pub tokenizer: Json,
    /// Content of `tokenizer_config.json`, the chat template included.
    pub tokenizer_config: Json,
    /// Content of `generation_config.json`: the ids that start and end a text.
    pub generation_config: Json,
}

/// Opens `path`: header checked, every tensor that the architecture needs present with its shape, nothing unknown.
///
/// # Errors
/// [`Error::UnknownArchitecture`], or [`Error::Invalid`] naming the file and what is wrong.
pub(crate) fn open(path: &Path) -> Result<GgufModel> {
    let (file, header) = read_header(path)?;
    let shape = config::ModelShape::read(&header, path)?;
    let source = GgufSource::new(file, path, &header, &shape)?;
    let config = config::config_json(&header, &shape, &source, path)?;
    Ok(GgufModel { config, generation_config: vocabulary::generation_config(&header, path)?, source })
}

/// Recovers tokenizer, chat template and end ids of the GGUF file `path`.
///
/// # Errors
/// If the file is damaged, or its tokenizer is of a kind we cannot rebuild exactly; the message lists the known kinds.
pub fn text_files(path: &Path) -> Result<GgufText> {
    let (_, header) = read_header(path)?;
    let vocabulary = vocabulary::Vocabulary::read(&header, path)?;
    Ok(GgufText {
        tokenizer: tokenizer::tokenizer_json(&header, &vocabulary, path)?,
        tokenizer_config: tokenizer::tokenizer_config_json(&header, &vocabulary),
        generation_config: vocabulary::generation_config(&header, path)?,
    })
}

fn read_header(path: &Path) -> Result<(File, Header)> {
    // Asked before opening: opening a pipe would wait for its writer.
    let io = |source| Error::Io { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(invalid(path, "not a regular file"));
    }
    let file = File::open(path).map_err(io)?;
    let header = Header::read(&file, path)?;
    if let Some(count) = header.unsigned("split.count").filter(|&count| count > 1) {
        return Err(invalid(
            path,
            format!("is one of {count} parts of a split model; merge the parts into one file first"),
        ));
    }
    Ok((file, header))
}

impl Header {
    /// A non-negative integer, whatever its width.
    fn unsigned(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key)? {
            header::Value::Unsigned(n) => Some(*n),
            header::Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A number as f64; integers too, since some writers store `10000` for a float.
    fn number(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            header::Value::Float(x) => Some(*x),
            header::Value::Unsigned(n) => Some(*n as f64),
            header::Value::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    fn boolean(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key)? {
            header::Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            header::Value::Text(s) => Some(s),
            _ => None,
        }
    }

    fn texts(&self, key: &str) -> Option<&[String]> {
        match self.metadata.get(key)? {
            header::Value::Texts(v) => Some(v),
            _ => None,
        }
    }

    fn integers(&self, key: &str) -> Option<&[i64]> {
        match self.metadata.get(key)? {
            header::Value::Integers(v) => Some(v),
            _ => None,
        }
    }

    fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.metadata.get(key)? {
            header::Value::Floats(v) => Some(v),
            _ => None,
        }
    }
}
