//! Quantised checkpoints are served as any other, and say what they are.

use ingle_tests::{Launch, TinyModel, ingle};

use crate::{COMPLETIONS, completion};

#[tokio::test]
async fn quantised_checkpoints_are_served() {
    for (name, format) in [
        ("llama_gptq", "GPTQ int4 g32"),
        ("llama_awq", "AWQ int4 g128"),
        ("qwen3_fp8_block", "bf16 (from FP8)"),
    ] {
        let server = Launch::of(TinyModel::of(name)).args(["--kv-cache-memory", "16"]).start().await;
        let answer = server.post(COMPLETIONS, &completion("Once upon", 12)).await;
        assert_eq!(answer.ok()["usage"]["completion_tokens"], 12, "{name}");
        let log = server.log();
        assert!(log.iter().any(|line| line.contains("weights") && line.contains(format)), "{name}: {log:?}");
    }
}

#[test]
fn what_of_a_checkpoint_is_not_supported_is_told() {
    let model = TinyModel::of("llama_gptq");
    model.edit("config.json", |config| config["quantization_config"]["bits"] = serde_json::json!(3));
    let run = ingle(&["run", model.arg(), "Once upon", "--raw", "-n", "1"]);
    assert_ne!(run.code, Some(0), "{run:?}");
    assert!(run.stderr.contains("GPTQ of 3 bits is not supported; 4 and 8 are"), "{run:?}");
    assert!(!run.stderr.contains("panicked"), "{run:?}");
}
