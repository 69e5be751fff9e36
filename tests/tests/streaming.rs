//! Streams: the same answer in parts.

use ingle_tests::{TestServer, sse_text};
use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, chat, completion, with};

#[tokio::test]
async fn deltas_add_up_to_the_whole_answer() {
    let server = TestServer::start().await;
    for content in ["plain words", "日本語のテキスト", "🎉🎉 party"] {
        let whole = server.post(CHAT, &chat(content, 60)).await;
        let chunks = server.stream(CHAT, &chat(content, 60)).await.chunks().await;
        assert_eq!(whole.ok()["choices"][0]["message"]["content"], sse_text(&chunks, 0), "{content}");
        let whole = server.post(COMPLETIONS, &completion(content, 60)).await;
        let chunks = server.stream(COMPLETIONS, &completion(content, 60)).await.chunks().await;
        assert_eq!(whole.ok()["choices"][0]["text"], sse_text(&chunks, 0), "{content}");
    }
}

#[tokio::test]
async fn a_chat_stream_has_its_shape() {
    let server = TestServer::start().await;
    let chunks = server.stream(CHAT, &chat("shape", 12)).await.chunks().await;
    let first = &chunks[0];
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    for (i, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(
            [&chunk["id"], &chunk["created"], &chunk["model"]],
            [&first["id"], &first["created"], &first["model"]]
        );
        assert!(chunk.get("usage").is_none(), "nobody asked: {chunk}");
        assert_eq!(chunk["choices"][0]["delta"].get("role").is_some(), i == 0, "{chunk}");
        assert_eq!(chunk["choices"][0]["finish_reason"].is_string(), i + 1 == chunks.len(), "{chunk}");
    }
    assert_eq!(chunks[chunks.len() - 1]["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn usage_comes_when_asked_for() {
    let server = TestServer::start().await;
    let body = with(chat("usage", 9), json!({"stream_options": {"include_usage": true}}));
    let chunks = server.stream(CHAT, &body).await.chunks().await;
    let (last, before) = chunks.split_last().expect("chunks");
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(9)));
    assert!(before.iter().all(|chunk| chunk.get("usage").is_some_and(Value::is_null)));

    let body = with(
        chat("usage", 9),
        json!({"stream_options": {"continuous_usage_stats": true, "include_usage": true}}),
    );
    let chunks = server.stream(CHAT, &body).await.chunks().await;
    let counts: Vec<u64> =
        chunks.iter().filter_map(|chunk| chunk["usage"]["completion_tokens"].as_u64()).collect();
    assert_eq!(counts.len(), chunks.len(), "every chunk has its usage");
    assert!(counts.is_sorted() && counts.last() == Some(&9), "{counts:?}");

    let whole =
        server.post(CHAT, &with(chat("usage", 9), json!({"stream_options": {"include_usage": true}}))).await;
    assert_eq!((whole.status, &whole.error()["param"]), (400, &json!("stream_options")));
}

#[tokio::test]
async fn choices_of_one_stream_are_kept_apart() {
    let server = TestServer::start().await;
    let body = with(chat("apart", 10), json!({"n": 3, "temperature": 1.3, "seed": 11}));
    let whole = server.post(CHAT, &body).await;
    let chunks = server.stream(CHAT, &body).await.chunks().await;
    for index in 0..3 {
        let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let reasons =
            chunks.iter().filter(of_choice).filter(|c| c["choices"][0]["finish_reason"].is_string()).count();
        assert_eq!(reasons, 1, "one end of choice {index}");
        let text = &whole.ok()["choices"][index as usize]["message"]["content"];
        assert_eq!(*text, sse_text(&chunks, index), "choice {index}");
    }
}

#[tokio::test]
async fn stop_strings_do_not_leak_and_log_probabilities_are_the_same() {
    let server = TestServer::start().await;
    let plain = server.post(COMPLETIONS, &completion("leak", 40)).await;
    let chars: Vec<char> = plain.ok()["choices"][0]["text"].as_str().expect("a text").chars().collect();
    let stop: String = chars[chars.len() / 3..chars.len() / 3 + 5].iter().collect();
    let body = with(completion("leak", 40), json!({"stop": stop, "logprobs": 2}));
    let whole = server.post(COMPLETIONS, &body).await;
    let chunks = server.stream(COMPLETIONS, &body).await.chunks().await;
    let text = sse_text(&chunks, 0);
    assert!(!text.contains(&stop), "{text:?} has {stop:?}");
    let choice = &whole.ok()["choices"][0];
    assert_eq!(choice["text"], text);
    for list in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
        let parts =
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"][list].as_array()).flatten();
        let streamed: Vec<&Value> = parts.collect();
        assert_eq!(
            choice["logprobs"][list].as_array().expect(list).iter().collect::<Vec<_>>(),
            streamed,
            "{list}"
        );
    }
}

#[tokio::test]
async fn events_are_sent_as_they_are_made() {
    let server = TestServer::start().await;
    // The first event is there while the answer is far from its end.
    let mut events = server.stream(CHAT, &chat("early", 8000)).await;
    assert!(events.next().await.is_some());
    assert!(events.next().await.is_some());
    let made = server.metrics().await.get("ingle_generation_tokens_total");
    assert!(made < 8000.0, "{made} tokens were made before the first was sent");
}
