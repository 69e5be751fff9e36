//! A whole server on port 0 whose model says what the prompt tells it to.
//!
//! Tokens are bytes; 256 to 259 are special. `say:TEXT|` in a prompt makes the answer `TEXT`, then an end token;
//! `loop:TEXT|` repeats it for ever; `nan|` gives a row that is not finite. Anything else is answered with `ok`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ingle::{
    app_with_faults,
    listen::{ListenConfig, Listener, ServeError, Shutdown, ShutdownTrigger, serve},
    state::{AppConfig, AppState, ModelCard, TextModel},
    text::{ChatTemplate, Tokenizer},
};
use ingle_engine::{Engine, EngineConfig, EngineHandle, Limits, ScriptedBackend};
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};

pub(crate) const VOCAB: usize = 260;
pub(crate) const IM_START: u32 = 256;
pub(crate) const IM_END: u32 = 257;
pub(crate) const MAX_LEN: usize = 512;
const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}\
    {% if not loop.last or message['role'] != 'assistant' or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The characters by which byte-level tokenizers write bytes.
fn byte_chars() -> Vec<char> {
    let plain = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256_u32)
        .map(|byte| {
            let code = if plain(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("a character")
        })
        .collect()
}

pub(crate) fn tokenizer() -> Tokenizer {
    let mut vocab: Map<String, Value> =
        byte_chars().into_iter().enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
    let specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"];
    let mut added = Vec::new();
    for (i, name) in specials.iter().enumerate() {
        vocab.insert((*name).to_owned(), (256 + i).into());
        added.push(
            json!({"id": 256 + i, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}),
        );
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    });
    Tokenizer::from_values(tokenizer, json!({"eos_token": "<|im_end|>"})).expect("the tokenizer loads")
}

/// What the model says after `tokens`.
fn next_token(tokens: &[u32]) -> u32 {
    let bytes = |ids: &[u32]| ids.iter().map(|id| u8::try_from(*id).unwrap_or(0)).collect::<Vec<u8>>();
    // The answer begins after the assistant's header, or after the bar that ends the order.
    let turn = tokens.iter().rposition(|id| *id == IM_START);
    let all = bytes(tokens);
    let find = |what: &[u8]| all.windows(what.len()).rposition(|window| window == what);
    let order = find(b"say:").map(|at| (at, 4, false)).max(find(b"loop:").map(|at| (at, 5, true)));
    let Some((at, skip, repeats)) = order else {
        let start = turn.map_or(0, |turn| turn + 11);
        let said = &all[start.min(all.len())..];
        return if turn.is_some() {
            b"ok".get(said.len()).map_or(IM_END, |b| u32::from(*b))
        } else {
            u32::from(b'a')
        };
    };
    let text = &all[at + skip..];
    let text = &text[..text.iter().position(|b| *b == b'|').unwrap_or(text.len())];
    let start = turn.filter(|turn| *turn > at).map_or(at + skip + text.len() + 1, |turn| turn + 11);
    let num_said = all.len().saturating_sub(start);
    let idx = if repeats { num_said % text.len().max(1) } else { num_said };
    text.get(idx).map_or(IM_END, |byte| u32::from(*byte))
}

pub(crate) fn backend() -> ScriptedBackend {
    ScriptedBackend::with_fn(VOCAB, next_token).nan_when(|tokens| {
        tokens.windows(4).any(|w| w.iter().map(|id| u8::try_from(*id).unwrap_or(0)).eq(*b"nan|"))
    })
}

pub(crate) struct Options {
    pub(crate) app: AppConfig,
    pub(crate) engine: EngineConfig,
    pub(crate) listen: ListenConfig,
    pub(crate) backend: ScriptedBackend,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            app: AppConfig {
                served_names: vec!["tiny".to_owned(), "org/alias".to_owned()],
                ..AppConfig::default()
            },
            engine: EngineConfig { max_model_len: MAX_LEN, ..EngineConfig::default() },
            listen: ListenConfig::default(),
            backend: backend(),
        }
    }
}

/// A state over a new engine.
pub(crate) fn state(options: Options) -> AppState {
    let limits = Limits {
        vocab_size: VOCAB,
        max_model_len: MAX_LEN,
        max_n: 8,
        max_logprobs: 20,
        max_token_list: 1024,
    };
    let engine = Engine::spawn(options.engine, limits, &[IM_END], options.backend).expect("an engine");
    let tokenizer = Arc::new(tokenizer());
    let template = Arc::new(ChatTemplate::from_source(TEMPLATE, None, &tokenizer).expect("a template"));
    let text = Arc::new(TextModel { tokenizer, template: Some(template) });
    AppState::new(options.app, engine, text, ModelCard::new("tiny")).expect("a state")
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) engine: EngineHandle,
    pub(crate) trigger: ShutdownTrigger,
    pub(crate) task: JoinHandle<Result<(), ServeError>>,
    pub(crate) client: reqwest::Client,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Value,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("ASCII"))
    }

    /// Asserts the status and the whole shape of the error object, and returns its `code` and `param`.
    pub(crate) fn error(&self, status: u16) -> (String, String) {
        assert_eq!(self.status, status, "{}", self.body);
        assert_eq!(self.header("content-type"), "application/json");
        let error =
            self.body["error"].as_object().unwrap_or_else(|| panic!("no error object: {}", self.body));
        let mut keys: Vec<&str> = error.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"]);
        assert!(!error["message"].as_str().expect("a message").is_empty());
        let text = |name: &str| error[name].as_str().unwrap_or("").to_owned();
        (text("code"), text("param"))
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(Options::default()).await
    }

    pub(crate) async fn with(options: Options) -> Self {
        let listen = options.listen.clone();
        let state = state(options);
        let engine = state.engine().clone();
        let listener = Listener::tcp("127.0.0.1:0".parse().expect("an address")).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (trigger, shutdown) = Shutdown::channel();
        let app = app_with_faults(state.clone());
        let task = tokio::spawn(serve(vec![listener], app, state, listen, shutdown));
        let client = reqwest::Client::builder().timeout(Duration::from_secs(20)).build().expect("a client");
        Self { address, engine, trigger, task, client }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) async fn answer(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.expect("a body");
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Answer { status, headers, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.answer(self.client.get(self.url(path))).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.answer(self.client.post(self.url(path)).json(&body)).await
    }

    pub(crate) async fn post_raw(&self, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.client.post(self.url(path)).header("content-type", "application/json").body(body);
        self.answer(request).await
    }

    /// The 200 of a chat with one user message and `extra` parameters.
    pub(crate) async fn chat(&self, content: &str, extra: Value) -> Value {
        let answer = self.post("/v1/chat/completions", chat_body(content, extra)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }

    pub(crate) async fn completion(&self, extra: Value) -> Value {
        let answer = self.post("/v1/completions", extra).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }

    /// The `data:` lines of a stream, and whether it ended with `[DONE]`.
    pub(crate) async fn events(&self, path: &str, mut body: Value) -> (Vec<Value>, bool) {
        body["stream"] = true.into();
        let response = self.client.post(self.url(path)).json(&body).send().await.expect("an answer");
        let status = response.status().as_u16();
        let kind = response.headers()["content-type"].to_str().expect("ASCII").to_owned();
        let text = response.text().await.expect("a body");
        assert_eq!(status, 200, "{text}");
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        parse_events(&text)
    }

    /// Sends bytes and reads until the server closes, or until nothing comes for `patience`.
    pub(crate) async fn raw(&self, bytes: &[u8], patience: Duration) -> String {
        let mut stream = TcpStream::connect(self.address).await.expect("a connection");
        // The server may close before it has read all.
        let _ = stream.write_all(bytes).await;
        read_all(&mut stream, patience).await
    }

    pub(crate) async fn metric(&self, line_start: &str) -> f64 {
        let text = self.get("/metrics").await.body;
        let text = text.as_str().expect("text");
        text.lines()
            .filter(|line| line.starts_with(line_start))
            .map(|line| line.rsplit(' ').next().expect("a value").parse::<f64>().expect("a number"))
            .sum()
    }

    /// Asserts that the server still answers.
    pub(crate) async fn is_well(&self) {
        let body = self.chat("say:fine|", json!({})).await;
        assert_eq!(body["choices"][0]["message"]["content"], "fine");
    }
}

pub(crate) async fn read_all(stream: &mut TcpStream, patience: Duration) -> String {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(Ok(n)) = tokio::time::timeout(patience, stream.read(&mut chunk)).await {
        if n == 0 {
            break;
        }
        all.extend_from_slice(&chunk[..n]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

pub(crate) fn parse_events(text: &str) -> (Vec<Value>, bool) {
    let lines: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    let done = lines.last() == Some(&"[DONE]");
    assert_eq!(lines.iter().filter(|line| **line == "[DONE]").count(), usize::from(done));
    let events =
        lines.iter().filter(|line| **line != "[DONE]").map(|line| serde_json::from_str(line).expect("JSON"));
    (events.collect(), done)
}

pub(crate) fn chat_body(content: &str, extra: Value) -> Value {
    let mut body =
        json!({"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

/// The text of choice `index` of a chat stream.
pub(crate) fn streamed_text(events: &[Value], index: u64) -> String {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().into_iter().flatten());
    choices.filter(|c| c["index"] == index).filter_map(|c| c["delta"]["content"].as_str()).collect()
}
