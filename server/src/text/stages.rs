//! The pre-tokenizer of `tokenizer.json`, as a list of stages that cannot fail silently.
//!
//! Known split patterns run on [`Splitter`], which is linear. Other patterns run on the same engine as in the
//! tokenizer library, but here its work limit is an error instead of a text that is no longer split.
//! Everything else is the library's own code.

use crate::text::pool::given_up;
use crate::text::splitter::Splitter;
use crate::text::token_table::byte_chars;
use serde_json::Value;
use tokenizers::pattern::{Invert, Pattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    Model, ModelWrapper, Offsets, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
    SplitDelimiterBehavior,
};

/// The longest text, in bytes, that may meet a pattern without a linear splitter.
pub(crate) const MAX_BACKTRACKING_BYTES: usize = 1 << 20;

/// Why a text was not split.
#[derive(Debug)]
pub(crate) enum SplitError {
    /// The text is longer than this, and the pattern is not known to be linear.
    TooLong(usize),
    /// A pattern hit the work limit of its engine.
    TooComplex,
    /// Nobody waits for the result any more.
    GivenUp,
    /// Anything else the library reports.
    Other(String),
}

/// All stages, in order.
pub(crate) struct Stages {
    stages: Vec<Stage>,
    /// The fast way is open: borders only, then the byte alphabet.
    direct: bool,
}

enum Stage {
    /// A known pattern.
    Linear(Splitter),
    /// A pattern that the backtracking engine has to run.
    Pattern { regex: fancy_regex::Regex, behavior: SplitDelimiterBehavior, invert: bool },
    /// Digits apart from other characters, each alone or all together.
    Digits { each: bool },
    /// A space in front of each piece, where there is none.
    PrefixSpace,
    /// Bytes to their stand-in characters.
    Bytes,
    /// Any other pre-tokenizer.
    Library(Box<PreTokenizerWrapper>),
}

impl Stages {
    /// Reads the `pre_tokenizer` section of `tokenizer.json`.
    pub(crate) fn new(section: &Value) -> Result<Self, String> {
        let mut stages = Vec::new();
        push_stages(section, &mut stages)?;
        let direct = matches!(stages.last(), Some(Stage::Bytes))
            && stages[..stages.len() - 1]
                .iter()
                .all(|s| matches!(s, Stage::Linear(_) | Stage::Digits { .. }));
        Ok(Self { stages, direct })
    }

    /// Whether all stages are known to take time proportional to the text.
    pub(crate) fn is_linear(&self) -> bool {
        !self.stages.iter().any(|s| matches!(s, Stage::Pattern { .. }))
    }

    /// Closes the fast way, so that tests can compare both.
    #[cfg(test)]
    pub(crate) fn without_direct(mut self) -> Self {
        self.direct = false;
        self
    }

    /// Token ids of a text in which added tokens were already found and set.
    pub(crate) fn tokenize(
        &self,
        mut text: PreTokenizedString,
        model: &ModelWrapper,
        ids: &mut Vec<u32>,
    ) -> Result<(), SplitError> {
        use tokenizers::{OffsetReferential::Normalized, OffsetType};
        if !self.direct {
            self.split(&mut text)?;
            text.tokenize(
                |piece| if given_up() { Err("given up".into()) } else { model.tokenize(piece.get()) },
            )
            .map_err(|e| if given_up() { SplitError::GivenUp } else { SplitError::Other(e.to_string()) })?;
        }
        let mut buffer = String::new();
        for (piece, _, tokens) in text.get_splits(Normalized, OffsetType::None) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|t| t.id)),
                None => self.tokenize_piece(piece, model, &mut buffer, ids)?,
            }
        }
        Ok(())
    }

    /// The fast way: finds the borders in the text itself and gives each piece to the model.
    fn tokenize_piece(
        &self,
        text: &str,
        model: &ModelWrapper,
        buffer: &mut String,
        ids: &mut Vec<u32>,
    ) -> Result<(), SplitError> {
        let mut pieces = vec![(0, text.len())];
        for stage in &self.stages {
            let mut next = Vec::with_capacity(pieces.len());
            for &(start, end) in &pieces {
                let mut push = |a: usize, b: usize| next.push((start + a, start + b));
                match stage {
                    Stage::Linear(splitter) => splitter.split(&text[start..end], push),
                    Stage::Digits { each } => split_digits(&text[start..end], *each, push),
                    _ => push(0, end - start),
                }
            }
            pieces = next;
        }
        for (start, end) in pieces {
            if given_up() {
                return Err(SplitError::GivenUp);
            }
            buffer.clear();
            buffer.extend(text[start..end].bytes().map(|b| byte_chars()[usize::from(b)]));
            let tokens = model.tokenize(buffer).map_err(|e| SplitError::Other(e.to_string()))?;
            ids.extend(tokens.iter().map(|t| t.id));
        }
        Ok(())
    }

    /// The general way, with the library's strings that remember where each character came from.
    fn split(&self, text: &mut PreTokenizedString) -> Result<(), SplitError> {
        for stage in &self.stages {
            if given_up() {
                return Err(SplitError::GivenUp);
            }
            stage.apply(text)?;
        }
        Ok(())
    }
}

impl Stage {
    fn apply(&self, text: &mut PreTokenizedString) -> Result<(), SplitError> {
        let other = |e: tokenizers::Error| SplitError::Other(e.to_string());
        match self {
            Self::Linear(splitter) => text
                .split(|_, piece| piece.split(LinearPattern(*splitter), SplitDelimiterBehavior::Isolated))
                .map_err(other),
            Self::Digits { each } => {
                let behavior =
                    if *each { SplitDelimiterBehavior::Isolated } else { SplitDelimiterBehavior::Contiguous };
                text.split(|_, piece| piece.split(char::is_numeric, behavior)).map_err(other)
            }
            Self::Pattern { regex, behavior, invert } => {
                let mut too_long = None;
                text.split(|_, piece| {
                    if piece.get().len() > MAX_BACKTRACKING_BYTES {
                        too_long = Some(piece.get().len());
                        return Err("too long".into());
                    }
                    if *invert {
                        piece.split(Invert(regex), *behavior)
                    } else {
                        piece.split(regex, *behavior)
                    }
                })
                // The pattern itself is valid, so the work limit is all that can be left.
                .map_err(|_| too_long.map_or(SplitError::TooComplex, SplitError::TooLong))
            }
            Self::PrefixSpace => text
                .split(|_, mut piece| {
                    if !piece.get().starts_with(' ') {
                        piece.prepend(" ");
                    }
                    Ok(vec![piece])
                })
                .map_err(other),
            Self::Bytes => ByteLevel::new(false, true, false).pre_tokenize(text).map_err(other),
            Self::Library(inner) => inner.pre_tokenize(text).map_err(other),
        }
    }
}

fn push_stages(section: &Value, stages: &mut Vec<Stage>) -> Result<(), String> {
    let flag = |name: &str, default: bool| section[name].as_bool().unwrap_or(default);
    match section["type"].as_str() {
        None if section.is_null() => return Ok(()),
        Some("Sequence") => {
            for inner in section["pretokenizers"].as_array().into_iter().flatten() {
                push_stages(inner, stages)?;
            }
            return Ok(());
        }
        Some("Digits") => stages.push(Stage::Digits { each: flag("individual_digits", false) }),
        Some("ByteLevel") => {
            if flag("add_prefix_space", true) {
                stages.push(Stage::PrefixSpace);
            }
            if flag("use_regex", true) {
                stages.push(Stage::Linear(Splitter::Gpt2));
            }
            stages.push(Stage::Bytes);
        }
        Some("Split") if section["pattern"]["Regex"].is_string() => {
            let pattern = section["pattern"]["Regex"].as_str().unwrap_or_default();
            let invert = flag("invert", false);
            let behavior: SplitDelimiterBehavior = serde_json::from_value(section["behavior"].clone())
                .map_err(|_| format!("the split behaviour {} is not known", section["behavior"]))?;
            // A known pattern matches all of the text, so "keep the matches" and "isolate the matches" are the same.
            let keeps_all = match behavior {
                SplitDelimiterBehavior::Isolated => true,
                SplitDelimiterBehavior::Removed => invert,
                _ => false,
            };
            match Splitter::for_pattern(pattern).filter(|_| keeps_all) {
                Some(splitter) => stages.push(Stage::Linear(splitter)),
                None => stages.push(Stage::Pattern {
                    regex: fancy_regex::Regex::new(pattern)
                        .map_err(|e| format!("the split pattern {pattern:?} is not valid: {e}"))?,
                    behavior,
                    invert,
                }),
            }
        }
        _ => {
            let inner = serde_json::from_value(section.clone())
                .map_err(|e| format!("the pre-tokenizer {} is not usable: {e}", section["type"]))?;
            stages.push(Stage::Library(Box::new(inner)));
        }
    }
    Ok(())
}

/// Runs of digits and of other characters, or each digit alone.
fn split_digits(text: &str, each: bool, mut piece: impl FnMut(usize, usize)) {
    let mut start = 0;
    let mut previous = None;
    for (at, c) in text.char_indices() {
        let numeric = c.is_numeric();
        let border = previous.is_some_and(|p| p != numeric || (numeric && each));
        if border {
            piece(start, at);
            start = at;
        }
        previous = Some(numeric);
    }
    if start < text.len() {
        piece(start, text.len());
    }
}

struct LinearPattern(Splitter);

impl Pattern for LinearPattern {
    fn find_matches(&self, inside: &str) -> tokenizers::Result<Vec<(Offsets, bool)>> {
        let mut pieces = Vec::new();
        self.0.split(inside, |a, b| pieces.push(((a, b), true)));
        if pieces.is_empty() {
            pieces.push(((0, 0), false));
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_hostile_pattern_is_an_error_and_not_an_unsplit_text() {
        // Backtracks exponentially; the lookahead keeps it away from the linear engine.
        let section = json!({"type": "Split", "pattern": {"Regex": "(a+)+(?=b)c"}, "behavior": "Isolated", "invert": false});
        let stages = Stages::new(&section).expect("valid");
        assert!(!stages.is_linear());
        let mut text = PreTokenizedString::from("a".repeat(200).as_str());
        assert!(matches!(stages.split(&mut text), Err(SplitError::TooComplex)));
    }

    #[test]
    fn unknown_patterns_have_a_length_limit() {
        let section = json!({"type": "Split", "pattern": {"Regex": "\\w+(?=\\s)"}, "behavior": "Isolated", "invert": false});
        let stages = Stages::new(&section).expect("valid");
        let mut text = PreTokenizedString::from("a ".repeat(MAX_BACKTRACKING_BYTES / 2 + 1).as_str());
        let error = stages.split(&mut text).expect_err("too long");
        assert!(matches!(error, SplitError::TooLong(bytes) if bytes == MAX_BACKTRACKING_BYTES + 2));
    }

    #[test]
    fn digits_split_as_the_library_does() {
        for each in [true, false] {
            for text in ["", "1", "a", "12ab3", "٣4½x", "  7"] {
                let mut got = Vec::new();
                split_digits(text, each, |a, b| got.push(text[a..b].to_owned()));
                let mut want = PreTokenizedString::from(text);
                Stage::Digits { each }.apply(&mut want).expect("digits");
                let want: Vec<String> = want
                    .get_splits(tokenizers::OffsetReferential::Normalized, tokenizers::OffsetType::None)
                    .into_iter()
                    .map(|(s, ..)| s.to_owned())
                    .filter(|s| !s.is_empty())
                    .collect();
                assert_eq!(got, want, "{text:?} {each}");
            }
        }
    }
}
