use super::*;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789012345678901234567890123456789";

/// By file name: how often to serve something else, and what.
type Replacements = BTreeMap<String, (usize, Vec<u8>)>;

/// A repository: names and contents.
type Files<'a> = &'a [(&'a str, &'a [u8])];

/// What the stand-in for the hub does.
#[derive(Clone, Default)]
struct Hub {
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    /// Served instead of a file's contents, this many times.
    wrong: Arc<Mutex<Replacements>>,
    /// Answers every request with this.
    status: Option<StatusCode>,
    /// Sends downloads to this other server.
    redirect: Option<String>,
    downloads: Arc<Mutex<Vec<String>>>,
    tokens: Arc<Mutex<Vec<Option<String>>>>,
}

impl Hub {
    fn with(files: &[(&str, &[u8])]) -> Self {
        let hub = Self::default();
        *hub.files.lock().expect("lock") = files.iter().map(|(n, b)| ((*n).to_owned(), b.to_vec())).collect();
        hub
    }

    async fn start(&self) -> String {
        let app = Router::new()
            .route("/api/models/org/name/revision/{revision}", get(info))
            .route("/api/models/org/name/tree/{revision}", get(tree))
            .route("/org/name/resolve/{revision}/{*file}", get(file))
            .with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move { axum::serve(listener, app).await });
        format!("http://{address}")
    }

    fn downloads(&self) -> Vec<String> {
        self.downloads.lock().expect("lock").clone()
    }
}

async fn info(State(hub): State<Hub>) -> Response {
    if let Some(status) = hub.status {
        return (status, "no").into_response();
    }
    axum::Json(serde_json::json!({"id": "org/name", "sha": COMMIT})).into_response()
}

async fn tree(State(hub): State<Hub>) -> Response {
    let files = hub.files.lock().expect("lock");
    let entries: Vec<_> = files
        .iter()
        .map(|(path, bytes)| {
            let lfs = path
                .ends_with("tensors")
                .then(|| serde_json::json!({"oid": sha256(bytes), "size": bytes.len()}));
            serde_json::json!({"type": "file", "oid": "x", "size": bytes.len(), "path": path, "lfs": lfs})
        })
        .collect();
    axum::Json(entries).into_response()
}

async fn file(
    State(hub): State<Hub>,
    UrlPath((_, name)): UrlPath<(String, String)>,
    method: axum::http::Method,
    headers: HeaderMap,
) -> Response {
    let token = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).map(str::to_owned);
    hub.tokens.lock().expect("lock").push(token);
    let Some(bytes) = hub.files.lock().expect("lock").get(&name).cloned() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let mut response = Response::new(Body::empty());
    let set = response.headers_mut();
    set.insert(header::ETAG, format!("\"{}\"", sha256(&bytes)).parse().expect("a header"));
    set.insert("x-repo-commit", COMMIT.parse().expect("a header"));
    set.insert("x-linked-size", bytes.len().into());
    if let Some(other) = &hub.redirect {
        *response.status_mut() = StatusCode::FOUND;
        let location = format!("{other}/org/name/resolve/main/{name}");
        response.headers_mut().insert(header::LOCATION, location.parse().expect("a header"));
        return response;
    }
    if method == axum::http::Method::HEAD {
        return response;
    }
    hub.downloads.lock().expect("lock").push(name.clone());
    let wrong = hub.wrong.lock().expect("lock").get_mut(&name).and_then(|(times, body)| {
        *times = times.checked_sub(1)?;
        Some(body.clone())
    });
    *response.body_mut() = Body::from(wrong.unwrap_or(bytes));
    response
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

const SINGLE: [(&str, &[u8]); 6] = [
    ("config.json", b"{}"),
    ("tokenizer.json", b"{\"a\": 1}"),
    ("model.safetensors", b"the weights"),
    ("pytorch_model.bin", b"old weights"),
    ("README.md", b"read me"),
    ("1_Pooling/config.json", b"{\"p\": 1}"),
];

fn options(cache: &Path, endpoint: &str) -> HubOptions {
    HubOptions {
        cache_dir: Some(cache.to_path_buf()),
        endpoint: Some(endpoint.to_owned()),
        token: Some("hf_secret".into()),
        ..HubOptions::default()
    }
}

#[tokio::test]
async fn downloads_what_is_needed_once_and_then_works_offline() {
    let hub = Hub::with(&SINGLE);
    let endpoint = hub.start().await;
    let cache = tempfile::tempdir().expect("temporary directory");
    let mut options = options(cache.path(), &endpoint);
    options.offline = true;
    let offline = resolve("org/name", &options, false).await.expect_err("empty cache");
    assert!(matches!(offline, HubError::Offline { .. }), "{offline}");
    options.offline = false;
    let dir = resolve("org/name", &options, false).await.expect("downloads");
    assert_eq!(std::fs::read(dir.join("model.safetensors")).expect("there"), b"the weights");
    assert_eq!(std::fs::read(dir.join("1_Pooling/config.json")).expect("there"), b"{\"p\": 1}");
    let mut got = hub.downloads();
    got.sort();
    assert_eq!(got, ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]);
    // Now from the cache: by branch and by commit, and with the hub gone.
    options.offline = true;
    assert_eq!(resolve("org/name", &options, false).await.expect("cached"), dir);
    options.revision = Some(COMMIT.into());
    assert_eq!(resolve("org/name", &options, false).await.expect("cached"), dir);
    let listed = list_cached(Some(cache.path()));
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].complete), ("org/name", true));
    assert_eq!((listed[0].revisions.clone(), listed[0].bytes), (vec!["main".to_owned()], 29));
}

#[tokio::test]
async fn shards_are_taken_from_the_index() {
    let index = br#"{"weight_map": {"a": "w-1.safetensors", "b": "w-2.safetensors"}}"#;
    let hub = Hub::with(&[
        ("config.json", b"{}"),
        (INDEX, index),
        ("w-1.safetensors", b"1"),
        ("w-2.safetensors", b"22"),
        ("other.safetensors", b"no"),
    ]);
    let cache = tempfile::tempdir().expect("temporary directory");
    let options = options(cache.path(), &hub.start().await);
    let dir = resolve("org/name", &options, false).await.expect("downloads");
    assert!(dir.join("w-2.safetensors").exists() && !dir.join("other.safetensors").exists());
    // A shard goes missing: the cache is no longer complete, and only that shard is fetched again.
    remove_with_blob(&dir.join("w-1.safetensors"));
    assert!(!list_cached(Some(cache.path()))[0].complete);
    let before = hub.downloads().len();
    resolve("org/name", &options, false).await.expect("downloads again");
    assert_eq!(hub.downloads()[before..], ["w-1.safetensors"]);
}

#[tokio::test]
async fn a_damaged_file_is_fetched_again_and_then_refused() {
    let hub = Hub::with(&SINGLE);
    let cache = tempfile::tempdir().expect("temporary directory");
    let options = options(cache.path(), &hub.start().await);
    let set = |times: usize, body: &[u8]| {
        hub.wrong.lock().expect("lock").insert("model.safetensors".into(), (times, body.to_vec()));
    };
    // Right size, wrong contents; and an error page instead of the file.
    for wrong in [b"the w3ights".as_slice(), b"<html>sorry</html>"] {
        set(9, wrong);
        let error = resolve("org/name", &options, false).await.expect_err("damaged");
        assert!(matches!(&error, HubError::Damaged { file, .. } if file == "model.safetensors"), "{error}");
        assert!(cached(cache.path(), "org/name", COMMIT).is_none(), "nothing half done is left to be used");
    }
    set(1, b"short");
    resolve("org/name", &options, false).await.expect("the second try is good");
}

#[tokio::test]
async fn unsafe_or_missing_shards_are_refused() {
    for index in
        [r#"{"weight_map": {"a": "../../x"}}"#, r#"{"weight_map": {"a": "gone.safetensors"}}"#, "{}", "["]
    {
        let hub = Hub::with(&[("config.json", b"{}"), (INDEX, index.as_bytes())]);
        let cache = tempfile::tempdir().expect("temporary directory");
        let error = resolve("org/name", &options(cache.path(), &hub.start().await), false)
            .await
            .expect_err("refused");
        assert!(matches!(error, HubError::Unusable { .. }), "{error}");
    }
}

#[tokio::test]
async fn repositories_without_loadable_weights_say_why() {
    let cases: [(Files<'_>, &str); 3] = [
        (&[("config.json", b"{}"), ("pytorch_model.bin", b"x")], "only .bin"),
        (&[("config.json", b"{}")], "neither"),
        (&[("a.gguf", b"x"), ("b.gguf", b"y")], "several GGUF files (a.gguf, b.gguf)"),
    ];
    for (files, want) in cases {
        let cache = tempfile::tempdir().expect("temporary directory");
        let endpoint = Hub::with(files).start().await;
        let error = resolve("org/name", &options(cache.path(), &endpoint), false)
            .await
            .expect_err("refused")
            .to_string();
        assert!(error.contains(want), "{error}");
    }
    let cache = tempfile::tempdir().expect("temporary directory");
    let endpoint = Hub::with(&[("only.gguf", b"weights")]).start().await;
    let path = resolve("org/name", &options(cache.path(), &endpoint), false).await.expect("downloads");
    assert!(path.ends_with("only.gguf"));
}

#[tokio::test]
async fn refusals_and_a_dead_hub_are_errors_with_a_reason() {
    let cache = tempfile::tempdir().expect("temporary directory");
    let started = std::time::Instant::now();
    for status in
        [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::NOT_FOUND, StatusCode::BAD_GATEWAY]
    {
        let hub = Hub { status: Some(status), ..Hub::with(&SINGLE) };
        let error = resolve("org/name", &options(cache.path(), &hub.start().await), false)
            .await
            .expect_err("refused");
        let text = error.to_string();
        assert!(
            matches!(error, HubError::Hub { .. }) && !text.contains("hf_secret") && !text.contains('\n'),
            "{text}"
        );
    }
    // A port that nobody listens on.
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let dead = options(cache.path(), &format!("http://127.0.0.1:{port}"));
    assert!(matches!(resolve("org/name", &dead, false).await, Err(HubError::Hub { .. })));
    assert!(started.elapsed().as_secs() < 60);
}

#[tokio::test]
async fn the_token_stays_with_the_hub() {
    let storage = Hub::with(&SINGLE);
    let hub = Hub { redirect: Some(storage.start().await), ..Hub::with(&SINGLE) };
    let cache = tempfile::tempdir().expect("temporary directory");
    resolve("org/name", &options(cache.path(), &hub.start().await), false).await.expect("downloads");
    let at_hub = hub.tokens.lock().expect("lock").clone();
    assert!(!at_hub.is_empty() && at_hub.iter().all(|t| t.as_deref() == Some("Bearer hf_secret")));
    let at_storage = storage.tokens.lock().expect("lock").clone();
    assert!(!at_storage.is_empty() && at_storage.iter().all(Option::is_none), "{at_storage:?}");
}

#[tokio::test]
async fn paths_are_used_as_they_are_and_nonsense_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let options =
        HubOptions { offline: true, cache_dir: Some(dir.path().to_path_buf()), ..HubOptions::default() };
    let path = dir.path().to_str().expect("text");
    assert_eq!(resolve(path, &options, false).await.expect("a directory"), dir.path());
    for bad in [
        "",
        "name",
        "./gone",
        "a/b/c",
        "../x/y",
        "org/",
        "/name",
        "org/na me",
        "org/..",
        "o--r/g",
        "a/b.gguf",
    ] {
        assert!(matches!(resolve(bad, &options, false).await, Err(HubError::NoSuchModel(_))), "{bad:?}");
    }
    let bad_revision = HubOptions { revision: Some("../../x".into()), ..options };
    assert!(matches!(resolve("org/name", &bad_revision, false).await, Err(HubError::Hub { .. })));
}

#[cfg(unix)]
#[tokio::test]
async fn links_out_of_the_cache_are_not_followed() {
    let hub = Hub::with(&SINGLE);
    let cache = tempfile::tempdir().expect("temporary directory");
    let mut options = options(cache.path(), &hub.start().await);
    let dir = resolve("org/name", &options, false).await.expect("downloads");
    let outside = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(outside.path(), b"the weights").expect("written");
    std::fs::remove_file(dir.join("model.safetensors")).expect("removed");
    std::os::unix::fs::symlink(outside.path(), dir.join("model.safetensors")).expect("linked");
    options.offline = true;
    assert!(matches!(resolve("org/name", &options, false).await, Err(HubError::Offline { .. })));
}
