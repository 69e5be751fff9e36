//! `ingle models`: what is on this machine.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::load::local_models;
use crate::cli::ModelsArgs;
use crate::hub;

/// One line of the list.
struct Entry {
    name: String,
    bytes: u64,
    complete: bool,
    path: PathBuf,
}

/// Lists converted models and the hub's cache.
///
/// # Errors
/// If the output cannot be written.
pub fn models(args: &ModelsArgs) -> anyhow::Result<()> {
    let mut entries: Vec<Entry> = local_models().map(|folder| local(&folder)).unwrap_or_default();
    entries.extend(hub::list_cached(args.download_dir.as_deref()).into_iter().map(|model| Entry {
        name: match model.revisions.first() {
            Some(revision) if revision != "main" => format!("{} ({revision})", model.name),
            _ => model.name,
        },
        bytes: model.bytes,
        complete: model.complete,
        path: model.path,
    }));
    let mut out = std::io::stdout().lock();
    if args.json {
        let list: Vec<_> = entries
            .iter()
            .map(|e| json!({"name": e.name, "bytes": e.bytes, "complete": e.complete, "path": e.path}))
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&list)?)?;
        return Ok(());
    }
    if entries.is_empty() {
        writeln!(
            out,
            "No models yet. `ingle serve ORG/NAME` downloads one from the hub; `scripts/demo` gets a small one."
        )?;
        return Ok(());
    }
    let width = entries.iter().map(|e| e.name.chars().count()).max().unwrap_or(0);
    for Entry { name, bytes, complete, path } in entries {
        let state = if complete { "" } else { "  (incomplete)" };
        writeln!(
            out,
            "{name:width$}  {:>8.0} MiB  {}{state}",
            bytes as f64 / (1 << 20) as f64,
            path.display()
        )?;
    }
    Ok(())
}

/// Model folders directly in `folder`.
fn local(folder: &Path) -> Vec<Entry> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if !path.is_dir() {
            continue;
        }
        let files = std::fs::read_dir(&path).into_iter().flatten().flatten();
        entries.push(Entry {
            name: entry.file_name().to_string_lossy().into_owned(),
            bytes: files.filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum(),
            complete: path.join("config.json").is_file(),
            path,
        });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    entries
}
