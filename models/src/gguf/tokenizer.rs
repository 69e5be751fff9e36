//! From GGUF metadata to `tokenizer.json` and `tokenizer_config.json`.
//!
//! Two kinds exist in the Llama class. `gpt2`: byte-level BPE with merges in the file, and a name (`pre`) for the
//! rule that first cuts the text into words; the file does not hold the rule itself, so each known name is a line in
//! [`word_rule`]. `llama`: SentencePiece BPE, whose merges follow from the scores of the pieces.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::header::Header;
use super::vocabulary::{TokenType, Vocabulary};
use crate::error::{Error, Result, invalid};

/// SentencePiece writes a space as this.
const SPACE_MARK: &str = "\u{2581}";
/// Longest SentencePiece piece whose merges we derive; real ones stay below 100 bytes, and the work is quadratic.
const MAX_PIECE_BYTES: usize = 512;
/// Four times as many as the largest known vocabulary has.
const MAX_MERGES: usize = 1 << 21;

/// Words of GPT-4 (Llama 3): numbers of up to three digits.
const WORDS_LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Llama 3, but every digit alone.
const WORDS_QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's Tekken: words are also cut where lower case turns to upper case.
const WORDS_TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.json`, in the format of the tokenizers library.
pub(super) fn tokenizer_json(header: &Header, vocabulary: &Vocabulary<'_>, path: &Path) -> Result<Json> {
    let mut tokenizer = match header.text("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(header, vocabulary, path)?,
        Some("llama") => sentence_piece(header, vocabulary, path)?,
        kind => {
            return Err(invalid(
                path,
                format!("tokenizer {:?} is not supported; known are: gpt2, llama", kind.unwrap_or("(none)")),
            ));
        }
    };
    let added = vocabulary.iter().filter_map(|(id, text, kind)| {
        let mut token = added_token(text, kind)?;
        token.insert("id".into(), json!(id));
        Some(Json::Object(token))
    });
    tokenizer["version"] = json!("1.0");
    tokenizer["truncation"] = Json::Null;
    tokenizer["padding"] = Json::Null;
    tokenizer["added_tokens"] = added.collect();
    tokenizer["post_processor"] = post_processor(header, vocabulary, path)?;
    Ok(tokenizer)
}

/// `tokenizer_config.json` with the chat template.
pub(super) fn tokenizer_config_json(header: &Header, vocabulary: &Vocabulary<'_>) -> Json {
    let ids = &vocabulary.ids;
    let mut decoder = Map::new();
    for (id, text, kind) in vocabulary.iter() {
        if let Some(token) = added_token(text, kind) {
            decoder.insert(id.to_string(), Json::Object(token));
        }
    }
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds(header, vocabulary, Side::Start),
        "add_eos_token": adds(header, vocabulary, Side::End),
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": false,
    });
    let roles = [
        ("bos_token", ids.bos),
        ("eos_token", ids.eos),
        ("unk_token", ids.unknown),
        ("pad_token", ids.padding),
    ];
    for (name, id) in roles {
        if let Some(text) = vocabulary.text(id) {
            config[name] = json!(text);
        }
    }
    let architecture = header.text("general.architecture").unwrap_or_default();
    if let Some(length) = header.unsigned(&format!("{architecture}.context_length")) {
        config["model_max_length"] = json!(length);
    }
    if let Some(template) = header.text("tokenizer.chat_template") {
        config["chat_template"] = json!(template);
    }
    config
}

/// The entry for a token that is matched whole, before the text is cut into words; `None` for the others.
fn added_token(text: &str, kind: TokenType) -> Option<Map<String, Json>> {
    let special = match kind {
        TokenType::Control | TokenType::Unknown => true,
        TokenType::UserDefined => false,
        TokenType::Normal | TokenType::Unused | TokenType::Byte => return None,
    };
    let mut token = Map::new();
    token.insert("content".into(), json!(text));
    for flag in ["single_word", "lstrip", "rstrip", "normalized"] {
        token.insert(flag.into(), json!(false));
    }
    token.insert("special".into(), json!(special));
    // An empty text would match everywhere.
    (!text.is_empty()).then_some(token)
}

/// How a `pre` name cuts text into words.
struct WordRule {
    pre_tokenizer: Json,
    normalizer: Json,
    /// Whether a word that is a token needs no merges to become it.
    ignore_merges: bool,
}

fn word_rule(pre: &str) -> Option<WordRule> {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]})
    };
    let rule =
        |pre_tokenizer, ignore_merges| WordRule { pre_tokenizer, normalizer: Json::Null, ignore_merges };
    Some(match pre {
        "gpt-2" | "gpt2" | "phi-2" | "olmo" | "mpt" => rule(byte_level(true), false),
        "smollm" | "starcoder" | "refact" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            rule(json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}), false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => rule(split(WORDS_LLAMA3), true),
        "dbrx" | "smaug-bpe" => rule(split(WORDS_LLAMA3), false),
        "qwen2" => WordRule { normalizer: json!({"type": "NFC"}), ..rule(split(WORDS_QWEN2), false) },
        "deepseek-r1-qwen" => rule(split(WORDS_QWEN2), false),
        "tekken" => rule(split(WORDS_TEKKEN), true),
        _ => return None,
    })
}

/// The `pre` name; files from before it existed, or that say `default`, get the one their architecture implies.
fn pre_name<'a>(header: &'a Header, vocabulary: &Vocabulary<'_>) -> &'a str {
    match header.text("tokenizer.ggml.pre") {
        Some(name) if name != "default" => name,
        _ => match header.text("general.architecture") {
            Some("qwen2" | "qwen3") => "qwen2",
            _ if vocabulary.by_text.contains_key("<|begin_of_text|>") => "llama-bpe",
            _ => "gpt-2",
        },
    }
}

fn byte_level(header: &Header, vocabulary: &Vocabulary<'_>, path: &Path) -> Result<Json> {
    let pre = pre_name(header, vocabulary);
    let rule = word_rule(pre).ok_or_else(|| {
        invalid(
            path,
            format!(
                "tokenizer.ggml.pre {pre:?} is not supported; known are: gpt-2, smollm, starcoder, refact, phi-2, olmo, mpt, llama-bpe, dbrx, smaug-bpe, qwen2, deepseek-r1-qwen, tekken"
            ),
        )
    })?;
    let lines = header.texts("tokenizer.ggml.merges").unwrap_or_default();
    if lines.len() > MAX_MERGES {
        return Err(too_many_merges(path));
    }
    let mut merges = Vec::with_capacity(lines.len());
    for (index, line) in lines.iter().enumerate() {
        // Both halves and the result must be tokens: the tokenizer library trusts its file here.
        let (left, right) = split_merge(line, vocabulary).ok_or_else(|| {
            invalid(path, format!("merge {index} ({line:?}) does not join two tokens into a third"))
        })?;
        merges.push(json!([left, right]));
    }
    Ok(json!({
        "normalizer": rule.normalizer,
        "pre_tokenizer": rule.pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": bpe_model(vocabulary, merges, &Bpe { unknown: None, byte_fallback: false, ignore_merges: rule.ignore_merges }),
    }))
}

/// `left right`; a token can itself start with a space, so the first character is never the separator.
fn split_merge<'a>(line: &'a str, vocabulary: &Vocabulary<'_>) -> Option<(&'a str, &'a str)> {
    let first = line.chars().next()?.len_utf8();
    let at = line.get(first..)?.find(' ')?.checked_add(first)?;
    let (left, right) = (line.get(..at)?, line.get(at.checked_add(1)?..)?);
    let known = |text: &str| vocabulary.by_text.contains_key(text);
    (known(left) && known(right) && known(&format!("{left}{right}"))).then_some((left, right))
}

fn sentence_piece(header: &Header, vocabulary: &Vocabulary<'_>, path: &Path) -> Result<Json> {
    let scores = header.floats("tokenizer.ggml.scores").unwrap_or_default();
    if scores.len() != vocabulary.tokens.len() || scores.iter().any(|score| score.is_nan()) {
        return Err(invalid(path, "tokenizer.ggml.scores must hold one number for each token"));
    }
    let mut normalizers = Vec::new();
    if header.boolean("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE_MARK}));
    }
    if header.boolean("tokenizer.ggml.remove_extra_whitespaces") == Some(true) {
        normalizers.insert(0, json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}));
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if header.boolean("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let byte_fallback =
        (0..=255u8).all(|byte| vocabulary.by_text.contains_key(format!("<0x{byte:02X}>").as_str()));
    let unknown = vocabulary
        .ids
        .unknown
        .or_else(|| vocabulary.iter().find(|(_, _, kind)| *kind == TokenType::Unknown).map(|(id, _, _)| id));
    let unknown = vocabulary.text(unknown);
    let merges = merges_from_scores(vocabulary, scores, path)?;
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe_model(vocabulary, merges, &Bpe { unknown, byte_fallback, ignore_merges: false }),
    }))
}

/// SentencePiece joins the neighbours whose joined piece scores highest; as a merge list, that is every way to cut
/// every piece into two pieces, best score first.
fn merges_from_scores(vocabulary: &Vocabulary<'_>, scores: &[f32], path: &Path) -> Result<Vec<Json>> {
    let piece = |text: &str| {
        let id = *vocabulary.by_text.get(text)?;
        (vocabulary.types.get(id as usize) == Some(&TokenType::Normal)).then_some(id)
    };
    let mut found = Vec::new();
    for ((id, text, kind), score) in vocabulary.iter().zip(scores) {
        if kind != TokenType::Normal {
            continue;
        }
        if text.len() > MAX_PIECE_BYTES {
            return Err(invalid(path, format!("token {id} is longer than {MAX_PIECE_BYTES} bytes")));
        }
        if found.len() > MAX_MERGES {
            return Err(too_many_merges(path));
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(left_id), Some(right_id)) = (piece(left), piece(right)) {
                found.push((score, left_id, right_id, left, right));
            }
        }
    }
    // Equal scores: as the tokens are ordered, so that the result does not depend on the sort.
    found.sort_by(|a, b| b.0.total_cmp(a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    Ok(found.into_iter().map(|(_, _, _, left, right)| json!([left, right])).collect())
}

fn too_many_merges(path: &Path) -> Error {
    invalid(path, format!("the tokenizer has more than {MAX_MERGES} merges"))
}

struct Bpe<'a> {
    unknown: Option<&'a str>,
    byte_fallback: bool,
    ignore_merges: bool,
}

fn bpe_model(vocabulary: &Vocabulary<'_>, merges: Vec<Json>, bpe: &Bpe<'_>) -> Json {
    let vocab: Map<String, Json> =
        vocabulary.iter().map(|(id, text, _)| (text.to_owned(), json!(id))).collect();
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": bpe.unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": bpe.unknown.is_some(),
        "byte_fallback": bpe.byte_fallback,
        "ignore_merges": bpe.ignore_merges,
        "vocab": vocab,
        "merges": merges,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Start,
    End,
}

/// Whether the tokenizer itself puts the start or end token around a text; llama.cpp's defaults where the file is mute.
fn adds(header: &Header, vocabulary: &Vocabulary<'_>, side: Side) -> bool {
    let starts = match header.text("tokenizer.ggml.model") {
        Some("gpt2") => {
            matches!(pre_name(header, vocabulary), "llama-bpe" | "llama3" | "llama-v3" | "tekken")
        }
        _ => true,
    };
    match side {
        Side::Start => header.boolean("tokenizer.ggml.add_bos_token").unwrap_or(starts),
        Side::End => header.boolean("tokenizer.ggml.add_eos_token").unwrap_or(false),
    }
}

fn post_processor(header: &Header, vocabulary: &Vocabulary<'_>, path: &Path) -> Result<Json> {
    let role =
        |side, id: Option<u32>, name: &str| match (adds(header, vocabulary, side), id, vocabulary.text(id)) {
            (false, ..) => Ok(None),
            (true, Some(id), Some(text)) => Ok(Some((id, text))),
            (true, ..) => Err(invalid(path, format!("the tokenizer adds a {name} token, but names none"))),
        };
    let start = role(Side::Start, vocabulary.ids.bos, "start")?;
    let end = role(Side::End, vocabulary.ids.eos, "end")?;
    if start.is_none() && end.is_none() {
        return Ok(Json::Null);
    }
    let special = |text: &str, kind: u8| json!({"SpecialToken": {"id": text, "type_id": kind}});
    let sequence = |name: &str, kind: u8| {
        let mut items: Vec<Json> = start.iter().map(|(_, text)| special(text, kind)).collect();
        items.push(json!({"Sequence": {"id": name, "type_id": kind}}));
        items.extend(end.iter().map(|(_, text)| special(text, kind)));
        items
    };
    let pair: Vec<Json> = sequence("A", 0).into_iter().chain(sequence("B", 1)).collect();
    let mut tokens = Map::new();
    for (id, text) in start.iter().chain(&end) {
        tokens.insert((*text).to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    Ok(
        json!({"type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair, "special_tokens": tokens}),
    )
}
