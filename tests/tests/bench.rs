//! `ingle bench`: what it measures is counted and classified right. How fast anything is, is not asked here.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use ingle_tests::{Launch, Run, TinyModel, ingle};
use serde_json::{Value, json};

/// The JSON of a file.
pub(crate) fn read(path: &std::path::Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("the result is there")).expect("it is JSON")
}

pub(crate) fn done(run: &Run) -> &Run {
    assert_eq!(run.code, Some(0), "{run:?}");
    run
}

/// A server that answers with what `script` makes of the number, path and body of a request. Returns its URL.
pub(crate) fn scripted(script: impl Fn(usize, &str, &Value) -> Reply + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let script = std::sync::Arc::new((script, AtomicUsize::new(0)));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let script = std::sync::Arc::clone(&script);
            thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().expect("a handle"));
                while let Some((path, body)) = request(&mut reader) {
                    // Only what is measured is numbered.
                    let counted = path.starts_with("/v1/") && path != "/v1/models";
                    let number = if counted { script.1.fetch_add(1, Ordering::SeqCst) } else { 0 };
                    if !(script.0)(number, &path, &body).send(&stream) {
                        return;
                    }
                }
            });
        }
    });
    url
}

fn request(reader: &mut impl BufRead) -> Option<(String, Value)> {
    let mut first = String::new();
    reader.read_line(&mut first).ok().filter(|read| *read > 0)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim().to_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let path = first.split_whitespace().nth(1)?.to_owned();
    Some((path, serde_json::from_slice(&body).unwrap_or_default()))
}

pub(crate) enum Reply {
    Json(u16, Value),
    /// Events, and whether the stream is ended as it should be.
    Events(Vec<String>, bool),
}

impl Reply {
    /// Whether the connection lives on.
    fn send(&self, mut to: &TcpStream) -> bool {
        match self {
            Self::Json(status, value) => {
                let body = value.to_string();
                let head = format!(
                    "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                to.write_all((head + &body).as_bytes()).is_ok()
            }
            Self::Events(events, whole) => {
                let mut text = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
                for event in events {
                    let data = format!("data: {event}\n\n");
                    text += &format!("{:x}\r\n{data}\r\n", data.len());
                }
                if *whole {
                    text += "0\r\n\r\n";
                }
                to.write_all(text.as_bytes()).is_ok() && *whole
            }
        }
    }

    /// `tokens` tokens and their usage.
    pub(crate) fn answer(tokens: usize) -> Self {
        let mut events: Vec<String> = (0..tokens)
            .map(|_| json!({"choices": [{"text": "a", "finish_reason": null}]}).to_string())
            .collect();
        events.push(
            json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 3}}})
                .to_string(),
        );
        events.push("[DONE]".to_owned());
        Self::Events(events, true)
    }
}

pub(crate) fn models() -> Reply {
    Reply::Json(200, json!({"data": [{"id": "scripted"}]}))
}

#[tokio::test]
async fn a_load_on_ingle_is_counted_to_the_token() {
    let server = Launch::tiny().start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (json_file, page) = (folder.path().join("a.json"), folder.path().join("a.html"));
    let args = [
        "bench",
        "serve",
        "--url",
        &server.url("/v1"),
        "-c",
        "2,4",
        "-n",
        "6",
        "--input-len",
        "20",
        "--output-len",
        "7",
    ];
    let files = ["--output", json_file.to_str().expect("plain"), "--html", page.to_str().expect("plain")];
    let objectives = ["--goodput", "ttft:60000", "tpot:60000"];
    let run = ingle(&[&args[..], &files[..], &objectives[..]].concat());
    done(&run);
    assert!(run.stdout.contains("| 4 clients |") && run.stderr.contains("of one processor"), "{run:?}");
    let result = read(&json_file);
    assert_eq!(result["points"].as_array().expect("points").len(), 2);
    for point in result["points"].as_array().expect("points") {
        for (name, wanted) in [
            ("completed", 6),
            ("failed", 0),
            // Prompts are sent as token ids, so their length is exact.
            ("total_input_tokens", 120),
            ("total_output_tokens", 42),
        ] {
            assert_eq!(point[name], wanted, "{name}");
        }
        for name in ["mean_ttft_ms", "p95_e2el_ms", "output_throughput"] {
            assert!(point[name].as_f64().is_some_and(|value| value > 0.0), "{name}: {}", point[name]);
        }
        // A whole answer may arrive at once: then there is no time between its tokens.
        for name in ["median_tpot_ms", "p99_itl_ms"] {
            assert!(point[name].as_f64().is_some_and(|value| value >= 0.0), "{name}: {}", point[name]);
        }
        assert_eq!(point["goodput_share"], 1.0);
        assert_eq!(point["ttfts_ms"].as_array().expect("a value a request").len(), 6);
        let duration = point["duration"].as_f64().expect("a number");
        let rate = point["output_throughput"].as_f64().expect("a number");
        assert!((rate * duration - 42.0).abs() < 1e-6, "tokens over time");
        assert_eq!(point["tokens_counted_by"], "usage");
        assert!(point["client"]["cpu_seconds"].as_f64().is_some_and(|cpu| cpu > 0.0));
    }
    assert_eq!(result["environment"]["ingle_version"], env!("CARGO_PKG_VERSION"));
    let page = std::fs::read_to_string(page).expect("the page is there");
    assert!(page.contains("<svg") && !page.contains("<script"));
}

#[tokio::test]
async fn text_prompts_have_their_length_and_turns_carry_what_was_said() {
    let server = Launch::tiny().start().await;
    let url = server.url("");
    let point = |flags: &[&str]| -> Value {
        let run = ingle(
            &[&["bench", "serve", "--url", &url, "--format", "jsonl", "-q", "-c", "2"], flags].concat(),
        );
        serde_json::from_str(&done(&run).stdout).expect("one line of JSON")
    };
    let text = point(&["-n", "4", "--prompt-form", "text", "--input-len", "33", "--output-len", "2"]);
    assert_eq!((&text["total_input_tokens"], &text["total_output_tokens"]), (&json!(132), &json!(8)));

    let turns = point(&[
        "-n",
        "3",
        "--backend",
        "openai-chat",
        "--dataset-name",
        "multi-turn",
        "--num-turns",
        "3",
        "--input-len",
        "40",
        "--output-len",
        "5",
        "--num-warmups",
        "0",
    ]);
    assert_eq!((&turns["completed"], &turns["total_output_tokens"]), (&json!(9), &json!(45)));
    // The second turn brings the first again, the third both.
    assert!(
        turns["total_input_tokens"].as_u64() > Some(3 * (40 + 80 + 120)),
        "{}",
        turns["total_input_tokens"]
    );
    assert!(turns["cached_token_share"].as_f64() > Some(0.2), "{}", turns["cached_token_share"]);

    let shared = point(&[
        "-n",
        "6",
        "--dataset-name",
        "prefix_repetition",
        "--prefix-len",
        "64",
        "--num-prefixes",
        "1",
        "--input-len",
        "16",
        "--output-len",
        "1",
        "--num-warmups",
        "0",
    ]);
    assert_eq!(shared["total_input_tokens"], 6 * 80);
    assert!(shared["cached_tokens"].as_u64() >= Some(4 * 48), "{}", shared["cached_tokens"]);

    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "{\"prompt\": \"abc\", \"output_len\": 2}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n").expect("written");
    let path = file.path().to_str().expect("plain");
    let lines =
        ["-n", "4", "--dataset-name", "custom", "--dataset-path", path, "--output-len", "3", "--ignore-eos"];
    assert_eq!(point(&lines)["total_output_tokens"], 2 * (2 + 3));
}

#[test]
fn failures_are_told_by_kind_and_do_not_count() {
    let url = scripted(|number, path, _| match (path, number % 6) {
        ("/v1/models", _) => models(),
        ("/v1/completions", 1) => Reply::Json(429, json!({"error": {"message": "busy"}})),
        ("/v1/completions", 2) => {
            Reply::Events(vec![json!({"choices": [{"text": "a", "finish_reason": null}]}).to_string()], false)
        }
        ("/v1/completions", 3) => {
            let error = json!({"error": {"message": "out of memory"}}).to_string();
            Reply::Events(vec![error, "[DONE]".to_owned()], true)
        }
        ("/v1/completions", 4) => Reply::Events(vec!["no JSON".to_owned(), "[DONE]".to_owned()], true),
        ("/v1/completions", _) => Reply::answer(4),
        _ => Reply::Json(404, json!({})),
    });
    // Two requests find out how many tokens a word has; ids 2 to 7 are one of each kind.
    let flags = ["-c", "1", "-n", "12", "--num-warmups", "0", "--format", "jsonl", "--output-len", "4"];
    let run = ingle(&[&["bench", "serve", "--url", &url][..], &flags].concat());
    let point: Value = serde_json::from_str(&done(&run).stdout).expect("one line of JSON");
    let errors = json!({"bad_response": 2, "http_429": 2, "stream_error": 2, "truncated": 2});
    assert_eq!(point["errors"], errors);
    assert_eq!((&point["completed"], &point["failed"]), (&json!(4), &json!(8)));
    assert_eq!((&point["total_output_tokens"], &point["total_input_tokens"]), (&json!(16), &json!(36)));
    assert_eq!(point["error_examples"]["stream_error"], "out of memory");
    assert!((point["cached_token_share"].as_f64().expect("a share") - 1.0 / 3.0).abs() < 1e-9);
    assert!(run.stderr.contains("2 x http_429"), "{run:?}");
    assert!(point["prompt_lengths"].as_str().expect("a text").contains("estimated"));
}

#[test]
fn peers_take_turns_under_the_same_load() {
    let server = |name: &'static str, tokens: usize| {
        scripted(move |_, path, body| match path {
            "/v1/models" => models(),
            "/v1/completions" if body["model"] == name => Reply::answer(tokens),
            "/v1/completions" => Reply::Json(404, json!({"error": {"message": "another model"}})),
            _ => Reply::Json(404, json!({})),
        })
    };
    let (a, b) = (server("ma", 2), server("mb", 3));
    let peers = format!("a={a},b={b}/v1/");
    let flags = ["--model", "a=ma,b=mb", "-c", "2", "-n", "5", "--repeats", "2", "--format", "csv", "-q"];
    let run = ingle(&[&["bench", "serve", "--peers", &peers][..], &flags].concat());
    let rows: Vec<Vec<&str>> = done(&run).stdout.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 3, "{run:?}");
    assert_eq!(rows[0][..4], ["server", "load", "completed", "failed"]);
    let mut names = rows[0].clone();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), rows[0].len(), "every column has a name of its own: {:?}", rows[0]);
    assert_eq!(rows[1][..4], ["a", "2 clients", "10", "0"]);
    assert_eq!(rows[2][..4], ["b", "2 clients", "10", "0"]);
    let gone = ingle(&["bench", "serve", "--url", "http://127.0.0.1:9", "-q"]);
    assert_eq!(gone.code, Some(1));
    assert!(gone.error().contains("does not answer"), "{gone:?}");
}

#[test]
fn a_model_is_measured_case_by_case() {
    let model = TinyModel::llama();
    let file = model.path().join("result.json");
    let flags = [
        "-p",
        "32",
        "-n",
        "4",
        "--pg",
        "8,2",
        "-b",
        "1,2",
        "-d",
        "0,16",
        "-r",
        "3",
        "--threads",
        "1",
        "--format",
        "csv",
    ];
    let run = ingle(
        &[&["bench", "model", model.arg(), "--output", file.to_str().expect("plain")][..], &flags].concat(),
    );
    let tests: Vec<String> = done(&run)
        .stdout
        .lines()
        .skip(1)
        .map(|line| line.split(',').nth(6).expect("a cell").to_owned())
        .collect();
    let wanted = [
        "pp32",
        "pp32 x2",
        "pp32 @ d16",
        "pp32 @ d16 x2",
        "tg4",
        "tg4 x2",
        "tg4 @ d16",
        "tg4 @ d16 x2",
        "pp8+tg2",
        "pp8+tg2 x2",
        "pp8+tg2 @ d16",
        "pp8+tg2 @ d16 x2",
    ];
    assert_eq!(tests, wanted);
    let result = read(&file);
    assert_eq!(
        (&result["kind"], &result["threads"], &result["weights"]),
        (&json!("model"), &json!(1), &json!("bf16"))
    );
    assert!(result["limits"]["read_gb_per_s"].as_f64() > Some(0.0));
    assert!(!result["limits"]["gops_per_s"].as_object().expect("rates").is_empty());
    for point in result["points"].as_array().expect("points") {
        let samples: Vec<f64> =
            point["samples_ts"].as_array().expect("samples").iter().filter_map(Value::as_f64).collect();
        assert_eq!(samples.len(), 3);
        let mean = samples.iter().sum::<f64>() / 3.0;
        assert!((point["avg_ts"].as_f64().expect("a mean") / mean - 1.0).abs() < 1e-9);
        let limit = result["limits"]["read_gb_per_s"].as_f64().expect("a limit");
        let share = point["gb_per_s"].as_f64().expect("a rate") / limit;
        assert!((point["share_of_bandwidth"].as_f64().expect("a share") / share - 1.0).abs() < 1e-9);
        let name = result["matrix_rate"].as_str().expect("the rate of these weights");
        let limit = result["limits"]["gops_per_s"][name].as_f64().expect("a limit");
        let share = point["gflop_per_s"].as_f64().expect("a rate") / limit;
        assert!((point["share_of_matrix_rate"].as_f64().expect("a share") / share - 1.0).abs() < 1e-9);
    }
    let int8 = ingle(&[
        "bench",
        "model",
        model.arg(),
        "-p",
        "8",
        "-n",
        "0",
        "-r",
        "1",
        "--quantization",
        "int8",
        "-q",
    ]);
    assert!(done(&int8).stdout.contains("int8"), "{int8:?}");
    let nothing = ingle(&["bench", "model", model.arg(), "-p", "0", "-n", "0"]);
    assert!(nothing.error().contains("nothing to measure"), "{nothing:?}");
}

#[test]
fn a_model_of_random_weights_is_the_same_every_time_and_works() {
    let folder = tempfile::tempdir().expect("a folder");
    let make = |name: &str, seed: &str| {
        let path = folder.path().join(name);
        done(&ingle(&["bench", "make-model", "tiny", path.to_str().expect("plain"), "--seed", seed]));
        std::fs::read(path.join("model.safetensors")).expect("weights")
    };
    let first = make("a", "1");
    assert_eq!(first, make("b", "1"));
    assert_ne!(first, make("c", "2"));
    let path = folder.path().join("a");
    let answer = ingle(&[
        "run",
        path.to_str().expect("plain"),
        " ab ef",
        "--raw",
        "-n",
        "4",
        "--kv-cache-memory",
        "16",
    ]);
    assert!(done(&answer).stderr.contains("2 prompt tokens"), "short words are one token each: {answer:?}");
    let measured = ingle(&[
        "bench",
        "model",
        "--random-weights",
        "tiny",
        "-p",
        "8",
        "-n",
        "2",
        "-r",
        "1",
        "--format",
        "jsonl",
    ]);
    let lines: Vec<Value> =
        done(&measured).stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 2);
    for line in &lines {
        assert_eq!((&line["model"], &line["weights"]), (&json!("tiny (random weights)"), &json!("bf16")));
        assert!(line["threads"].as_u64() >= Some(1) && line["cpu"].is_string(), "{line}");
        assert_eq!(line["ingle_version"], env!("CARGO_PKG_VERSION"));
    }
    let unknown = ingle(&["bench", "model", "--random-weights", "no-such", "-q"]);
    assert!(unknown.error().contains("llama-3.2-1b"), "{unknown:?}");
}
