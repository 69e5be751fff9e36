//! Drills: what must hold under load and at the end. The short ones run with all tests; the long ones print numbers:
//!
//! ```text
//! INGLE_SIGTERM_ROUNDS=200 cargo test --release -p ingle-tests drills::sigterm -- --nocapture
//! cargo test --release -p ingle-tests drills:: -- --ignored --nocapture --test-threads 1
//! ```
//!
//! A number that depends on the machine is printed and never asserted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ingle_tests::{Launch, TestServer, TinyModel};
use reqwest::Client;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::{CHAT, chat, with};

/// How a request under load ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Whole,
    /// It was refused before anything was sent, or could not connect: a router sends it elsewhere.
    Refused,
    /// The connection broke before an answer; the server's log says whether it had the request of this id.
    Broken(String),
    Lost(String),
}

async fn one(client: &Client, url: &str, id: String, stream: bool) -> End {
    let body = with(chat("under load", 40), json!({"stream": stream})).to_string();
    let request = client.post(url).header("content-type", "application/json").header("x-request-id", &id);
    let sent = request.body(body).send().await;
    let response = match sent {
        Ok(response) => response,
        Err(error) if error.is_connect() => return End::Refused,
        Err(_) => return End::Broken(id),
    };
    match response.status().as_u16() {
        200 => {}
        503 | 429 => return End::Refused,
        other => return End::Lost(other.to_string()),
    }
    match response.text().await {
        Ok(text) if !stream || text.ends_with("data: [DONE]\n\n") => End::Whole,
        Ok(text) => End::Lost(text),
        Err(error) => End::Lost(format!("{error:?}")),
    }
}

/// Whether the audit log says that the request `id` was not refused.
fn ran(log: &str, id: &str) -> bool {
    let quoted = format!("\"{id}\"");
    log.lines().any(|line| line.contains(&quoted) && !line.contains("\"status\":503"))
}

/// Clients ask without pause, and the server is told to go: every request is answered whole or refused as a whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_loses_nothing() {
    let rounds: u64 =
        std::env::var("INGLE_SIGTERM_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let model = TinyModel::llama();
    let dir = tempfile::tempdir().expect("a folder");
    let (mut whole, mut refused, mut not_taken) = (0_u64, 0_u64, 0_u64);
    for round in 0..rounds {
        let log = dir.path().join(format!("{round}.jsonl"));
        let audit = ["--audit-log", log.to_str().expect("UTF-8")];
        let mut server = Launch::at(model.path()).args(audit).start().await;
        let url = server.url(CHAT);
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let clients: Vec<_> = (0..8)
            .map(|i| {
                let (url, stop, done) = (url.clone(), stop.clone(), done.clone());
                tokio::spawn(async move {
                    // No kept connections: one closed while a request is on its way could not be told from a loss.
                    let client = Client::builder().pool_max_idle_per_host(0).build().expect("a client");
                    let mut ends = Vec::new();
                    while !stop.load(Ordering::SeqCst) {
                        let id = format!("{i}-{}", ends.len());
                        let end = one(&client, &url, id, i % 2 == 0).await;
                        let refused = matches!(end, End::Refused | End::Broken(_));
                        ends.push(end);
                        done.fetch_add(1, Ordering::SeqCst);
                        if refused {
                            sleep(Duration::from_millis(2)).await;
                        }
                    }
                    ends
                })
            })
            .collect();
        // Some are answered first; the signal then comes at another moment in each round.
        while done.load(Ordering::SeqCst) < 8 + round % 7 {
            sleep(Duration::from_millis(1)).await;
        }
        server.signal(Signal::TERM);
        assert_eq!(server.exit().await, Some(0), "{:?}", server.log());
        stop.store(true, Ordering::SeqCst);
        let taken = std::fs::read_to_string(&log).expect("the audit log");
        for client in clients {
            for end in client.await.expect("no panic") {
                match end {
                    End::Whole => whole += 1,
                    End::Refused => refused += 1,
                    // The server never had it, or its refusal did not reach the client: sent elsewhere, it runs once.
                    End::Broken(id) if !ran(&taken, &id) => not_taken += 1,
                    End::Broken(how) | End::Lost(how) => {
                        let said = taken.lines().filter(|line| line.contains(&format!("\"{how}\"")));
                        panic!("round {round}: a request was lost: {how}; {:?}", said.collect::<Vec<_>>())
                    }
                }
            }
        }
    }
    println!(
        "{rounds} rounds of SIGTERM under load: {whole} answered, {refused} refused, {not_taken} not taken, 0 lost"
    );
}

fn percentile(values: &mut [f64], q: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let rank = (q * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Kilobytes in memory.
fn resident(server: &TestServer) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").trim().parse().expect("a number")
}

/// `num` clients ask for `time`, without pause while they are answered and after `pause` when refused; returns answers a second, times of refusals in ms, and whether each
/// refusal said when to come back.
async fn load(server: &TestServer, num: usize, time: Duration, pause: Duration) -> (f64, Vec<f64>, bool) {
    let url = server.url(CHAT);
    let end = Instant::now() + time;
    let clients: Vec<_> = (0..num)
        .map(|i| {
            let url = url.clone();
            tokio::spawn(async move {
                let client = Client::new();
                let (mut answered, mut refusals, mut honest) = (0_u64, Vec::new(), true);
                while Instant::now() < end {
                    let begin = Instant::now();
                    let body = chat(&format!("client {i}"), 40).to_string();
                    let sent =
                        client.post(&url).header("content-type", "application/json").body(body).send().await;
                    let response = sent.expect("an answer");
                    let status = response.status().as_u16();
                    honest &= status == 200 || response.headers().contains_key("retry-after");
                    response.bytes().await.expect("a body");
                    if status == 200 {
                        answered += u64::from(Instant::now() < end);
                    } else {
                        assert_eq!(status, 429);
                        refusals.push(begin.elapsed().as_secs_f64() * 1e3);
                        sleep(pause).await;
                    }
                }
                (answered, refusals, honest)
            })
        })
        .collect();
    let (mut answered, mut refusals, mut honest) = (0, Vec::new(), true);
    for client in clients {
        let (a, r, h) = client.await.expect("no panic");
        answered += a;
        refusals.extend(r);
        honest &= h;
    }
    (answered as f64 / time.as_secs_f64(), refusals, honest)
}

/// Times of `/health`, asked again and again for `time`, in milliseconds.
async fn health(server: Arc<TestServer>, time: Duration) -> Vec<f64> {
    let client = Client::new();
    let mut times = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let begin = Instant::now();
        let answer = timeout(Duration::from_secs(5), client.get(server.url("/health")).send()).await;
        assert_eq!(answer.expect("in time").expect("an answer").status(), 200);
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        sleep(Duration::from_millis(20)).await;
    }
    times
}

/// Ten times as many clients as the server has places, in turn with as many as it has. `pause`: after a refusal, given the
/// peak.
async fn ten_times(server: Arc<TestServer>, time: Duration, pause: impl Fn(f64) -> Duration) {
    load(&server, 4, Duration::from_secs(2), Duration::ZERO).await;
    for round in 1..=3 {
        let (peak, _, _) = load(&server, 8, time, Duration::ZERO).await;
        let before = resident(&server);
        let looking = tokio::spawn(health(server.clone(), time));
        let (goodput, mut refusals, honest) = load(&server, 80, time, pause(peak)).await;
        let mut health = looking.await.expect("no panic");
        assert!(honest, "every refusal says when to come back");
        assert!(!refusals.is_empty(), "ten times the load is refused in part");
        println!(
            "round {round}: peak {peak:.1}/s, goodput at 10x {goodput:.1}/s ({:.0} %), {} refusals p50 {:.1} ms \
             p99 {:.1} ms, /health p99 {:.1} ms, memory {} -> {} KiB",
            100.0 * goodput / peak,
            refusals.len(),
            percentile(&mut refusals, 0.5),
            percentile(&mut refusals, 0.99),
            percentile(&mut health, 0.99),
            before,
            resident(&server),
        );
    }
    server.idle().await;
    server.is_well().await;
}

/// A model that costs nothing: what is measured is the server, and the clients beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints numbers; takes half a minute"]
async fn overload_ten_times() {
    let flags = ["--max-num-seqs", "4", "--max-num-queued-reqs", "4"];
    let server = Launch::tiny().args(flags).start().await;
    // Ten times the load, not a loop as fast as the machine can.
    ten_times(Arc::new(server), Duration::from_secs(5), |_| Duration::from_millis(50)).await;
}

/// A real model: ten times the requests a second that it can answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints numbers; takes two minutes"]
async fn overload_ten_times_of_a_real_model() {
    let Some(path) = crate::smollm2::model() else { return };
    let flags = ["--threads", "0", "--max-num-seqs", "4", "--max-num-queued-reqs", "4"];
    let server = Launch::at(&path).args(flags).start().await;
    // 72 clients are refused, nine times the peak together.
    ten_times(Arc::new(server), Duration::from_secs(20), |peak| Duration::from_secs_f64(72.0 / (9.0 * peak)))
        .await;
}

/// The card's 95th percentile beside that of a client over the same requests.
#[tokio::test]
#[ignore = "prints numbers"]
async fn the_card_says_what_a_client_measures() {
    let server = TestServer::start().await;
    let client = Client::new();
    let mut times = Vec::new();
    for i in 0..200_u32 {
        let body = chat(&format!("request {i}"), 200 + i % 600).to_string();
        let begin = Instant::now();
        let request = client.post(server.url(CHAT)).header("content-type", "application/json").body(body);
        let answer = request.send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
        answer.bytes().await.expect("a body");
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let outside = percentile(&mut times, 0.95);
    let card: Value = server.get("/tier").await.ok()["models"][0].clone();
    assert_eq!(card["measured"]["requests"], 200);
    let inside = card["latency_p95"].as_f64().expect("measured");
    println!(
        "latency_p95: card {inside:.2} ms, client {outside:.2} ms, {:+.1} %",
        100.0 * (inside - outside) / outside
    );
}
