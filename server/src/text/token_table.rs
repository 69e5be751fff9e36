//! The bytes each token stands for, worked out once.
//!
//! Streaming needs the text of a token without looking at its neighbours. For byte-level and for SentencePiece-like
//! tokenizers that is possible: a token is a fixed string of bytes, and the text of many tokens is their bytes one
//! after another. Other decoders (WordPiece and the like) have no such table; [`DecodeKind::Library`] says so.

use serde_json::Value;

/// How the bytes of tokens become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DecodeKind {
    /// The bytes, one after another.
    Bytes {
        /// What is taken away at the very beginning of a text.
        lead: Lead,
    },
    /// Only the tokenizer library knows.
    Library,
}

/// What a decoder removes at the beginning of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lead {
    /// Nothing.
    Keep,
    /// One space, wherever it comes from.
    OneSpace,
    /// All spaces of the first token.
    SpacesOfFirstToken,
}

/// Which character of a token string stands for which bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    /// Printable stand-ins for all 256 bytes (GPT-2).
    ByteLevel,
    /// One character stands for a space; `<0x0A>` stands for a byte if `bytes` is set.
    Spaced { space: char, bytes: bool },
}

/// Bytes of all tokens, by id.
#[derive(Debug, Clone)]
pub(crate) struct TokenTable {
    kind: DecodeKind,
    blob: Vec<u8>,
    /// `ends[id]` is where the bytes of token `id` end in `blob`; they begin where those of `id - 1` end.
    ends: Vec<u32>,
    /// One bit per id: the token is special.
    special: Vec<u64>,
}

impl TokenTable {
    /// Reads the decoder section of `tokenizer.json`; `tokens` gives the string of each id (`None` for a hole) and
    /// whether it is special.
    pub(crate) fn new(decoder: &Value, tokens: impl Iterator<Item = Option<(String, bool)>>) -> Self {
        let (alphabet, kind) = match read_decoder(decoder) {
            Some((alphabet, lead)) => (Some(alphabet), DecodeKind::Bytes { lead }),
            None => (None, DecodeKind::Library),
        };
        let mut table = Self { kind, blob: Vec::new(), ends: Vec::new(), special: Vec::new() };
        for (id, token) in tokens.enumerate() {
            if id % 64 == 0 {
                table.special.push(0);
            }
            if let Some((text, special)) = token {
                match alphabet {
                    Some(alphabet) => push_bytes(alphabet, &text, &mut table.blob),
                    None => table.blob.extend_from_slice(text.as_bytes()),
                }
                table.special[id / 64] |= u64::from(special) << (id % 64);
            }
            // The pre-check bounds the size of the file, so this fits; saturating keeps it from wrapping if not.
            table.ends.push(u32::try_from(table.blob.len()).unwrap_or(u32::MAX));
        }
        table.blob.shrink_to_fit();
        table
    }

    /// How tokens become text.
    pub(crate) fn kind(&self) -> DecodeKind {
        self.kind
    }

    /// Number of ids, holes included.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token; empty for an id that does not exist.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        self.blob.get(start as usize..end as usize).unwrap_or(&[])
    }

    /// Whether the token is special.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        let id = id as usize;
        id < self.len() && self.special[id / 64] >> (id % 64) & 1 == 1
    }
}

/// Recognises the decoders whose tokens are fixed byte strings.
fn read_decoder(decoder: &Value) -> Option<(Alphabet, Lead)> {
    match decoder["type"].as_str()? {
        "ByteLevel" => Some((Alphabet::ByteLevel, Lead::Keep)),
        "Metaspace" => {
            let space = decoder["replacement"].as_str().unwrap_or("\u{2581}").chars().next()?;
            // Old files say `add_prefix_space`, newer ones `prepend_scheme`.
            let never = match decoder["prepend_scheme"].as_str() {
                Some(scheme) => scheme == "never",
                None => decoder["add_prefix_space"].as_bool() == Some(false),
            };
            let lead = if never { Lead::Keep } else { Lead::SpacesOfFirstToken };
            Some((Alphabet::Spaced { space, bytes: false }, lead))
        }
        "Sequence" => read_sequence(decoder["decoders"].as_array()?),
        _ => None,
    }
}

/// `Replace(x -> " ")`, `ByteFallback`, `Fuse` and then perhaps `Strip` of one leading space, in this order.
fn read_sequence(decoders: &[Value]) -> Option<(Alphabet, Lead)> {
    if let [only] = decoders {
        return read_decoder(only);
    }
    let mut decoders = decoders.iter().peekable();
    let replace = decoders.next_if(|d| d["type"] == "Replace")?;
    let mut from = replace["pattern"]["String"].as_str()?.chars();
    let space = from.next()?;
    if from.next().is_some() || replace["content"] != " " {
        return None;
    }
    let bytes = decoders.next_if(|d| d["type"] == "ByteFallback").is_some();
    decoders.next_if(|d| d["type"] == "Fuse")?;
    let lead = match decoders.next() {
        None => Lead::Keep,
        Some(strip)
            if strip["type"] == "Strip"
                && strip["content"] == " "
                && strip["start"] == 1
                && strip["stop"] == 0
                && decoders.next().is_none() =>
        {
            Lead::OneSpace
        }
        Some(_) => return None,
    };
    Some((Alphabet::Spaced { space, bytes }, lead))
}

fn push_bytes(alphabet: Alphabet, token: &str, out: &mut Vec<u8>) {
    match alphabet {
        Alphabet::ByteLevel => {
            let start = out.len();
            for c in token.chars() {
                match byte_of(c) {
                    Some(byte) => out.push(byte),
                    None => {
                        // A token with a character outside the alphabet is taken as it is written.
                        out.truncate(start);
                        out.extend_from_slice(token.as_bytes());
                        return;
                    }
                }
            }
        }
        Alphabet::Spaced { bytes: true, .. } if fallback_byte(token).is_some() => {
            out.extend(fallback_byte(token));
        }
        Alphabet::Spaced { space, .. } => {
            let mut utf8 = [0; 4];
            for c in token.chars() {
                let c = if c == space { ' ' } else { c };
                out.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
            }
        }
    }
}

/// The byte that a `<0x0A>` token stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// Whether a byte stands for itself in the GPT-2 alphabet.
fn printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character that stands for each byte in the GPT-2 alphabet: the byte itself if it is printable, otherwise the
/// next free code point from 256 on.
pub(crate) fn byte_chars() -> &'static [char; 256] {
    static CHARS: std::sync::LazyLock<[char; 256]> = std::sync::LazyLock::new(|| {
        let mut spare = 256_u32;
        std::array::from_fn(|byte| {
            let byte = byte as u8;
            if printable(byte) {
                return char::from(byte);
            }
            spare += 1;
            char::from_u32(spare - 1).expect("below 512")
        })
    });
    &CHARS
}

fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    if code < 256 {
        let byte = code as u8;
        return printable(byte).then_some(byte);
    }
    // The bytes without a character of their own, in order: 0..=32, 127..=160, 173.
    match code - 256 {
        n @ 0..=32 => Some(n as u8),
        n @ 33..=66 => Some((n - 33 + 127) as u8),
        67 => Some(173),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        for byte in 0..=255_u8 {
            assert_eq!(byte_of(byte_chars()[usize::from(byte)]), Some(byte));
        }
        assert_eq!(byte_chars()[usize::from(b' ')], 'Ġ');
        assert_eq!(byte_chars()[usize::from(b'\n')], 'Ċ');
        assert_eq!(byte_of(' '), None);
    }

    #[test]
    fn sentencepiece_tokens_are_bytes() {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let tokens = ["▁a▁b", "<0xE2>", "<s>", "<0xZZ>"].map(|t| Some((t.to_owned(), t == "<s>")));
        let table = TokenTable::new(&decoder, tokens.into_iter());
        assert_eq!(table.kind(), DecodeKind::Bytes { lead: Lead::OneSpace });
        assert_eq!(table.bytes(0), b" a b");
        assert_eq!(table.bytes(1), [0xE2]);
        assert_eq!(table.bytes(3), b"<0xZZ>");
        assert!(table.is_special(2) && !table.is_special(0) && !table.is_special(64));
        assert_eq!(table.bytes(4), b"");
    }

    #[test]
    fn other_decoders_are_left_to_the_library() {
        for decoder in [json!({"type": "WordPiece", "prefix": "##"}), Value::Null] {
            let table = TokenTable::new(&decoder, std::iter::empty());
            assert_eq!(table.kind(), DecodeKind::Library);
        }
    }
}
