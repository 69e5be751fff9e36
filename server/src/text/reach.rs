//! How much text one token can stand for: what makes it plain, without tokenizing, that a text is too long.
//!
//! Worked out once from `tokenizer.json`, on the safe side: a text is never said to have more tokens than it has. Some
//! tokenizers give no bound, because a part of theirs drops text or makes one token of any amount of it (an unknown word,
//! white space between words). Of those nothing is said.

use std::collections::HashSet;

use serde_json::Value;

use crate::text::token_table::byte_chars;

/// Composing shortens: four characters of four bytes each may become one byte at most.
const COMPOSED: usize = 16;
/// A character of four bytes may become one of one byte.
const CHARACTER: usize = 4;
/// Bytes that a byte of an added token may become where its text is normalised, too.
const GROWTH: usize = 64;
/// Texts that a normalizer puts in, in bytes at most.
const MAX_INSERT: usize = 16;

/// The bound of one tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Bytes of text that one token stands for at most.
    bytes: usize,
    /// Some added token takes the white space beside it along, however much it is.
    takes_blanks: bool,
}

impl Reach {
    /// Reads a checked `tokenizer.json`; `None` if there is no bound.
    pub(crate) fn of(file: &Value) -> Option<Self> {
        let shrinks = normalizer(&file["normalizer"])?;
        let mut byte_level = false;
        pre_tokenizer(&file["pre_tokenizer"], &mut byte_level)?;
        let longest = model(&file["model"], byte_level)?;
        let mut reach = Self { bytes: longest.checked_mul(shrinks)?, takes_blanks: false };
        for token in file["added_tokens"].as_array().into_iter().flatten() {
            let flag = |name: &str, default: bool| token[name].as_bool().unwrap_or(default);
            let normalised = flag("normalized", true) && !file["normalizer"].is_null();
            let growth = if normalised { GROWTH } else { 1 };
            let bytes = token["content"].as_str()?.len().checked_mul(growth)?.checked_mul(shrinks)?;
            reach.bytes = reach.bytes.max(bytes);
            reach.takes_blanks |= flag("lstrip", false) || flag("rstrip", false);
        }
        Some(reach)
    }

    /// Tokens that `text` has at least; `hidden` of its bytes are no text.
    pub(crate) fn at_least(&self, text: &str, hidden: usize) -> usize {
        let bytes = if self.takes_blanks {
            text.chars().filter(|c| !c.is_whitespace()).map(char::len_utf8).sum()
        } else {
            text.len()
        };
        bytes.saturating_sub(hidden).div_ceil(self.bytes.max(1))
    }
}

/// By how much a normalizer shortens a text at most.
fn normalizer(part: &Value) -> Option<usize> {
    match part["type"].as_str() {
        None => part.is_null().then_some(1),
        Some("NFC" | "NFKC") => Some(COMPOSED),
        Some("NFD" | "NFKD" | "Lowercase") => Some(CHARACTER),
        Some("Prepend") => (part["prepend"].as_str()?.len() <= MAX_INSERT).then_some(1),
        Some("Replace") => {
            let (from, to) = (part["pattern"]["String"].as_str()?.len(), part["content"].as_str()?.len());
            (1..=MAX_INSERT).contains(&to).then(|| from.div_ceil(to).max(1))
        }
        Some("Sequence") => part["normalizers"]
            .as_array()?
            .iter()
            .try_fold(1_usize, |all, inner| all.checked_mul(normalizer(inner)?)),
        Some(_) => None,
    }
}

/// Whether a pre-tokenizer keeps all of a text; sets `byte_level` if the model sees stand-ins of bytes.
fn pre_tokenizer(part: &Value, byte_level: &mut bool) -> Option<()> {
    match part["type"].as_str() {
        None => part.is_null().then_some(()),
        Some("ByteLevel") => {
            *byte_level = true;
            Some(())
        }
        Some("Digits" | "Metaspace" | "UnicodeScripts" | "FixedLength") => Some(()),
        Some("Split" | "Punctuation") => (part["behavior"] != "Removed").then_some(()),
        Some("Sequence") => {
            part["pretokenizers"].as_array()?.iter().try_for_each(|inner| pre_tokenizer(inner, byte_level))
        }
        Some(_) => None,
    }
}

/// Bytes of the normalised text that one token of the model stands for at most.
fn model(model: &Value, byte_level: bool) -> Option<usize> {
    let tokens: HashSet<&str> = match &model["vocab"] {
        Value::Object(vocab) => vocab.keys().map(String::as_str).collect(),
        Value::Array(pieces) => pieces.iter().filter_map(|piece| piece[0].as_str()).collect(),
        _ => return None,
    };
    // Each stand-in is one byte of the text, whatever it takes itself.
    let bytes = |token: &&str| if byte_level { token.chars().count() } else { token.len() };
    let longest = tokens.iter().map(bytes).max()?;
    let all_bytes = || {
        model["byte_fallback"] == true
            && (0..=255_u8).all(|b| tokens.contains(format!("<0x{b:02X}>").as_str()))
    };
    let kind = model["type"].as_str().unwrap_or("BPE");
    let none_unknown = match kind {
        "BPE" if byte_level => byte_chars().iter().all(|c| tokens.contains(c.to_string().as_str())),
        "BPE" | "Unigram" => all_bytes(),
        _ => return None,
    };
    // Otherwise an unknown character must be a token of its own: not left out, and not made one with its neighbours.
    let unknown_alone = kind == "BPE" && model["unk_token"].is_string() && model["fuse_unk"] != true;
    (none_unknown || unknown_alone).then_some(longest.max(CHARACTER))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::{byte_level, gpt2_style};
    use serde_json::json;

    fn file() -> Value {
        byte_level(gpt2_style())
    }

    #[test]
    fn the_longest_token_decides() {
        let reach = Reach::of(&file()).expect("a bound");
        // `<|im_start|>`, the longest added token.
        assert_eq!(reach, Reach { bytes: 12, takes_blanks: false });
        assert_eq!((reach.at_least("", 0), reach.at_least("abc", 0)), (0, 1));
        assert_eq!(reach.at_least(&"a".repeat(1200), 0), 100);
        assert_eq!(reach.at_least(&"a".repeat(1200), 600), 50);
    }

    #[test]
    fn normalizers_that_shorten_stretch_it() {
        let mut nfc = file();
        nfc["normalizer"] = json!({"type": "NFC"});
        assert_eq!(Reach::of(&nfc).expect("a bound").bytes, 12 * COMPOSED);
        nfc["added_tokens"][0]["normalized"] = json!(true);
        assert_eq!(Reach::of(&nfc).expect("a bound").bytes, 12 * COMPOSED * GROWTH);
        let replace = json!({"type": "Replace", "pattern": {"String": "aaaa"}, "content": "b"});
        let mut both = file();
        both["normalizer"] = json!({"type": "Sequence", "normalizers": [replace, {"type": "Lowercase"}]});
        assert_eq!(Reach::of(&both).expect("a bound").bytes, 12 * 4 * CHARACTER);
    }

    #[test]
    fn blanks_beside_greedy_tokens_do_not_count() {
        let mut greedy = file();
        greedy["added_tokens"][1]["rstrip"] = json!(true);
        let reach = Reach::of(&greedy).expect("a bound");
        assert_eq!(reach.at_least(&" ".repeat(1 << 20), 0), 0);
        assert_eq!(reach.at_least(&"a ".repeat(12), 0), 1);
    }

    #[test]
    fn whatever_drops_or_swallows_text_has_no_bound() {
        let cases = [
            ("/normalizer", json!({"type": "Strip"})),
            ("/normalizer", json!({"type": "BertNormalizer"})),
            ("/normalizer", json!({"type": "Replace", "pattern": {"String": "a"}, "content": ""})),
            ("/normalizer", json!({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "})),
            ("/pre_tokenizer", json!({"type": "WhitespaceSplit"})),
            ("/pre_tokenizer", json!({"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"})),
            // Without stand-ins for all bytes, unknown characters are left out.
            ("/pre_tokenizer", Value::Null),
            ("/model/type", json!("WordPiece")),
            ("/model/vocab", json!({"a": 0})),
        ];
        for (place, value) in cases {
            let mut other = file();
            *other.pointer_mut(place).expect("the place exists") = value.clone();
            assert_eq!(Reach::of(&other), None, "{place} {value}");
        }
    }
}
