//! Text to token ids and back, for any `tokenizer.json`.
//!
//! Loading goes: pre-check of the file, the tokenizer library on a thread of its own (a crash there is an error
//! here), our own stages in place of the pre-tokenizer, a table of the bytes of every token, and a first try with
//! hostile texts. One `Tokenizer` serves all threads; share it with `Arc`.

use crate::text::TextError;
use crate::text::frame::Frame;
use crate::text::precheck;
use crate::text::reach::Reach;
use crate::text::stages::{SplitError, Stages};
use crate::text::token_table::{DecodeKind, Lead, TokenTable};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;
use tokenizers::{AddedVocabulary, PreTokenizedString};

/// How long loading and the first try may take together.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);
/// Stack of the loading thread: patterns and JSON may nest.
const LOAD_STACK: usize = 64 << 20;

/// What happens to the text of special tokens inside a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// `<|im_end|>` in the text becomes the token of that name.
    Parse,
    /// `<|im_end|>` in the text is ordinary text. Right for text of unknown origin.
    Literal,
}

/// The tokenizer of one model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The added tokens, with the special ones switched off.
    literal: AddedVocabulary,
    stages: Stages,
    table: TokenTable,
    /// What the model wants around a text.
    frame: Frame,
    /// How much text a token can stand for, where that is bounded.
    reach: Option<Reach>,
    /// `tokenizer_config.json`, for the chat template.
    config: Map<String, Value>,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, and `tokenizer_config.json` if there is one, from a model directory.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let json = read_json(&dir.join("tokenizer.json"))?
            .ok_or_else(|| TextError::Load(format!("{} has no tokenizer.json", dir.display())))?;
        let mut config =
            read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_else(|| Value::Object(Map::new()));
        // Names of special tokens may be in a file of their own.
        if let (Some(Value::Object(map)), Some(config)) =
            (read_json(&dir.join("special_tokens_map.json"))?, config.as_object_mut())
        {
            for (name, token) in map {
                config.entry(name).or_insert(token);
            }
        }
        Self::from_values(json, config)
            .map_err(|e| TextError::Load(format!("{}: {e}", dir.join("tokenizer.json").display())))
    }

    /// Makes a tokenizer from the contents of `tokenizer.json` and `tokenizer_config.json`.
    pub fn from_values(tokenizer_json: Value, tokenizer_config: Value) -> Result<Self, TextError> {
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("tokenizer-load".into())
            .stack_size(LOAD_STACK)
            .spawn(move || {
                let loaded = Self::build(tokenizer_json, tokenizer_config).and_then(|t| {
                    t.try_hostile_texts()?;
                    Ok(t)
                });
                // The receiver is gone only after the deadline; then nobody wants the tokenizer any more.
                let _ = sender.send(loaded);
            })
            .map_err(|e| TextError::Load(format!("no thread to load the tokenizer: {e}")))?;
        match receiver.recv_timeout(LOAD_DEADLINE) {
            Ok(loaded) => {
                let _ = thread.join();
                loaded
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(TextError::Load("the tokenizer file makes the tokenizer library crash".into()))
            }
            Err(mpsc::RecvTimeoutError::Timeout) => Err(TextError::Load(format!(
                "loading the tokenizer took longer than {} s",
                LOAD_DEADLINE.as_secs()
            ))),
        }
    }

    fn build(mut json: Value, config: Value) -> Result<Self, TextError> {
        precheck::check(&mut json).map_err(TextError::Load)?;
        let stages = Stages::new(&json["pre_tokenizer"]).map_err(TextError::Load)?;
        let reach = Reach::of(&json);
        let decoder = json["decoder"].clone();
        let added_in_file = json["added_tokens"].clone();
        let inner: tokenizers::Tokenizer = serde_json::from_value(json)
            .map_err(|e| TextError::Load(format!("not a usable tokenizer: {e}")))?;
        for token in added_in_file.as_array().into_iter().flatten() {
            let content = token["content"].as_str().unwrap_or_default();
            let got = inner.token_to_id(content).map(u64::from);
            if got != token["id"].as_u64() {
                return Err(TextError::Load(format!(
                    "the added token {content:?} has the id {} in the file, but {got:?} in the vocabulary",
                    token["id"]
                )));
            }
        }
        let mut literal = inner.get_added_vocabulary().clone();
        literal.set_encode_special_tokens(true);
        let table = token_table(&inner, &decoder);
        let frame = Frame::of(&inner)?;
        let config = match config {
            Value::Object(config) => config,
            Value::Null => Map::new(),
            _ => return Err(TextError::Load("tokenizer_config.json is not a JSON object".into())),
        };
        let named = |name: &str| token_name(config.get(name)?).and_then(|text| inner.token_to_id(text));
        let (bos, eos) = (named("bos_token"), named("eos_token"));
        Ok(Self { inner, literal, stages, table, frame, reach, config, bos, eos })
    }

    /// Encodes a few texts that have broken tokenizers, before the first client sends one.
    fn try_hostile_texts(&self) -> Result<(), TextError> {
        for unit in ["a", " ", "^", "\n", "\u{200D}", "e\u{301}", "0", "<|", "\u{0}", "😀", "a'S "] {
            let text = unit.repeat(2048 / unit.len());
            let ids = match self.encode(&text, Specials::Parse, true) {
                Ok(ids) => ids,
                Err(TextError::TooComplex) => {
                    return Err(TextError::Load(format!(
                        "the split pattern of this tokenizer gives up on {} times {unit:?}",
                        2048 / unit.len()
                    )));
                }
                Err(e) => return Err(e),
            };
            self.decode(&ids, false);
        }
        Ok(())
    }

    /// Token ids of a text. `add_special_tokens` puts those around it that the model wants (a BOS, for example).
    pub fn encode(
        &self,
        text: &str,
        specials: Specials,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TextError> {
        self.encode_marked(text, specials, add_special_tokens, None)
    }

    /// Refuses a text that has more than `max` tokens by its mere length. `mark` is as in `encode_marked`.
    pub(crate) fn check_length(&self, text: &str, mark: Option<&str>, max: usize) -> Result<(), TextError> {
        let Some(reach) = self.reach else { return Ok(()) };
        if reach.at_least(text, 0) <= max {
            return Ok(());
        }
        let hidden = mark.map_or(0, |mark| text.matches(mark).count() * mark.len());
        let at_least = reach.at_least(text, hidden);
        if at_least > max { Err(TextError::TooManyTokens { at_least, max }) } else { Ok(()) }
    }

    /// As [`Tokenizer::encode`]. Each occurrence of `mark` hides what it stands in from the search for added tokens,
    /// and is gone from the text that becomes ordinary tokens.
    pub(crate) fn encode_marked(
        &self,
        text: &str,
        specials: Specials,
        add_special_tokens: bool,
        mark: Option<&str>,
    ) -> Result<Vec<u32>, TextError> {
        let added = match specials {
            Specials::Parse => self.inner.get_added_vocabulary(),
            Specials::Literal => &self.literal,
        };
        let mut pieces: PreTokenizedString = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(mark) = mark {
            pieces
                .normalize(|piece| if piece.get().contains(mark) { piece.replace(mark, "") } else { Ok(()) })
                .map_err(|_| TextError::Internal)?;
        }
        let (before, after) = self.frame.around();
        let mut ids = Vec::with_capacity(text.len() / 3 + before.len() + after.len());
        if add_special_tokens {
            ids.extend_from_slice(before);
        }
        self.stages.tokenize(pieces, self.inner.get_model(), &mut ids).map_err(|e| match e {
            SplitError::TooLong(bytes) => {
                TextError::TooLong { bytes, limit: crate::text::stages::MAX_BACKTRACKING_BYTES }
            }
            SplitError::TooComplex => TextError::TooComplex,
            SplitError::GivenUp => TextError::GivenUp,
            SplitError::Other(message) => {
                tracing::error!(message, "the tokenizer library failed");
                TextError::Internal
            }
        })?;
        if add_special_tokens {
            ids.extend_from_slice(after);
        }
        Ok(ids)
    }

    /// The text of token ids. Bytes that are not UTF-8 become U+FFFD; unknown ids are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let DecodeKind::Bytes { lead } = self.table.kind() else {
            return self.inner.decode(ids, skip_special).unwrap_or_default();
        };
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut first = true;
        for &id in ids {
            if (skip_special && self.is_special(id)) || !self.contains(id) {
                continue;
            }
            let token = self.table.bytes(id);
            if first && lead == Lead::SpacesOfFirstToken {
                bytes.extend(token.iter().filter(|b| **b != b' '));
            } else {
                bytes.extend_from_slice(token);
            }
            first = false;
        }
        let bytes = match lead {
            Lead::OneSpace => bytes.strip_prefix(b" ").unwrap_or(&bytes),
            Lead::Keep | Lead::SpacesOfFirstToken => &bytes,
        };
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// How tokens become text, for the streaming decoder.
    pub(crate) fn decode_kind(&self) -> DecodeKind {
        self.table.kind()
    }

    /// The bytes of a token without a copy; empty for an unknown id.
    pub(crate) fn raw_bytes(&self, id: u32) -> &[u8] {
        self.table.bytes(id)
    }

    /// Whether there is a token with this id.
    pub fn contains(&self, id: u32) -> bool {
        !self.table.bytes(id).is_empty()
    }

    /// The bytes that a token adds to a text: possibly only a part of a character. `None` for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.contains(id).then(|| self.table.bytes(id).to_vec())
    }

    /// The text of a single token, with U+FFFD for a part of a character. `None` for an unknown id.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.contains(id).then(|| String::from_utf8_lossy(self.table.bytes(id)).into_owned())
    }

    /// The token as the vocabulary spells it (`Ġhello`, `▁hello`, `<|im_end|>`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token, spelt as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether the token is special: a control token, not part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.table.is_special(id)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// The end-of-sequence token named by `tokenizer_config.json`.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos
    }

    /// The beginning-of-sequence token named by `tokenizer_config.json`.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    /// Whether `encode(.., true)` puts anything around a text.
    pub fn adds_special_tokens(&self) -> bool {
        self.frame.num_special() > 0
    }

    /// What the model wants around a text and around a pair.
    pub fn frame(&self) -> &Frame {
        &self.frame
    }

    /// The contents of `tokenizer_config.json`.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// All added tokens: their text, and whether they are special.
    pub(crate) fn added_tokens(&self) -> impl Iterator<Item = (&str, bool)> {
        self.inner
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .values()
            .map(|t| (t.content.as_str(), t.special))
    }

    /// Whether every split pattern has a linear splitter, so that only the byte cap limits a text.
    pub fn is_linear(&self) -> bool {
        self.stages.is_linear()
    }
}

/// The text of a special token in `tokenizer_config.json`: a string, or an object with `content`.
pub(crate) fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

fn read_json(path: &Path) -> Result<Option<Value>, TextError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(TextError::Load(format!("{}: {e}", path.display()))),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| TextError::Load(format!("{}: {e}", path.display())))
}

fn token_table(inner: &tokenizers::Tokenizer, decoder: &Value) -> TokenTable {
    let added = inner.get_added_vocabulary();
    let mut tokens: Vec<Option<(String, bool)>> = Vec::new();
    let mut set = |id: u32, token: String, special: bool| {
        let id = id as usize;
        if tokens.len() <= id {
            tokens.resize(id + 1, None);
        }
        tokens[id] = Some((token, special));
    };
    for (token, id) in inner.get_vocab(false) {
        set(id, token, false);
    }
    for (id, token) in added.get_added_tokens_decoder() {
        let text = added.simple_id_to_token(*id).unwrap_or_else(|| token.content.clone());
        set(*id, text, added.is_special_token(&token.content));
    }
    TokenTable::new(decoder, tokens.into_iter())
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
pub(crate) mod tests;
