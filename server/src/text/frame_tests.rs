//! Frames against the tokenizer library itself, which truncates and post-processes pairs on its own.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::{TruncationParams, TruncationStrategy, truncate_encodings};

use crate::text::Tokenizer;

fn words(post_processor: &Value) -> Value {
    let mut vocab: serde_json::Map<String, Value> = ["[UNK]", "[CLS]", "[SEP]"]
        .iter()
        .enumerate()
        .map(|(id, token)| ((*token).into(), json!(id)))
        .collect();
    for id in 3..30 {
        vocab.insert(format!("w{id}"), json!(id));
    }
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0", "truncation": {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        "padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "[UNK]"},
        "added_tokens": [added(0, "[UNK]"), added(1, "[CLS]"), added(2, "[SEP]")],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": post_processor,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    })
}

fn special(id: &str, segment: u32) -> Value {
    json!({"SpecialToken": {"id": id, "type_id": segment}})
}

fn sequence(id: &str, segment: u32) -> Value {
    json!({"Sequence": {"id": id, "type_id": segment}})
}

/// BERT's template with segments, RoBERTa's doubled separator without, the old BertProcessing, and nothing at all.
fn post_processors() -> [Value; 4] {
    let special_tokens = json!({
        "[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]},
        "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]},
    });
    let single = json!([special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0)]);
    [
        json!({"type": "TemplateProcessing", "single": single, "special_tokens": special_tokens,
               "pair": [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0), sequence("B", 1), special("[SEP]", 1)]}),
        json!({"type": "TemplateProcessing", "single": single, "special_tokens": special_tokens,
               "pair": [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0), special("[SEP]", 0),
                        sequence("B", 0), special("[SEP]", 0)]}),
        json!({"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]}),
        Value::Null,
    ]
}

fn text(words: &[u32]) -> String {
    words.iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn framing_and_truncation_equal_the_library(
        first in proptest::collection::vec(3_u32..30, 0..20),
        second in proptest::collection::vec(3_u32..30, 0..20),
        max in 4_usize..40,
        which in 0_usize..4,
    ) {
        let file = words(&post_processors()[which]);
        let ours = Tokenizer::from_values(file.clone(), Value::Null).expect("loads");
        let mut library: tokenizers::Tokenizer = serde_json::from_value(file).expect("valid");
        library.with_padding(None);
        library.with_truncation(None).expect("valid");
        // Its own `encode` stops tokenising a text at the limit, before it compares the two lengths; here they are whole.
        let framed = |texts: [&[u32]; 2], num: usize, num_special: usize| {
            let mut encoded = texts.iter().take(num).map(|words| library.encode(text(words), false).expect("encodes"));
            let first = encoded.next().expect("one at least");
            let second = encoded.next().map(|mut second| {
                second.set_type_ids(vec![1; second.len()]);
                second
            });
            let strategy = TruncationStrategy::LongestFirst;
            let params = TruncationParams { max_length: max - num_special, strategy, ..TruncationParams::default() };
            let (first, second) = truncate_encodings(first, second, &params).expect("cuts");
            library.post_process(first, second, true).expect("frames")
        };
        let wanted = framed([&first, &second], 1, ours.frame().num_special());
        let got = ours.frame().text(&first, max, Side::Right);
        prop_assert_eq!(&got.ids, wanted.get_ids());
        prop_assert_eq!(got.ids.len() + got.dropped, first.len() + ours.frame().num_special());
        prop_assert_eq!(ours.encode(&text(&first), crate::text::Specials::Parse, false).expect("encodes"), first.clone());

        let wanted = framed([&first, &second], 2, ours.frame().num_special_pair());
        let got = ours.frame().pair(&first, &second, max, Side::Right).expect("pairs");
        prop_assert_eq!(&got.ids, wanted.get_ids());
        let types: Vec<u32> = if got.types.is_empty() { vec![0; got.ids.len()] } else { got.types.iter().map(|t| u32::from(*t)).collect() };
        prop_assert_eq!(&types[..], wanted.get_type_ids());
    }
}

#[test]
fn the_end_can_be_kept_instead() {
    let tokenizer = Tokenizer::from_values(words(&post_processors()[0]), Value::Null).expect("loads");
    let framed = tokenizer.frame().text(&[5, 6, 7, 8], 4, Side::Left);
    assert_eq!((framed.ids, framed.dropped), (vec![1, 7, 8, 2], 2));
    // Less room than the special tokens need: they stay whole, and the caller has been told before.
    assert_eq!(tokenizer.frame().text(&[5], 1, Side::Right).ids, [1, 2]);
}
