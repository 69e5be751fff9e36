//! Copies of fixtures to damage, and what loading them says.

use std::fs;
use std::path::Path;

use ingle_models::{Error, LoadOptions, load_causal_lm};
use serde_json::{Map, Value};
use tempfile::TempDir;

use super::fixture;

/// A copy of fixture `name` to damage.
pub fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    copy_into(name, dir.path());
    dir
}

pub fn copy_into(name: &str, target: &Path) {
    for entry in fs::read_dir(fixture(name)).expect("the fixture") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), target.join(entry.file_name())).expect("a copy");
    }
}

pub fn load_error(folder: &Path) -> Error {
    match load_causal_lm(folder, &LoadOptions::default()) {
        Ok(_) => panic!("the folder must be refused"),
        Err(error) => error,
    }
}

/// Loading `folder` fails with a one-line message that has all of `parts`.
pub fn refused(folder: &Path, parts: &[&str]) {
    let message = load_error(folder).to_string();
    assert!(!message.contains('\n'), "{message:?}");
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

pub fn read_json(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("a JSON object")
}

/// A copy of `name` whose config.json has `changes`.
pub fn with_config(name: &str, changes: &[(&str, Value)]) -> TempDir {
    let dir = copy(name);
    let path = dir.path().join("config.json");
    let mut config = read_json(&path);
    for (key, value) in changes {
        config.insert((*key).to_owned(), value.clone());
    }
    fs::write(path, serde_json::to_vec(&config).expect("JSON")).expect("written");
    dir
}

/// Rewrites the header of a safetensors file.
pub fn edit_header(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let bytes = fs::read(path).expect("a file");
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + len]).expect("a header");
    edit(&mut header);
    let header = serde_json::to_vec(&header).expect("JSON");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(&bytes[8 + len..]);
    fs::write(path, file).expect("written");
}
