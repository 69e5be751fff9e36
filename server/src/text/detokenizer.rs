//! Token ids to text as they come, one id at a time.
//!
//! The concatenation of everything [`Detokenizer::push`] and [`Detokenizer::finish`] return is exactly what
//! [`Tokenizer::decode`] returns for all ids. Between two calls at most three bytes wait: the beginning of a
//! character whose end may still come. Bytes that can never become a character come out at once as U+FFFD.

use crate::text::token_table::{DecodeKind, Lead};
use crate::text::tokenizer::Tokenizer;
use std::sync::Arc;

/// The streaming decoder of one sequence.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    lead: Lead,
    /// Nothing was decoded yet.
    at_start: bool,
    utf8: Utf8Buffer,
    window: Window,
}

/// For decoders without a byte table: decodes the last few ids again and takes what is new.
#[derive(Debug, Default)]
struct Window {
    ids: Vec<u32>,
    /// How many of `ids` were already turned into text that went out.
    sent: usize,
}

impl Detokenizer {
    /// A decoder for a text of its own, which equals `tokenizer.decode(ids, skip_special)`.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let lead = match tokenizer.decode_kind() {
            DecodeKind::Bytes { lead } => lead,
            DecodeKind::Library => Lead::Keep,
        };
        Self {
            tokenizer,
            skip_special,
            lead,
            at_start: true,
            utf8: Utf8Buffer::default(),
            window: Window::default(),
        }
    }

    /// A decoder for text that goes on after other text, such as a completion after its prompt: a space at the
    /// beginning stays.
    pub fn continuing(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let mut decoder = Self::new(tokenizer, skip_special);
        decoder.lead = Lead::Keep;
        decoder
    }

    /// Takes the next id and returns the text that is complete now.
    pub fn push(&mut self, id: u32) -> String {
        if (self.skip_special && self.tokenizer.is_special(id)) || !self.tokenizer.contains(id) {
            return String::new();
        }
        if self.tokenizer.decode_kind() == DecodeKind::Library {
            return self.window.push(&self.tokenizer, id, self.skip_special);
        }
        let mut bytes = self.tokenizer.raw_bytes(id);
        let without_spaces: Vec<u8>;
        if self.at_start && !bytes.is_empty() {
            match self.lead {
                Lead::Keep => {}
                Lead::OneSpace => bytes = bytes.strip_prefix(b" ").unwrap_or(bytes),
                Lead::SpacesOfFirstToken => {
                    without_spaces = bytes.iter().copied().filter(|b| *b != b' ').collect();
                    bytes = &without_spaces;
                }
            }
            self.at_start = false;
        }
        self.utf8.push(bytes)
    }

    /// The end of the text: what is left of an incomplete character.
    pub fn finish(&mut self) -> String {
        if self.tokenizer.decode_kind() == DecodeKind::Library {
            return self.window.finish(&self.tokenizer, self.skip_special);
        }
        self.utf8.finish()
    }

    /// How many bytes of an incomplete character are waiting.
    pub fn pending_bytes(&self) -> usize {
        self.utf8.pending.len()
    }
}

impl Window {
    /// Ids kept as context for the next decode.
    const CONTEXT: usize = 4;

    fn push(&mut self, tokenizer: &Tokenizer, id: u32, skip_special: bool) -> String {
        self.ids.push(id);
        self.take(tokenizer, skip_special, false)
    }

    fn finish(&mut self, tokenizer: &Tokenizer, skip_special: bool) -> String {
        self.take(tokenizer, skip_special, true)
    }

    fn take(&mut self, tokenizer: &Tokenizer, skip_special: bool, end: bool) -> String {
        let before = tokenizer.decode(&self.ids[..self.sent], skip_special);
        let after = tokenizer.decode(&self.ids, skip_special);
        let Some(new) = after.strip_prefix(before.as_str()) else { return String::new() };
        if new.is_empty() || (new.ends_with('\u{FFFD}') && !end) {
            return String::new();
        }
        let new = new.to_owned();
        self.sent = self.ids.len();
        if self.sent > 2 * Self::CONTEXT {
            self.ids.drain(..self.sent - Self::CONTEXT);
            self.sent = Self::CONTEXT;
        }
        new
    }
}

/// Bytes to text, where a character may come in pieces. The result over all calls equals
/// `String::from_utf8_lossy` of all bytes.
#[derive(Debug, Default, Clone)]
pub(crate) struct Utf8Buffer {
    pending: Vec<u8>,
}

impl Utf8Buffer {
    /// Adds bytes and returns the text that is certain now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(bad) = error.error_len() else { break };
                    text.push('\u{FFFD}');
                    rest = &rest[bad..];
                }
            }
        }
        let keep = rest.len();
        self.pending.drain(..self.pending.len() - keep);
        text
    }

    /// The end: an incomplete character becomes one U+FFFD.
    pub(crate) fn finish(&mut self) -> String {
        let text = if self.pending.is_empty() { String::new() } else { '\u{FFFD}'.to_string() };
        self.pending.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]
        #[test]
        fn any_cut_of_any_bytes_equals_the_lossy_whole(
            chunks in proptest::collection::vec(prop_oneof![
                2 => proptest::collection::vec(any::<u8>(), 0..5),
                3 => any::<char>().prop_map(|c| c.to_string().into_bytes()),
                1 => any::<char>().prop_map(|c| c.to_string().into_bytes()[..1].to_vec()),
                1 => Just("😀".as_bytes()[1..].to_vec()),
            ], 0..12),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let bytes = chunks.concat();
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).chain([0, bytes.len()]).collect();
            at.sort_unstable();
            let mut buffer = Utf8Buffer::default();
            let mut text = String::new();
            for pair in at.windows(2) {
                text.push_str(&buffer.push(&bytes[pair[0]..pair[1]]));
                prop_assert!(buffer.pending.len() <= 3);
            }
            text.push_str(&buffer.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }
    }

    #[test]
    fn a_lone_continuation_byte_comes_out_at_once() {
        let mut buffer = Utf8Buffer::default();
        assert_eq!(buffer.push(&[0x80]), "\u{FFFD}");
        assert_eq!(buffer.push(&[0xF0, 0x9F]), "");
        assert_eq!(buffer.push(b"a"), "\u{FFFD}a");
        assert_eq!(buffer.push(&[0xE2, 0x82]), "");
        assert_eq!(buffer.finish(), "\u{FFFD}");
        assert_eq!(buffer.finish(), "");
    }
}
