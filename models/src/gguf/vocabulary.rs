//! The vocabulary of a GGUF file: token texts, their types, and the ids with a role.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::header::Header;
use crate::error::{Result, invalid};

/// Four times the largest known vocabulary.
const MAX_TOKENS: usize = 1 << 20;

/// Texts of control tokens that end a turn or a document in the known model families. Files often name only one end
/// id, while the model was trained to end with any of these.
const END_TEXTS: [&str; 8] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
];

/// What a token is for; the names are GGUF's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    Unknown,
    /// Never text: starts, ends, roles.
    Control,
    /// Text that is matched whole before anything else.
    UserDefined,
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
}

/// Ids with a role.
#[derive(Debug, Clone, Default)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unknown: Option<u32>,
    pub(super) padding: Option<u32>,
    /// End of turn and end of message, where they differ from `eos`.
    ends: Vec<u32>,
}

impl SpecialIds {
    /// Reads the ids and checks that the vocabulary has them.
    pub(super) fn read(header: &Header, path: &Path) -> Result<Self> {
        let len =
            header.texts("tokenizer.ggml.tokens").map_or(u64::from(u32::MAX), |tokens| tokens.len() as u64);
        let id = |name: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            match header.unsigned(&key) {
                // All bits set is llama.cpp's "there is none".
                None | Some(0xFFFF_FFFF | u64::MAX) => Ok(None),
                Some(id) if id < len => Ok(u32::try_from(id).ok()),
                Some(id) => Err(invalid(path, format!("{key} is {id}, but the vocabulary has {len} tokens"))),
            }
        };
        let ends = [id("eot")?, id("eom")?];
        Ok(Self {
            bos: id("bos")?,
            eos: id("eos")?,
            unknown: id("unknown")?,
            padding: id("padding")?,
            ends: ends.into_iter().flatten().collect(),
        })
    }

    /// Whether the id is one that never stands for text.
    fn is_control(&self, id: u32) -> bool {
        [self.bos, self.eos, self.padding].contains(&Some(id)) || self.ends.contains(&id)
    }
}

/// The tokens, checked.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: &'a [String],
    pub(super) types: Vec<TokenType>,
    pub(super) ids: SpecialIds,
    /// Token text to id; every text is there once.
    pub(super) by_text: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    /// Reads tokens and types.
    pub(super) fn read(header: &'a Header, path: &Path) -> Result<Self> {
        let tokens = header
            .texts("tokenizer.ggml.tokens")
            .filter(|tokens| !tokens.is_empty())
            .ok_or_else(|| invalid(path, "tokenizer.ggml.tokens is missing or empty"))?;
        if tokens.len() > MAX_TOKENS {
            return Err(invalid(path, format!("{} tokens; {MAX_TOKENS} are allowed", tokens.len())));
        }
        let ids = SpecialIds::read(header, path)?;
        let mut types = match header.integers("tokenizer.ggml.token_type") {
            Some(codes) if codes.len() == tokens.len() => {
                codes.iter().map(|&code| token_type(code, path)).collect::<Result<Vec<_>>>()?
            }
            Some(codes) => {
                return Err(invalid(
                    path,
                    format!("{} token types for {} tokens", codes.len(), tokens.len()),
                ));
            }
            None => vec![TokenType::Normal; tokens.len()],
        };
        let mut by_text = HashMap::with_capacity(tokens.len());
        for ((id, text), kind) in (0u32..).zip(tokens).zip(&mut types) {
            if let Some(first) = by_text.insert(text.as_str(), id) {
                return Err(invalid(path, format!("tokens {first} and {id} have the same text {text:?}")));
            }
            if *kind == TokenType::Normal && ids.is_control(id) {
                *kind = TokenType::Control;
            }
        }
        Ok(Self { tokens, types, ids, by_text })
    }

    /// Ids, texts and types in order of id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &'a str, TokenType)> {
        (0u32..).zip(self.tokens).zip(&self.types).map(|((id, text), &kind)| (id, text.as_str(), kind))
    }

    /// Text of a token.
    pub(super) fn text(&self, id: Option<u32>) -> Option<&'a str> {
        self.tokens.get(usize::try_from(id?).ok()?).map(String::as_str)
    }

    /// All ids that end a generation: the named one first.
    fn end_ids(&self) -> Vec<u32> {
        let mut ends: Vec<u32> = self.ids.eos.into_iter().collect();
        let by_text = END_TEXTS.iter().filter_map(|text| self.by_text.get(text)).copied();
        let by_text = by_text.filter(|&id| self.types.get(id as usize) == Some(&TokenType::Control));
        for id in self.ids.ends.iter().copied().chain(by_text) {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        ends
    }
}

fn token_type(code: i64, path: &Path) -> Result<TokenType> {
    Ok(match code {
        1 => TokenType::Normal,
        2 => TokenType::Unknown,
        3 => TokenType::Control,
        4 => TokenType::UserDefined,
        5 => TokenType::Unused,
        6 => TokenType::Byte,
        _ => return Err(invalid(path, format!("{code} is not a token type"))),
    })
}

/// `generation_config.json`: the ids that start, end and pad.
pub(super) fn generation_config(header: &Header, path: &Path) -> Result<Json> {
    if header.texts("tokenizer.ggml.tokens").is_none() {
        let ids = SpecialIds::read(header, path)?;
        return Ok(json!({"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.padding}));
    }
    let vocabulary = Vocabulary::read(header, path)?;
    let ids = &vocabulary.ids;
    Ok(json!({"bos_token_id": ids.bos, "eos_token_id": vocabulary.end_ids(), "pad_token_id": ids.padding}))
}
