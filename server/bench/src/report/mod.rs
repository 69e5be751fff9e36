//! Results as tables, files and pages.

mod html;
mod lines;
mod model;
mod page;
mod pages;
mod plot;
mod serve;
mod table;

use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use serde_json::{Map, Value};

pub use html::serve_html;
pub use lines::lines;
pub use model::{model_remarks, model_table};
pub use pages::{embed_html, model_html, startup_html};
pub use serve::{serve_remarks, serve_table};
pub use table::{Cell, Table};

/// The notes of `key=value` pairs.
///
/// # Errors
/// If one is no pair.
pub fn metadata(pairs: &[String]) -> anyhow::Result<Map<String, Value>> {
    let mut map = Map::new();
    for pair in pairs {
        let (key, value) =
            pair.split_once('=').with_context(|| format!("--metadata wants key=value, not {pair:?}"))?;
        map.insert(key.to_owned(), value.into());
    }
    Ok(map)
}

/// Writes `result` to `path` as JSON.
///
/// # Errors
/// If the file cannot be written.
pub fn write_json(path: &Path, result: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string(result)?;
    text.push('\n');
    write(path, &text)
}

/// Writes `text` to `path`.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("{} could not be written", path.display()))
}
