//! The house's conventions, each as a failure.
//!
//! That every fixture has its test is checked where the fixtures are used: `models/tests/parity.rs`.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files of the repository, as paths from its root. Without git: all files of the source folders.
fn files() -> Vec<String> {
    let git = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let mut files = match git {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            let names = String::from_utf8(output.stdout).expect("names are UTF-8");
            names.split_terminator('\0').map(str::to_owned).collect()
        }
        _ => {
            let mut files = Vec::new();
            for folder in ["benches", "kernels", "models", "scripts", "server", "tests"] {
                walk(&root().join(folder), folder, &mut files);
            }
            files
        }
    };
    files.retain(|name| root().join(name).is_file());
    assert!(files.len() > 100, "only {} files were found", files.len());
    files
}

fn walk(folder: &Path, name: &str, files: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let child = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{name}/{child}");
        if child.starts_with('.') || ["target", "node_modules", "__pycache__"].contains(&child.as_str()) {
            continue;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path(), &path, files),
            _ => files.push(path),
        }
    }
}

/// The text of `name`; none for a file that is no text.
fn text(name: &str) -> Option<String> {
    String::from_utf8(std::fs::read(root().join(name)).expect("a tracked file is there")).ok()
}

/// Lines of the `.rs` files that `wanted` picks and in which `bad` finds something, comments left out.
fn lines(wanted: impl Fn(&str) -> bool, bad: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for name in files().iter().filter(|name| name.ends_with(".rs") && wanted(name)) {
        for (number, line) in text(name).expect("sources are UTF-8").lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if bad(code) {
                found.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    found
}

fn none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}\n{}", found.join("\n"));
}

#[test]
fn the_engine_speaks_only_ids() {
    let words = ["axum", "serde_json", "tokenizers", "minijinja", "hyper"];
    let found = lines(
        |name| name.starts_with("server/engine/src/"),
        |code| words.iter().any(|word| code.contains(word)),
    );
    none(&found, "the engine knows no text, JSON or HTTP");
}

#[test]
fn tensors_are_touched_at_the_seams_only() {
    let candle = |code: &str| code.contains("candle_") || code.contains("candle::");
    let runner = [
        "server/engine/src/runner.rs",
        "server/engine/src/runner/flight.rs",
        "server/engine/src/runner/on_device.rs",
        "server/engine/src/runner/tests.rs",
    ];
    none(
        &lines(|name| name.starts_with("server/") && !runner.contains(&name), candle),
        "only the runner knows tensors",
    );
    let kernels = [
        "check/attention.rs",
        "check/elementwise.rs",
        "check/encoder.rs",
        "check/linear.rs",
        "check/mod.rs",
        "check/sampling.rs",
        "check/step.rs",
        "cpu/amx/tests.rs",
        "cpu/bf16_gemm.rs",
        "cpu/half_gemm.rs",
        "cpu/matrix.rs",
        "cuda/attention.rs",
        "cuda/elementwise.rs",
        "cuda/encoder.rs",
        "cuda/graph.rs",
        "cuda/ids.rs",
        "cuda/linear.rs",
        "cuda/linear/large.rs",
        "cuda/linear/lt.rs",
        "cuda/module.rs",
        "cuda/ragged.rs",
        "cuda/sampling.rs",
        "cuda/step.rs",
        "cuda/tensor.rs",
        "cuda/transfer.rs",
        "error.rs",
        "fp8.rs",
        "gpu/cuda.rs",
        "gpu/fault.rs",
        "gpu/mod.rs",
        "gpu/upload.rs",
        "kv_layer.rs",
        "matrix_rows.rs",
        "nccl.rs",
        "ops.rs",
        "ops/embedding.rs",
        "ops/encoder.rs",
        "ops/row_blocks.rs",
        "ops/sampling.rs",
        "ops/sampling/tests.rs",
        "reference.rs",
        "reference/encoder.rs",
        "tiles.rs",
        "weight.rs",
    ];
    let other = |name: &str| name.strip_prefix("kernels/src/").is_some_and(|name| !kernels.contains(&name));
    none(&lines(other, candle), "kernels compute on slices; only the listed files know tensors");
}

/// server -> engine -> models -> kernels; tests and benches look on. A crate that names itself does so for its tests.
#[test]
fn crates_depend_in_one_direction() {
    let allowed: [(&str, &[&str]); 7] = [
        ("kernels", &[]),
        ("models", &["ingle-kernels"]),
        ("server/engine", &["ingle-engine", "ingle-models"]),
        ("server/bench", &["ingle-engine"]),
        ("server", &["ingle", "ingle-bench", "ingle-engine"]),
        ("benches", &["ingle", "ingle-engine", "ingle-models", "ingle-kernels"]),
        ("tests", &[]),
    ];
    let mut members: Vec<String> = Vec::new();
    let workspace: toml::Table = text("Cargo.toml").expect("UTF-8").parse().expect("TOML");
    for member in workspace["workspace"]["members"].as_array().expect("members") {
        members.push(member.as_str().expect("a path").to_owned());
    }
    let known: BTreeSet<&str> = allowed.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        members.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        known,
        "a new crate needs its line here"
    );
    for (name, allowed) in allowed {
        let manifest: toml::Table =
            text(&format!("{name}/Cargo.toml")).expect("UTF-8").parse().expect("TOML");
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (dependency, _) in manifest.get(kind).and_then(toml::Value::as_table).into_iter().flatten() {
                let ours = dependency.starts_with("ingle");
                assert!(!ours || allowed.contains(&dependency.as_str()), "{name} must not know {dependency}");
            }
        }
        assert_eq!(manifest["lints"]["workspace"].as_bool(), Some(true), "{name} has the workspace's lints");
    }
}

#[test]
fn nothing_is_left_undone() {
    // Put together, so that this file does not find itself.
    let words = ["todo", "dbg", "unimplemented"].map(|word| format!("{word}!("));
    let found = lines(|_| true, |code| words.iter().any(|word| code.contains(word.as_str())));
    none(&found, "unfinished work");
    let marks =
        ["TO", "FIX", "X"].iter().zip(["DO", "ME", "XX"]).map(|(a, b)| format!("{a}{b}")).collect::<Vec<_>>();
    let mut found = Vec::new();
    for name in files()
        .iter()
        .filter(|name| name.ends_with(".rs") || name.ends_with(".py") || name.starts_with("scripts/"))
    {
        let text = text(name).expect("sources are UTF-8");
        let words = |line: &str| {
            line.split(|c: char| !c.is_alphanumeric()).any(|word| marks.iter().any(|mark| mark == word))
        };
        found.extend(text.lines().filter(|line| words(line)).map(|line| format!("{name}: {line}")));
    }
    none(&found, "notes to oneself");
}

#[test]
fn files_are_short_enough_to_read() {
    const MOST: usize = 700;
    // A file that must be longer stands here with the reason.
    let exceptions: [(&str, &str); 0] = [];
    let long: Vec<String> = files()
        .into_iter()
        .filter(|name| name.ends_with(".rs") && exceptions.iter().all(|(exception, _)| exception != name))
        .map(|name| (text(&name).expect("sources are UTF-8").lines().count(), name))
        .filter(|(lines, _)| *lines > MOST)
        .map(|(lines, name)| format!("{name}: {lines} lines"))
        .collect();
    none(&long, "longer than 700 lines");
}

/// The repository says nothing of the machines it was made on, nor where packages come from: that is for each
/// machine's own settings.
#[test]
fn no_machine_is_named() {
    // Put together, so that this file does not find itself.
    let words: Vec<String> = [
        ["/ro", "ot/"],
        ["/wo", "rk/"],
        ["/tm", "p/"],
        ["/ho", "me/"],
        ["crates", ".io"],
        ["pypi", ".org"],
        ["python", "hosted"],
        ["registry.npm", "js"],
        ["static.rust", "-lang"],
    ]
    .iter()
    .map(|parts| parts.concat())
    .collect();
    let mut found = Vec::new();
    // The lock file names the registry by its nature.
    for name in files().iter().filter(|name| *name != "Cargo.lock") {
        let Some(text) = text(name) else { continue };
        for word in words.iter().filter(|word| text.contains(word.as_str())) {
            found.push(format!("{name}: {word}"));
        }
    }
    none(&found, "names of machines and registries");
}
