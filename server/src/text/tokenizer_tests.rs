use super::*;
use crate::text::Detokenizer;
use crate::text::token_table::byte_chars;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use serde_json::json;
use std::sync::{Arc, LazyLock};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": special})
}

/// A byte-level tokenizer: the 256 bytes, some merges, and added tokens of both kinds.
pub(crate) fn byte_level(pre_tokenizer: Value) -> Value {
    let mut tokens: Vec<String> = byte_chars().iter().map(char::to_string).collect();
    let merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "t"),
        ("Ġt", "h"),
        ("Ġth", "e"),
        ("Ġ", "Ġ"),
        ("ĠĠ", "ĠĠ"),
        ("a", "a"),
        ("aa", "aa"),
        ("1", "2"),
        ("12", "3"),
        ("'", "s"),
        ("Ċ", "Ċ"),
        ("Ã", "©"),
        ("ð", "Ł"),
        ("ðŁ", "ĺ"),
        ("<", "|"),
        ("|", ">"),
        ("^", "^"),
        ("i", "m"),
    ];
    for (left, right) in merges {
        tokens.push(format!("{left}{right}"));
    }
    let next = tokens.len();
    let vocab: Map<String, Value> = tokens.into_iter().enumerate().map(|(id, t)| (t, json!(id))).collect();
    json!({
        "version": "1.0",
        "added_tokens": [
            added(next, "<|im_start|>", true), added(next + 1, "<|im_end|>", true), added(next + 2, "<think>", false),
            added(next + 3, "</think>", false), added(next + 4, "<s>", true),
        ],
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [next + 4], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges.map(|(a, b)| format!("{a} {b}"))}
    })
}

pub(crate) fn gpt2_style() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})
}

fn split_style(pattern: &str) -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]})
}

/// A SentencePiece-like tokenizer with byte fallback; `strip` sets what the decoder does with a leading space.
fn sentencepiece(strip: bool) -> Value {
    let mut tokens: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    tokens.extend("abcdefghijklmnopqrstuvwxyz▁.,é".chars().map(String::from));
    let merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁"), ("l", "l"), ("h", "e"), ("he", "ll")];
    tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    let vocab: Map<String, Value> = tokens.into_iter().enumerate().map(|(id, t)| (t, json!(id))).collect();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if strip {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({
        "version": "1.0",
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": merges.map(|(a, b)| format!("{a} {b}"))}
    })
}

fn metaspace() -> Value {
    let mut file = sentencepiece(false);
    let part = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
    file["normalizer"] = Value::Null;
    file["pre_tokenizer"] = part.clone();
    file["decoder"] = part;
    file
}

fn wordpiece() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [added(0, "[UNK]", true), added(1, "[CLS]", true), added(2, "[SEP]", true)],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100,
                  "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3, "world": 4, "##s": 5, ".": 6, "un": 7}}
    })
}

pub(crate) fn load(json: Value) -> Tokenizer {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}});
    Tokenizer::from_values(json, config).expect("loads")
}

struct Pair {
    ours: Arc<Tokenizer>,
    library: tokenizers::Tokenizer,
    literal: tokenizers::Tokenizer,
}

fn pairs() -> &'static [Pair] {
    static PAIRS: LazyLock<Vec<Pair>> = LazyLock::new(|| {
        let smol = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, gpt2_style()]});
        let prefixed =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        // Not one of the known patterns: runs on the backtracking engine.
        let unknown = split_style(r"\p{L}+(?=\s|$)|\s+|[^\s\p{L}]+|\p{L}");
        let mut nfc = byte_level(split_style(LLAMA3));
        nfc["normalizer"] = json!({"type": "NFC"});
        let files = [
            byte_level(gpt2_style()),
            byte_level(split_style(LLAMA3)),
            byte_level(smol),
            byte_level(prefixed),
            byte_level(unknown),
            nfc,
            sentencepiece(true),
            sentencepiece(false),
            metaspace(),
            wordpiece(),
        ];
        files
            .into_iter()
            .map(|file| {
                let library: tokenizers::Tokenizer = serde_json::from_value(file.clone()).expect("valid");
                let mut literal = library.clone();
                literal.set_encode_special_tokens(true);
                Pair { ours: Arc::new(load(file)), library, literal }
            })
            .collect()
    });
    &PAIRS
}

fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => proptest::sample::select(vec![
            "hello", " the", "the", "aaaa", " ", "    ", "\n", "\r\n", "123", "'s", "'S", "é", "e\u{301}", "😀", "日本",
            "<|im_start|>", "<|im_end|>", "<|im_", "start|>", "<think>", "</think>", "<s>", "</s>", "^", "^^", "\u{200D}",
            "hello worlds.", "[SEP]", "_", "\u{0}", "▁", "<0x41>",
        ]).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
    ];
    proptest::collection::vec(piece, 0..24).prop_map(|p| p.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Same ids as the library, with special tokens parsed and as text, with and without what goes around a text.
    #[test]
    fn encodes_as_the_library_does(text in text()) {
        for (index, pair) in pairs().iter().enumerate() {
            for around in [false, true] {
                for (specials, reference) in [(Specials::Parse, &pair.library), (Specials::Literal, &pair.literal)] {
                    let want = reference.encode(text.as_str(), around).expect("encodes");
                    let got = pair.ours.encode(&text, specials, around);
                    prop_assert_eq!(got.as_deref(), Ok(want.get_ids()), "tokenizer {} {:?} {:?}", index, specials, text);
                    // A length that fits is never refused by the length of the text.
                    prop_assert_eq!(pair.ours.check_length(&text, None, want.len()), Ok(()), "tokenizer {} {:?}", index, text);
                }
            }
        }
    }

    /// The fast way and the general way through the stages agree.
    #[test]
    fn both_ways_through_the_stages_agree(text in text()) {
        static GENERAL: LazyLock<Tokenizer> = LazyLock::new(|| {
            let mut tokenizer = load(byte_level(split_style(LLAMA3)));
            let section = split_style(LLAMA3);
            tokenizer.stages = Stages::new(&section).expect("valid").without_direct();
            tokenizer
        });
        prop_assert_eq!(GENERAL.encode(&text, Specials::Parse, true), pairs()[1].ours.encode(&text, Specials::Parse, true));
    }

    /// Decoding what was encoded equals the library's decoding (there the text is UTF-8, so both agree).
    #[test]
    fn decodes_as_the_library_does(text in text(), skip in any::<bool>()) {
        for pair in pairs() {
            let ids = pair.ours.encode(&text, Specials::Parse, true).expect("encodes");
            prop_assert_eq!(pair.ours.decode(&ids, skip), pair.library.decode(&ids, skip).expect("decodes"));
        }
    }

    /// Any ids at all: the pieces that stream out are the decoded whole, and little is held back.
    #[test]
    fn streamed_pieces_are_the_decoded_whole(
        picks in proptest::collection::vec(any::<prop::sample::Index>(), 0..60), skip in any::<bool>(),
    ) {
        for pair in pairs() {
            let ids: Vec<u32> = picks.iter().map(|p| p.index(pair.ours.vocab_size() + 3) as u32).collect();
            let mut stream = Detokenizer::new(Arc::clone(&pair.ours), skip);
            let mut text = String::new();
            for &id in &ids {
                text.push_str(&stream.push(id));
                prop_assert!(stream.pending_bytes() <= 3);
            }
            text.push_str(&stream.finish());
            prop_assert_eq!(text, pair.ours.decode(&ids, skip));
        }
    }

    /// Byte-level decoding is the lossy text of the token bytes, for any ids.
    #[test]
    fn bytes_of_tokens_make_the_text(picks in proptest::collection::vec(0_u32..290, 0..40)) {
        let pair = &pairs()[0];
        let bytes: Vec<u8> = picks.iter().flat_map(|id| pair.ours.token_bytes(*id).unwrap_or_default()).collect();
        prop_assert_eq!(pair.ours.decode(&picks, false), String::from_utf8_lossy(&bytes).into_owned());
        prop_assert_eq!(pair.ours.decode(&picks, false), pair.library.decode(&picks, false).expect("decodes"));
    }
}

#[test]
fn special_tokens_are_known_by_name_and_id() {
    let tokenizer = load(byte_level(gpt2_style()));
    let eos = tokenizer.eos_token_id().expect("eos");
    assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(eos));
    assert_eq!(tokenizer.token_text(eos).as_deref(), Some("<|im_end|>"));
    assert!(tokenizer.is_special(eos));
    assert!(!tokenizer.is_special(tokenizer.token_to_id("<think>").expect("there")));
    assert_eq!(tokenizer.bos_token_id(), tokenizer.token_to_id("<s>"));
    assert!(tokenizer.adds_special_tokens());
    let size = tokenizer.vocab_size() as u32;
    assert_eq!((tokenizer.token_bytes(size), tokenizer.token_text(u32::MAX)), (None, None));
    assert!(!tokenizer.is_special(u32::MAX));
}

#[test]
fn literal_text_gives_no_special_id() {
    let tokenizer = load(byte_level(gpt2_style()));
    let ids = tokenizer.encode("a<|im_end|>b<s>", Specials::Literal, false).expect("encodes");
    assert!(ids.iter().all(|id| !tokenizer.is_special(*id)));
    assert_eq!(tokenizer.decode(&ids, false), "a<|im_end|>b<s>");
}

#[test]
fn a_continued_text_keeps_its_leading_space() {
    let tokenizer = Arc::new(load(sentencepiece(true)));
    let the = tokenizer.token_to_id("▁the").expect("there");
    assert_eq!(Detokenizer::new(Arc::clone(&tokenizer), true).push(the), "the");
    assert_eq!(Detokenizer::continuing(tokenizer, true).push(the), " the");
}

#[test]
fn six_hundred_kilobytes_of_anything_take_seconds_at_most() {
    for index in [0, 1, 2, 6, 8] {
        let tokenizer = &pairs()[index].ours;
        for unit in ["a", " ", "^", "\u{200D}", "\u{301}", "<|im_end|>", "a ", "\n"] {
            let text = unit.repeat(600 * 1024 / unit.len());
            let start = std::time::Instant::now();
            let ids = tokenizer.encode(&text, Specials::Parse, true).expect("encodes");
            assert!(start.elapsed().as_secs() < 10, "{unit:?} took {:?}", start.elapsed());
            assert!(!ids.is_empty());
        }
    }
}

#[test]
fn a_token_that_strips_white_space_is_not_quadratic() {
    let mut file = byte_level(gpt2_style());
    for token in file["added_tokens"].as_array_mut().into_iter().flatten() {
        token["lstrip"] = json!(true);
        token["rstrip"] = json!(true);
        token["single_word"] = json!(true);
    }
    let tokenizer = load(file);
    for unit in ["<|im_end|>", " <|im_end|> "] {
        let text = unit.repeat(300 * 1024 / unit.len());
        let start = std::time::Instant::now();
        assert!(!tokenizer.encode(&text, Specials::Parse, false).expect("encodes").is_empty());
        assert!(start.elapsed().as_secs() < 10, "took {:?}", start.elapsed());
    }
}

#[test]
fn broken_files_are_errors_with_a_reason() {
    let cases: [(&str, Value, &str); 6] = [
        ("/model/merges/0", json!("o hel"), "not a usable tokenizer"),
        ("/model/type", json!("Nonsense"), "not a usable tokenizer"),
        ("/added_tokens/0/id", json!(7), "has the id 7 in the file"),
        (
            "/pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
            "not valid",
        ),
        ("/pre_tokenizer", split_style(r"(a+)+(?=b)c"), "gives up"),
        ("/model/vocab", json!({}), "bytes"),
    ];
    for (place, value, want) in cases {
        let mut file = byte_level(gpt2_style());
        *file.pointer_mut(place).expect("the place exists") = value;
        match Tokenizer::from_values(file, Value::Null) {
            Err(TextError::Load(message)) => {
                assert!(message.contains(want), "{message:?} does not say {want:?}")
            }
            Err(other) => panic!("{place}: {other}"),
            Ok(_) => panic!("{place}: a broken file was loaded"),
        }
    }
}

#[test]
fn a_directory_is_loaded_and_missing_files_are_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let missing = Tokenizer::load(dir.path()).err().expect("nothing there").to_string();
    assert!(missing.contains("has no tokenizer.json"), "{missing}");
    std::fs::write(dir.path().join("tokenizer.json"), byte_level(gpt2_style()).to_string()).expect("written");
    std::fs::write(dir.path().join("special_tokens_map.json"), r#"{"eos_token": "<|im_end|>"}"#)
        .expect("written");
    let tokenizer = Tokenizer::load(dir.path()).expect("loads");
    assert_eq!(tokenizer.eos_token_id(), tokenizer.token_to_id("<|im_end|>"));
    std::fs::write(dir.path().join("tokenizer.json"), "[".repeat(100_000)).expect("written");
    assert!(matches!(Tokenizer::load(dir.path()), Err(TextError::Load(_))));
}

/// Compares with the library on a real tokenizer: `INGLE_TEST_TOKENIZER=DIR cargo test -- --ignored real_tokenizer`.
#[test]
#[ignore = "needs a directory with tokenizer.json in INGLE_TEST_TOKENIZER"]
fn real_tokenizer_equals_the_library() {
    let dir = std::env::var("INGLE_TEST_TOKENIZER").expect("INGLE_TEST_TOKENIZER is set");
    let start = std::time::Instant::now();
    let ours = Arc::new(Tokenizer::load(Path::new(&dir)).expect("loads"));
    println!("loaded in {:?}, linear: {}", start.elapsed(), ours.is_linear());
    let library = tokenizers::Tokenizer::from_file(Path::new(&dir).join("tokenizer.json")).expect("loads");
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..20_000 {
        let text = text().new_tree(&mut runner).expect("a text").current();
        let ids = ours.encode(&text, Specials::Parse, true).expect("encodes");
        assert_eq!(ids, library.encode(text.as_str(), true).expect("encodes").get_ids(), "{text:?}");
        let mut stream = Detokenizer::new(Arc::clone(&ours), false);
        let mut streamed: String = ids.iter().map(|id| stream.push(*id)).collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, library.decode(&ids, false).expect("decodes"));
    }
    let text = "The quick brown fox jumps over the lazy dog, 42 times. ".repeat(20_000);
    let start = std::time::Instant::now();
    let count = ours.encode(&text, Specials::Parse, false).expect("encodes").len();
    println!("{} bytes, {count} tokens in {:?}", text.len(), start.elapsed());
}

/// A Unigram tokenizer as XLM-RoBERTa has it.
fn unigram() -> Value {
    let pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "\u{2581}",
        "\u{2581}the",
        "\u{2581}c",
        "at",
        "s",
        "\u{2581}hello",
        "e",
        "l",
        "o",
        ".",
        "\u{e9}",
        "\u{4e2d}",
        "t",
        "h",
    ];
    let vocab: Vec<Value> = pieces
        .iter()
        .enumerate()
        .map(|(i, piece)| json!([piece, if i < 4 { 0.0 } else { -(i as f64) / 2.0 }]))
        .collect();
    let space =
        json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true});
    json!({
        "version": "1.0",
        "added_tokens": [added(0, "<s>", true), added(2, "</s>", true), added(3, "<unk>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}},
                     {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}},
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": false}
    })
}

#[test]
fn encoder_tokenizers_give_the_ids_of_the_library() {
    let pieces = [
        "hello",
        "HELLO",
        " world",
        "worlds",
        ".",
        "the cat",
        "\u{e9}",
        "e\u{301}",
        "\u{4e2d}\u{6587}",
        "[SEP]",
        "</s>",
        "<s>",
        "  ",
        "\t",
        "\n",
        "\u{0}",
        "\u{200d}",
        "\u{fb01}",
        "\u{1F642}",
        "\u{ad}",
        "\u{3000}",
        "un",
        "##s",
        "\u{2581}",
    ];
    for file in [wordpiece(), unigram()] {
        let library: tokenizers::Tokenizer = serde_json::from_value(file.clone()).expect("valid");
        let ours = load(file);
        for (i, a) in pieces.iter().enumerate() {
            for (j, b) in pieces.iter().enumerate() {
                let text = format!("{a}{b} {}{a}", pieces[(i * 7 + j) % pieces.len()]);
                let wanted = library.encode(text.as_str(), true).expect("encodes");
                let got = ours.encode(&text, Specials::Parse, true).expect("encodes");
                assert_eq!(got, wanted.get_ids(), "{text:?}");
                let wanted = library.encode((text.as_str(), *b), true).expect("encodes");
                let halves = [text.as_str(), b]
                    .map(|half| ours.encode(half, Specials::Parse, false).expect("encodes"));
                let framed =
                    ours.frame().pair(&halves[0], &halves[1], usize::MAX, Default::default()).expect("pairs");
                assert_eq!(framed.ids, wanted.get_ids(), "{text:?} and {b:?}");
            }
        }
    }
}
