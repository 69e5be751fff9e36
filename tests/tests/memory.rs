//! What the process takes while it has nothing to do.

use std::time::Duration;

use ingle_tests::{Launch, TestServer, TinyModel};

use crate::COMPLETIONS;

/// Resident memory in bytes.
fn resident(server: &TestServer) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("a process's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Processor time used so far, in ticks of 10 ms.
fn ticks(server: &TestServer) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.pid())).expect("a process's numbers");
    // The name may contain spaces; what follows it does not.
    let (_, rest) = stat.rsplit_once(") ").expect("a name");
    let fields: Vec<&str> = rest.split(' ').collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum()
}

#[tokio::test]
async fn memory_after_load_is_weights_and_cache_and_little_more() {
    const CACHE_MIB: u64 = 64;
    let model = TinyModel::llama();
    let weights = model.path().join("model.safetensors").metadata().expect("the weights").len();
    let server = Launch::of(model).args(["--kv-cache-memory", "64"]).start().await;
    let limit = weights + ((CACHE_MIB + 150) << 20);
    let loaded = resident(&server);
    assert!(loaded <= limit, "{} MiB after load", loaded >> 20);
    // Work fills the cache and little else.
    for seed in 0..20 {
        let prompt: Vec<u32> = (0..3000).map(|i| 5 + (i * 7 + i * i % 11 + seed * 13) % 500).collect();
        let answer = server.post(COMPLETIONS, &crate::completion(prompt, 4)).await;
        assert_eq!(answer.ok()["usage"]["completion_tokens"], 4);
    }
    let worked = resident(&server);
    assert!(worked <= limit, "{} MiB after work", worked >> 20);
}

#[tokio::test]
async fn an_idle_process_does_nothing() {
    // With all processors: threads that wait must not spin.
    let server = Launch::tiny().args(["--threads", "0"]).start().await;
    server.is_well().await;
    server.idle().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = ticks(&server);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = ticks(&server) - before;
    assert!(used <= 2, "{used} ticks in an idle second");
}
