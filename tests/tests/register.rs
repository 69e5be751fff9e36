//! Registering with routers, each spoken to in its own language, by routers that write down what they hear.
//! `tests/routers/` does the same with the real ones.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ingle_tests::{FakeRouter, Launch, Run, TestServer, Told, command, run};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{CHAT, chat};

const FAST: [&str; 2] = ["--heartbeat-interval", "0.1"];

fn calls(told: &[Told]) -> Vec<String> {
    let mut calls: Vec<String> = told.iter().map(|told| format!("{} {}", told.method, told.path)).collect();
    calls.dedup();
    calls
}

async fn registration(server: &TestServer) -> Value {
    server.get("/tier").await.ok()["registrations"][0].clone()
}

fn check(args: &[&str]) -> Run {
    let mut command = command();
    command.args(["register", "--check"]).args(args);
    run(command)
}

async fn stop(mut server: TestServer) {
    server.signal(Signal::TERM);
    assert_eq!(server.exit().await, Some(0), "{:?}", server.log());
}

#[tokio::test]
async fn a_webhook_hears_of_our_life() {
    let forgets = Arc::new(AtomicBool::new(false));
    let router = FakeRouter::start({
        let forgets = forgets.clone();
        move |told| match told.method.as_str() {
            "PUT" if forgets.swap(false, Ordering::SeqCst) => (404, json!({})),
            _ => (200, json!({})),
        }
    })
    .await;
    let url = format!("webhook+http://secret@{}/hook", router.address());
    let flags = ["--register", &url, "--instance-id", "me", "--api-key", "ours"];
    let server = Launch::tiny().args(flags).args(FAST).start().await;
    let told = router.wait_for("a heartbeat", |told| told.iter().any(|t| t.method == "PUT")).await;
    assert_eq!(calls(&told)[..2], ["POST /hook", "PUT /hook/me"]);
    let first = &told[0];
    assert_eq!((first.key.as_deref(), &first.json["event"]), (Some("secret"), &json!("register")));
    assert_eq!((&first.json["instance_id"], &first.json["api_key"]), (&json!("me"), &json!("ours")));
    assert_eq!(first.json["url"], server.url(""));
    assert!(first.json["epoch"].as_u64().is_some_and(|epoch| epoch > 1_600_000_000));
    assert_eq!(first.json["tier"]["models"][0]["tier"], "local");

    forgets.store(true, Ordering::SeqCst);
    router.wait_for("again", |told| told.iter().filter(|t| t.method == "POST").count() == 2).await;
    let status = async || {
        let answer =
            server.client.get(server.url("/tier")).bearer_auth("ours").send().await.expect("an answer");
        ingle_tests::Answer::read(answer).await.ok()["registrations"][0].clone()
    };
    while status().await["registrations"] != 2 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let status = status().await;
    assert_eq!(status["state"], "registered");
    assert!(!status.to_string().contains("secret"), "{status}");
    assert!(!server.log().join("\n").contains("secret"));
    stop(server).await;
    assert_eq!(calls(&router.told()).last().map(String::as_str), Some("DELETE /hook/me"));
}

#[tokio::test]
async fn routers_are_told_before_anything_else_ends() {
    // While it takes us off, the router asks whether we still serve.
    let serves = Arc::new(std::sync::Mutex::new(None));
    let base = Arc::new(std::sync::Mutex::new(String::new()));
    let router = FakeRouter::start({
        let (serves, base) = (serves.clone(), base.clone());
        move |told| {
            if told.method == "DELETE" {
                let base = base.lock().expect("no panic").clone();
                let answers = std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                    runtime.expect("a runtime").block_on(async {
                        let client = reqwest::Client::new();
                        let ready =
                            client.get(format!("{base}/ready")).send().await.map(|r| r.status().as_u16());
                        let body = chat("sent before the router knew", 3).to_string();
                        let request =
                            client.post(format!("{base}{CHAT}")).header("content-type", "application/json");
                        let asked = request.body(body).send().await.map(|r| r.status().as_u16());
                        (ready.ok(), asked.ok())
                    })
                });
                *serves.lock().expect("no panic") = answers.join().ok();
            }
            (200, json!({}))
        }
    })
    .await;
    let url = format!("webhook+http://{}", router.address());
    let server = Launch::tiny().args(["--register", &url]).start().await;
    server.url("").clone_into(&mut base.lock().expect("no panic"));
    router.wait_for("registered", |told| !told.is_empty()).await;
    stop(server).await;
    let seen = serves.lock().expect("no panic").take().expect("it was taken off");
    assert_eq!(seen, (Some(503), Some(200)), "not ready any more, and still serving");
}

#[tokio::test]
async fn a_router_that_is_down_costs_nothing() {
    let server = Launch::tiny().args(["--register", "smg+http://127.0.0.1:1"]).start().await;
    server.is_well().await;
    server
        .wait_for("noticed", |m| {
            m.types.contains_key("ingle_registration_failures") && m.get("ingle_registration_failures") >= 2.0
        })
        .await;
    let status = registration(&server).await;
    assert_eq!((&status["state"], &status["registrations"]), (&json!("failing"), &json!(0)));
    let error = status["last_error"].as_str().expect("an error");
    assert!(error.contains("Connection refused"), "{error}");
    server.is_well().await;
    stop(server).await;
}

/// SMG's workers, as far as we use them.
fn smg() -> impl FnMut(&Told) -> (u16, Value) + Send + 'static {
    let mut workers: HashMap<String, Value> = HashMap::new();
    let mut next = 0;
    move |told| {
        let id = told.path.strip_prefix("/workers/").map(str::to_owned);
        match (told.method.as_str(), id) {
            ("GET", None) => (200, json!({"workers": workers.values().cloned().collect::<Vec<_>>()})),
            ("POST", None) => {
                if !told.json["cost"].as_f64().is_some_and(|cost| cost > 0.0) {
                    return (400, json!({"error": "cost must be above 0"}));
                }
                next += 1;
                let id = format!("w{next}");
                let worker = json!({"id": id, "url": told.json["url"], "status": "ready", "models": told.json["models"]});
                workers.insert(id.clone(), worker);
                (202, json!({"worker_id": id}))
            }
            ("GET", Some(id)) => workers.get(&id).map_or((404, json!({})), |worker| (200, worker.clone())),
            ("PUT", Some(_)) => (202, json!({})),
            ("DELETE", Some(id)) => match workers.get_mut(&id) {
                Some(worker) => {
                    worker["status"] = json!("draining");
                    (202, json!({}))
                }
                None => (404, json!({})),
            },
            _ => (405, json!({})),
        }
    }
}

// The command that asks the router runs beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn smg_is_spoken_to() {
    let router = FakeRouter::start(smg()).await;
    let url = format!("smg+http://{}", router.address());
    let flags = ["--register", &url, "--served-model-name", "own", "--alias", "gpt-4"];
    let server = Launch::tiny().args(flags).args(FAST).start().await;
    let told = router.wait_for("a heartbeat", |told| told.iter().any(|t| t.path == "/workers/w1")).await;
    let post = told.iter().find(|told| told.method == "POST").expect("registered");
    assert_eq!(post.json["models"], json!([{"id": "own", "aliases": ["gpt-4"]}]));
    assert_eq!((&post.json["url"], &post.json["labels"]["tier"]), (&json!(server.url("")), &json!("local")));
    // A second life at the same address takes over the entry.
    let port = server.address().rsplit(':').next().expect("a port").to_owned();
    let mut server = server;
    server.signal(Signal::KILL);
    server.exit().await;
    let server = Launch::tiny().args(flags).args(FAST).args(["--port", &port]).start().await;
    router.wait_for("replaced", |told| told.iter().any(|t| t.method == "PUT")).await;
    let known = check(&[&url, "--advertise-url", &server.url("")]);
    assert_eq!((known.code, known.stdout.contains("knows the server")), (Some(0), true), "{known:?}");
    stop(server).await;
    let told = router.told();
    assert_eq!(told.iter().filter(|told| told.method == "POST").count(), 1, "{:?}", calls(&told));
    assert!(calls(&told).contains(&"DELETE /workers/w1".to_owned()));
    let check = check(&["smg+http://127.0.0.1:1"]);
    assert_eq!(check.code, Some(1), "{check:?}");
}

#[tokio::test]
async fn vllms_router_is_spoken_to() {
    let mut urls: Vec<String> = Vec::new();
    let router = FakeRouter::start(move |told| {
        let url = told.path.split_once("?url=").map(|(_, url)| url.replace("%3A", ":").replace("%2F", "/"));
        match (told.path.split('?').next().unwrap_or_default(), url) {
            ("/add_worker", Some(url)) if urls.contains(&url) => {
                (400, json!(format!("Worker {url} already exists")))
            }
            ("/add_worker", Some(url)) => {
                urls.push(url);
                (200, json!("added"))
            }
            ("/remove_worker", Some(url)) => {
                urls.retain(|known| *known != url);
                (200, json!("removed"))
            }
            ("/list_workers", None) => (200, json!({"urls": urls})),
            _ => (404, json!({})),
        }
    })
    .await;
    let url = format!("vllm-router+http://{}", router.address());
    let server = Launch::tiny().args(["--register", &url]).args(FAST).start().await;
    router.wait_for("a heartbeat", |told| told.iter().any(|t| t.path == "/list_workers")).await;
    server
        .wait_for("registered", |m| m.get_with("ingle_registration_state", "state=\"registered\"") == 1.0)
        .await;
    let escaped = server.url("").replace(':', "%3A").replace('/', "%2F");
    stop(server).await;
    let calls = calls(&router.told());
    assert_eq!(calls.first(), Some(&format!("POST /add_worker?url={escaped}")));
    assert_eq!(calls.last(), Some(&format!("POST /remove_worker?url={escaped}")));
}

#[tokio::test]
async fn litellm_is_spoken_to() {
    let mut models: HashMap<String, Value> = HashMap::new();
    let router = FakeRouter::start(move |told| {
        if told.key.as_deref() != Some("sk-admin") {
            return (401, json!({}));
        }
        match told.path.as_str() {
            "/model/new" => {
                let id = told.json["model_info"]["id"].as_str().unwrap_or_default().to_owned();
                let fresh = models.insert(id, told.json.clone()).is_none();
                if fresh { (200, json!({})) } else { (500, json!({"error": "unique"})) }
            }
            "/model/delete" => match models.remove(told.json["id"].as_str().unwrap_or_default()) {
                Some(_) => (200, json!({})),
                None => (400, json!({"detail": {"error": "Model with id=x not found in db"}})),
            },
            "/model/info" => (200, json!({"data": models.values().cloned().collect::<Vec<_>>()})),
            _ => (404, json!({})),
        }
    })
    .await;
    let url = format!("litellm+http://sk-admin@{}", router.address());
    let flags = ["--register", &url, "--instance-id", "me", "--served-model-name", "own", "--alias", "gpt-4"];
    let server = Launch::tiny().args(flags).args(FAST).args(["--cost-per-1k", "2"]).start().await;
    let told = router.wait_for("a heartbeat", |told| told.iter().any(|t| t.path == "/model/info")).await;
    let new: Vec<&Told> = told.iter().filter(|told| told.path == "/model/new").collect();
    assert_eq!(new.len(), 2);
    let params = &new[0].json["litellm_params"];
    assert_eq!(
        (&params["model"], &params["api_base"]),
        (&json!("hosted_vllm/own"), &json!(server.url("/v1")))
    );
    assert_eq!(
        (&params["input_cost_per_token"], &new[1].json["model_info"]["id"]),
        (&json!(0.002), &json!("me/gpt-4"))
    );
    server
        .wait_for("registered", |m| m.get_with("ingle_registration_state", "state=\"registered\"") == 1.0)
        .await;
    stop(server).await;
    let told = router.told();
    let deleted: Vec<&Value> = told.iter().rev().take(2).map(|told| &told.json["id"]).collect();
    assert_eq!(deleted, [&json!("me/gpt-4"), &json!("me/own")], "{:?}", calls(&told));
}
