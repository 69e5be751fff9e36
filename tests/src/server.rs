//! A running server, ended when dropped.

use std::{
    ffi::OsString,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use reqwest::{Body, Client, RequestBuilder};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{Answer, Events, Metrics, PATIENCE, TinyModel, binary};

/// How to start a server. The defaults are small: one computing thread, 16 MiB of cache, any free port.
#[derive(Debug)]
pub struct Launch {
    model: OsString,
    tiny: Option<TinyModel>,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
}

impl Launch {
    /// On the tiny Llama.
    #[must_use]
    pub fn tiny() -> Self {
        Self::of(TinyModel::llama())
    }

    /// On a tiny model.
    #[must_use]
    pub fn of(model: TinyModel) -> Self {
        Self { tiny: Some(model), ..Self::at(Path::new("")) }
    }

    /// On the model at `path`.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { model: path.into(), tiny: None, args: Vec::new(), env: Vec::new() }
    }

    /// Without a model that generates; flags name those that encode.
    #[must_use]
    pub fn without_model() -> Self {
        Self::at(Path::new(""))
    }

    /// With flags; a flag given here replaces the default.
    #[must_use]
    pub fn args<S: Into<OsString>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// With a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Starts it and does not wait for anything.
    #[must_use]
    pub fn spawn(self) -> TestServer {
        let mut command = binary::command();
        command.arg("serve");
        match &self.tiny {
            Some(tiny) => command.arg(tiny.path()),
            None if self.model.is_empty() => &mut command,
            None => command.arg(&self.model),
        };
        let given = |flag: &str| {
            let variable = format!("INGLE_{}", flag[2..].to_uppercase().replace('-', "_"));
            self.args.iter().any(|arg| arg == flag) || self.env.iter().any(|(name, _)| *name == *variable)
        };
        for (flag, value) in
            [("--port", "0"), ("--threads", "1"), ("--kv-cache-memory", "16"), ("--probe", "false")]
        {
            if !given(flag) {
                command.args([flag, value]);
            }
        }
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value)));
        let mut child =
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let reader = BufReader::new(child.stderr.take().expect("piped above"));
        let lines = Arc::clone(&log);
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        // No idle connections are kept: one that the server closes at its end would fail the next request.
        let client = Client::builder().pool_max_idle_per_host(0).build().expect("a client");
        TestServer { child, log, base: String::new(), client, _tiny: self.tiny }
    }

    /// Starts it and waits until it is ready.
    pub async fn start(self) -> TestServer {
        let mut server = self.spawn();
        let line = server.wait_for_line("ready ").await;
        // In a JSON log the address is followed by the rest of the object.
        let address = line.split([' ', '"']).find(|word| word.starts_with("http://")).expect("an address");
        address.clone_into(&mut server.base);
        server.wait_for_ready().await;
        server
    }
}

/// A server that runs until this is dropped.
#[derive(Debug)]
pub struct TestServer {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    base: String,
    /// Asks it.
    pub client: Client,
    _tiny: Option<TinyModel>,
}

impl Drop for TestServer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("The server said:\n{}", self.log().join("\n"));
        }
    }
}

impl TestServer {
    /// On the tiny Llama, with default settings.
    pub async fn start() -> Self {
        Launch::tiny().start().await
    }

    /// The URL of `path`.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Host and port.
    #[must_use]
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    /// The process's number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first log line that contains `text`.
    pub async fn wait_for_line(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.log().into_iter().find(|line| line.contains(text)) {
                return line;
            }
            assert!(self.has_ended().is_none(), "it ended without a word of {text:?}: {:?}", self.log());
            assert!(Instant::now() < deadline, "no word of {text:?}: {:?}", self.log());
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn wait_for_ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.get("/ready").await.status != 200 {
            assert!(Instant::now() < deadline, "it is not ready: {:?}", self.log());
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        let pid =
            i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process has a number");
        kill_process(pid, signal).expect("our own child can be signalled");
    }

    fn has_ended(&mut self) -> Option<Option<i32>> {
        self.child.try_wait().expect("our own child can be waited for").map(|status| status.code())
    }

    /// Waits for its end: the exit status, `None` if a signal ended it.
    pub async fn exit(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(code) = self.has_ended() {
                return code;
            }
            assert!(Instant::now() < deadline, "it does not end: {:?}", self.log());
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// `GET path`.
    pub async fn get(&self, path: &str) -> Answer {
        Answer::read(self.client.get(self.url(path)).send().await.expect("an answer")).await
    }

    /// A `POST` of `body`, not yet sent.
    pub fn request(&self, path: &str, body: impl Into<Body>) -> RequestBuilder {
        self.client.post(self.url(path)).header("content-type", "application/json").body(body)
    }

    /// `POST path` with bytes that need be no JSON.
    pub async fn post_bytes(&self, path: &str, body: impl Into<Body>) -> Answer {
        Answer::read(self.request(path, body).send().await.expect("an answer")).await
    }

    /// `POST path`.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, body.to_string()).await
    }

    /// `POST path` for a stream; `body` need not ask for one.
    pub async fn stream(&self, path: &str, body: &Value) -> Events {
        let mut body = body.clone();
        body["stream"] = json!(true);
        Events::new(self.request(path, body.to_string()).send().await.expect("an answer"))
    }

    /// What `/metrics` says now.
    pub async fn metrics(&self) -> Metrics {
        let answer = self.get("/metrics").await;
        assert_eq!(answer.status, 200);
        Metrics::parse(&answer.text)
    }

    /// Waits until `metrics` satisfies `done`; `what` says that in words.
    pub async fn wait_for(&self, what: &str, done: impl Fn(&Metrics) -> bool) -> Metrics {
        self.wait_within(PATIENCE, what, done).await
    }

    /// As [`TestServer::wait_for`], with a limit.
    pub async fn wait_within(&self, limit: Duration, what: &str, done: impl Fn(&Metrics) -> bool) -> Metrics {
        let deadline = Instant::now() + limit;
        loop {
            let metrics = self.metrics().await;
            if done(&metrics) {
                return metrics;
            }
            assert!(Instant::now() < deadline, "not {what}: {metrics:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until nothing runs or waits and no block is held.
    pub async fn idle(&self) -> Metrics {
        let gauges = ["ingle_requests_running", "ingle_requests_waiting", "ingle_kv_cache_usage_ratio"];
        self.wait_for("idle", |metrics| gauges.iter().all(|name| metrics.get(name) == 0.0)).await
    }

    /// Asserts that a plain request is answered.
    pub async fn is_well(&self) {
        let body = json!({"messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 2});
        let answer = self.post("/v1/chat/completions", &body).await;
        assert_eq!(answer.ok()["choices"][0]["message"]["role"], "assistant");
        assert_eq!(self.get("/ready").await.status, 200);
    }
}
