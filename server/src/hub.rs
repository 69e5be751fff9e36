//! Where a model's files come from: a path as it is, the local Hugging Face cache, or the hub.
//!
//! [`resolve`] takes what stands on the command line. An existing directory or `.gguf` file is used as it is. A name
//! like `org/name` is looked up in the cache, in the layout that all Hugging Face tools share, and only what is
//! missing is downloaded: configuration, tokenizer, templates, and the weights as safetensors (or the only GGUF
//! file). The size of each file, and its SHA-256 where the hub states one, are checked before it is used; a
//! file that does not match is removed. The variables `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_ENDPOINT` and
//! `HF_HUB_OFFLINE` mean what they mean elsewhere.

use futures::StreamExt;
use hf_hub::HFClient;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// How long the hub may take to say what a model consists of.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(50);
/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a download may stand still.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Left free on the disk beyond what is downloaded.
const SPARE_BYTES: u64 = 64 << 20;

/// Files besides the weights that a model may need, by name.
const SMALL_FILES: [&str; 17] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
];

const INDEX: &str = "model.safetensors.index.json";

/// How to look for a model.
#[derive(Debug, Clone, Default)]
pub struct HubOptions {
    /// A branch, tag or commit; `main` if absent.
    pub revision: Option<String>,
    /// An access token; if absent, `HF_TOKEN` or the file that `hf auth login` writes.
    pub token: Option<String>,
    /// The cache; if absent, `HF_HUB_CACHE`, `HF_HOME/hub`, or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// Use the cache only. Also set by `HF_HUB_OFFLINE=1`.
    pub offline: bool,
    /// The hub; if absent, `HF_ENDPOINT` or huggingface.co.
    pub endpoint: Option<String>,
}

/// Why a model was not found or not downloaded. Each message fits on one line and says what to do, where possible.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No runtime to ask with.
    #[error("the hub cannot be asked: {0}")]
    Runtime(String),
    /// A path that does not exist, or a name that is none.
    #[error("{0}: no such file or directory, and not a model name like org/name")]
    NoSuchModel(String),
    /// Not in the cache, and the hub must not be asked.
    #[error("{model} (revision {revision}) is not complete in {cache}, and downloads are switched off")]
    Offline {
        /// The model's name.
        model: String,
        /// The revision asked for.
        revision: String,
        /// The cache that was searched.
        cache: PathBuf,
    },
    /// The hub refused or could not be reached.
    #[error("{model}: {reason}")]
    Hub {
        /// The model's name.
        model: String,
        /// What the hub said.
        reason: String,
    },
    /// The repository has nothing that can be loaded.
    #[error("{model}: {reason}")]
    Unusable {
        /// The model's name.
        model: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The disk is too small.
    #[error("{cache} has {free} bytes free, but {model} needs {needed} more")]
    NoSpace {
        /// The model's name.
        model: String,
        /// The cache.
        cache: PathBuf,
        /// Bytes to download.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A downloaded file is not what the hub announced. It was removed.
    #[error("{model}: the downloaded {file} is damaged ({reason}); it was removed, please try again")]
    Damaged {
        /// The model's name.
        model: String,
        /// The file.
        file: String,
        /// What does not match.
        reason: String,
    },
    /// Reading or writing the cache failed.
    #[error("{path}: {error}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
}

/// A model in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedModel {
    /// `org/name`.
    pub name: String,
    /// Branches and tags that point to this commit.
    pub revisions: Vec<String>,
    /// The commit.
    pub commit: String,
    /// The directory with its files.
    pub path: PathBuf,
    /// Size of all files.
    pub bytes: u64,
    /// Whether configuration and weights are all there.
    pub complete: bool,
}

/// Finds the files of `model`, and downloads them if need be. Returns a directory, or a `.gguf` file.
pub async fn resolve(model: &str, options: &HubOptions, show_progress: bool) -> Result<PathBuf, HubError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let no_such_model = || HubError::NoSuchModel(model.to_owned());
    if !is_model_name(model) {
        return Err(no_such_model());
    }
    let revision = options.revision.as_deref().unwrap_or("main");
    if !is_plain_path(revision) {
        return Err(HubError::Hub {
            model: model.to_owned(),
            reason: format!("{revision:?} is not a revision"),
        });
    }
    let cache = options.cache_dir.clone().unwrap_or_else(default_cache);
    if let Some(found) = cached(&cache, model, revision) {
        return Ok(found);
    }
    if options.offline || offline_by_environment() {
        return Err(HubError::Offline { model: model.to_owned(), revision: revision.to_owned(), cache });
    }
    Download { model, revision, cache: &cache, options, show_progress }.run().await
}

/// All models in the cache, by name.
pub fn list_cached(cache_dir: Option<&Path>) -> Vec<CachedModel> {
    let cache = cache_dir.map_or_else(default_cache, Path::to_path_buf);
    let mut models = Vec::new();
    for repo in children(&cache) {
        let folder = repo.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(name) = folder.strip_prefix("models--").map(|n| n.replacen("--", "/", 1)) else { continue };
        for snapshot in children(&repo.join("snapshots")) {
            let commit = snapshot.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
            let revisions = children(&repo.join("refs"))
                .into_iter()
                .filter(|r| std::fs::read_to_string(r).is_ok_and(|text| text.trim() == commit))
                .filter_map(|r| r.file_name().and_then(|n| n.to_str()).map(str::to_owned))
                .collect();
            models.push(CachedModel {
                name: name.clone(),
                revisions,
                commit,
                bytes: size_of(&snapshot, 4),
                complete: usable(&snapshot, &repo).is_some(),
                path: snapshot,
            });
        }
    }
    models.sort_by(|a, b| (&a.name, &a.commit).cmp(&(&b.name, &b.commit)));
    models
}

/// The cache that is used when none is named.
pub fn default_cache() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/huggingface/hub")))
        .unwrap_or_else(|| PathBuf::from(".cache/huggingface/hub"))
}

fn offline_by_environment() -> bool {
    std::env::var("HF_HUB_OFFLINE")
        .is_ok_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"))
}

fn is_model_name(model: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && p.len() <= 96
            && !p.starts_with(['.', '-'])
            && !p.contains("--")
            && !p.contains("..")
            && p.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
    };
    model.split_once('/').is_some_and(|(org, name)| part(org) && part(name)) && !model.ends_with(".gguf")
}

/// A relative path without `..`: it stays below where it is put.
fn is_plain_path(path: &str) -> bool {
    !path.is_empty()
        && !path.contains('\\')
        && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

fn repo_dir(cache: &Path, model: &str) -> PathBuf {
    cache.join(format!("models--{}", model.replace('/', "--")))
}

/// The cached snapshot of a revision, if nothing is missing in it.
fn cached(cache: &Path, model: &str, revision: &str) -> Option<PathBuf> {
    let repo = repo_dir(cache, model);
    let commit = match std::fs::read_to_string(repo.join("refs").join(revision)) {
        Ok(commit) => commit.trim().to_owned(),
        Err(_) => revision.to_owned(),
    };
    if !is_plain_path(&commit) {
        return None;
    }
    usable(&repo.join("snapshots").join(commit), &repo)
}

/// The path to load from a snapshot: the directory if configuration and all weights are there, or its GGUF file.
/// Links may point into the model's own part of the cache only.
fn usable(snapshot: &Path, repo: &Path) -> Option<PathBuf> {
    let root = repo.canonicalize().ok()?;
    let there = |name: &str| {
        let path = snapshot.join(name);
        path.canonicalize().is_ok_and(|real| real.starts_with(&root))
            && std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() > 0)
    };
    let files: Vec<String> = children(snapshot)
        .into_iter()
        .filter_map(|p| p.file_name().and_then(|n| n.to_str()).map(str::to_owned))
        .filter(|name| there(name))
        .collect();
    let weights = if there(INDEX) {
        let text = std::fs::read_to_string(snapshot.join(INDEX)).ok()?;
        let shards = shards(&text).ok()?;
        !shards.is_empty() && shards.iter().all(|s| there(s))
    } else {
        files.iter().any(|f| f.ends_with(".safetensors"))
    };
    if there("config.json") && weights {
        return Some(snapshot.to_path_buf());
    }
    let mut gguf = files.iter().filter(|f| f.ends_with(".gguf"));
    match (gguf.next(), gguf.next()) {
        (Some(only), None) => Some(snapshot.join(only)),
        _ => None,
    }
}

/// Whether `path` is a file of a sentence-transformers module beside the transformer: `2_Dense/model.safetensors`.
fn is_module_file(path: &str) -> bool {
    let Some((folder, file)) = path.split_once('/') else { return false };
    let numbered = folder.split_once('_').is_some_and(|(number, name)| {
        number.parse::<u8>().is_ok() && !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric())
    });
    numbered && matches!(file, "config.json" | "model.safetensors")
}

/// The file names in an index of shards; each must be a plain name.
fn shards(index: &str) -> Result<BTreeSet<String>, String> {
    let index: serde_json::Value = serde_json::from_str(index).map_err(|e| format!("{INDEX}: {e}"))?;
    let map = index["weight_map"].as_object().ok_or_else(|| format!("{INDEX} has no weight_map"))?;
    map.values()
        .map(|name| match name.as_str() {
            Some(name) if is_plain_path(name) && !name.contains('/') => Ok(name.to_owned()),
            _ => Err(format!("{INDEX} names the shard {name}, which is not a plain file name")),
        })
        .collect()
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

fn size_of(dir: &Path, depth: usize) -> u64 {
    children(dir)
        .iter()
        .map(|path| match std::fs::metadata(path) {
            Ok(m) if m.is_dir() && depth > 0 => size_of(path, depth - 1),
            Ok(m) if m.is_file() => m.len(),
            _ => 0,
        })
        .fold(0, u64::saturating_add)
}

/// One download from the hub.
struct Download<'a> {
    model: &'a str,
    revision: &'a str,
    cache: &'a Path,
    options: &'a HubOptions,
    show_progress: bool,
}

/// A file in the repository: its size, and its SHA-256 if the hub states it.
#[derive(Debug, Clone)]
struct Remote {
    path: String,
    size: u64,
    sha256: Option<String>,
}

impl Download<'_> {
    async fn run(&self) -> Result<PathBuf, HubError> {
        let client = self.client()?;
        let lookup = tokio::time::timeout(LOOKUP_DEADLINE, self.look_up(&client));
        let (commit, files) = lookup.await.map_err(|_| {
            self.hub_error(format!("the hub did not answer within {} s", LOOKUP_DEADLINE.as_secs()))
        })??;
        let repo = repo_dir(self.cache, self.model);
        let snapshot = repo.join("snapshots").join(&commit);
        std::fs::create_dir_all(&snapshot).map_err(|error| HubError::Io { path: snapshot.clone(), error })?;
        let mut wanted = self.choose(&files)?;
        if let Some(index) = files.iter().find(|f| f.path == INDEX) {
            self.fetch(&client, &commit, &snapshot, index).await?;
            let path = snapshot.join(INDEX);
            let text = std::fs::read_to_string(&path).map_err(|error| HubError::Io { path, error })?;
            for shard in shards(&text).map_err(|reason| self.unusable(reason))? {
                match files.iter().find(|f| f.path == shard) {
                    Some(file) => wanted.push(file.clone()),
                    None => {
                        return Err(
                            self.unusable(format!("{INDEX} names {shard}, which is not in the repository"))
                        );
                    }
                }
            }
        }
        wanted.retain(|file| !intact(&snapshot.join(&file.path), file.size));
        self.check_space(wanted.iter().map(|f| f.size).fold(0, u64::saturating_add))?;
        for file in &wanted {
            self.fetch(&client, &commit, &snapshot, file).await?;
        }
        // The name of the revision comes last: whoever finds it finds complete files.
        let reference = repo.join("refs").join(self.revision);
        if self.revision != commit {
            write_atomically(&reference, &commit).map_err(|error| HubError::Io { path: reference, error })?;
        }
        usable(&snapshot, &repo).ok_or_else(|| self.unusable("the download is not complete".into()))
    }

    fn client(&self) -> Result<HFClient, HubError> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("ingle/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(STALL_TIMEOUT)
            // A redirect to another host loses the token; that is the library's own rule.
            .redirect(reqwest::redirect::Policy::limited(5))
            .build()
            .map_err(|e| self.hub_error(chain(&e)))?;
        let mut builder = HFClient::builder().client(http).cache_dir(self.cache).retry_max_attempts(2);
        if let Some(token) = &self.options.token {
            builder = builder.token(token);
        }
        if let Some(endpoint) = &self.options.endpoint {
            builder = builder.endpoint(endpoint);
        }
        builder.build().map_err(|e| self.hub_error(chain(&e)))
    }

    /// The commit of the revision and the files in it.
    async fn look_up(&self, client: &HFClient) -> Result<(String, Vec<Remote>), HubError> {
        let (owner, name) = hf_hub::split_id(self.model);
        let repo = client.model(owner, name);
        let info = repo.info().revision(self.revision).send().await.map_err(|e| self.hub_error(chain(&e)))?;
        let commit = info.sha.filter(|sha| is_hex(sha, 40));
        let commit = commit.ok_or_else(|| self.hub_error("the hub did not name a commit".into()))?;
        let tree = repo.list_tree().revision(commit.as_str()).recursive(true).send();
        let mut tree = std::pin::pin!(tree.map_err(|e| self.hub_error(chain(&e)))?);
        let mut files = Vec::new();
        while let Some(entry) = tree.next().await {
            if let RepoTreeEntry::File { path, size, lfs, .. } =
                entry.map_err(|e| self.hub_error(chain(&e)))?
                && is_plain_path(&path)
            {
                let sha256 = lfs.and_then(|lfs| lfs.sha256).filter(|sha| is_hex(sha, 64));
                files.push(Remote { path, size, sha256 });
            }
        }
        Ok((commit, files))
    }

    /// The files to download, without the shards that an index names.
    fn choose(&self, files: &[Remote]) -> Result<Vec<Remote>, HubError> {
        let ends = |suffix: &'static str| {
            files.iter().filter(move |f| f.path.ends_with(suffix) && !f.path.contains('/'))
        };
        let mut wanted: Vec<Remote> = files
            .iter()
            .filter(|f| SMALL_FILES.contains(&f.path.as_str()) || is_module_file(&f.path))
            .cloned()
            .collect();
        if files.iter().any(|f| f.path == INDEX) {
            return Ok(wanted);
        }
        if let Some(single) = files.iter().find(|f| f.path == "model.safetensors") {
            wanted.push(single.clone());
        } else if ends(".safetensors").next().is_some() {
            wanted.extend(ends(".safetensors").cloned());
        } else {
            let gguf: Vec<_> = ends(".gguf").collect();
            match gguf.as_slice() {
                [only] => wanted.push((*only).clone()),
                [] if ends(".bin").next().is_some() => {
                    return Err(self.unusable("it has only .bin weights; convert them to safetensors".into()));
                }
                [] => return Err(self.unusable("it has neither safetensors nor GGUF weights".into())),
                several => {
                    let names: Vec<_> = several.iter().take(8).map(|f| f.path.as_str()).collect();
                    return Err(self.unusable(format!(
                        "it has several GGUF files ({}); download one and give its path",
                        names.join(", ")
                    )));
                }
            }
        }
        Ok(wanted)
    }

    fn check_space(&self, needed: u64) -> Result<(), HubError> {
        let stat = rustix::fs::statvfs(self.cache)
            .map_err(|e| HubError::Io { path: self.cache.to_path_buf(), error: e.into() })?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if needed.saturating_add(if needed > 0 { SPARE_BYTES } else { 0 }) > free {
            return Err(HubError::NoSpace {
                model: self.model.to_owned(),
                cache: self.cache.to_path_buf(),
                needed,
                free,
            });
        }
        Ok(())
    }

    /// Downloads one file into the snapshot and checks it.
    async fn fetch(
        &self,
        client: &HFClient,
        commit: &str,
        snapshot: &Path,
        file: &Remote,
    ) -> Result<(), HubError> {
        let target = snapshot.join(&file.path);
        if intact(&target, file.size) {
            return Ok(());
        }
        // A blob of the wrong size would be taken for the file by the library, which goes by the name alone.
        remove_with_blob(&target);
        let mut reason = String::new();
        // Twice: the first time may find a damaged blob that an earlier, interrupted run left behind.
        for _ in 0..2 {
            let path = self.fetch_once(client, commit, file).await?;
            let (checked_path, checked_file) = (path.clone(), file.clone());
            let checked = tokio::task::spawn_blocking(move || check(&checked_path, &checked_file)).await;
            match checked {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(why)) => reason = why,
                Err(_) => reason = "it could not be checked".into(),
            }
            remove_with_blob(&path);
        }
        Err(HubError::Damaged { model: self.model.to_owned(), file: file.path.clone(), reason })
    }

    async fn fetch_once(&self, client: &HFClient, commit: &str, file: &Remote) -> Result<PathBuf, HubError> {
        let (owner, name) = hf_hub::split_id(self.model);
        let bar = Bar::new(&file.path, file.size, self.show_progress);
        let repo = client.model(owner, name);
        let download =
            repo.download_file().filename(file.path.as_str()).revision(commit).progress(bar.clone()).send();
        let result = download.await;
        bar.0.finish_and_clear();
        result.map_err(|e| self.hub_error(format!("{}: {}", file.path, chain(&e))))
    }

    fn hub_error(&self, reason: String) -> HubError {
        HubError::Hub { model: self.model.to_owned(), reason }
    }

    fn unusable(&self, reason: String) -> HubError {
        HubError::Unusable { model: self.model.to_owned(), reason }
    }
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A file of this size is there. Its contents were checked when it was downloaded.
fn intact(path: &Path, size: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == size)
}

/// Compares a downloaded file with what the hub announced, and makes sure that it is on the disk.
fn check(path: &Path, file: &Remote) -> Result<(), String> {
    use sha2::Digest;
    let mut opened = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let size = opened.metadata().map_err(|e| e.to_string())?.len();
    if size != file.size {
        return Err(format!("{size} bytes instead of {}", file.size));
    }
    // The cache names large files by their SHA-256.
    let blob = path.canonicalize().map_err(|e| e.to_string())?;
    let by_name = blob.file_name().and_then(|n| n.to_str()).filter(|n| is_hex(n, 64));
    if let Some(want) = file.sha256.as_deref().or(by_name) {
        let mut hash = sha2::Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match opened.read(&mut buffer).map_err(|e| e.to_string())? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        let got: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        if !got.eq_ignore_ascii_case(want) {
            return Err("its SHA-256 is not the one that the hub states".into());
        }
    }
    opened.sync_all().map_err(|e| e.to_string())
}

/// Removes a file of a snapshot together with the blob it points to.
fn remove_with_blob(path: &Path) {
    if let Ok(blob) = path.canonicalize() {
        let _ = std::fs::remove_file(blob);
    }
    // Absent is fine; anything else shows when the file is written again.
    let _ = std::fs::remove_file(path);
}

fn write_atomically(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path)
}

/// An error and what caused it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text.replace(['\n', '\r'], " ")
}

/// A progress bar for one file.
#[derive(Clone)]
struct Bar(ProgressBar);

impl Bar {
    fn new(name: &str, size: u64, show: bool) -> Self {
        let bar = if show { ProgressBar::new(size) } else { ProgressBar::hidden() };
        if let Ok(style) =
            ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        Self(bar)
    }
}

impl ProgressHandler for Bar {
    fn on_progress(&self, event: &ProgressEvent) {
        match event {
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                if let Some(file) = files.last() {
                    self.0.set_position(file.bytes_completed);
                }
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, .. }) => {
                self.0.set_position(*bytes_completed);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
