//! Linear splitters for the three patterns that most byte-level tokenizers use (GPT-2, Llama 3, Qwen).
//!
//! The tokenizer library runs these patterns on a backtracking engine that gives up after a million steps and then
//! silently stops splitting: a megabyte of spaces would get wrong token ids. The functions here look at each
//! character a bounded number of times and return exactly what the pattern would.
//! They only find the borders; turning a piece into tokens stays with the tokenizer's own model.

use std::sync::LazyLock;

/// How the apostrophe endings (`'s`, `'re`, ...) are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contractions {
    /// Lower case only.
    Exact,
    /// ASCII letters in either case.
    AsciiFold,
    /// Unicode simple case folding: either case, and U+017F, which folds to `s`.
    UnicodeFold,
}

/// A family of split patterns with a linear implementation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Splitter {
    /// The pattern built into `ByteLevel`.
    Gpt2,
    /// The Llama 3 pattern and its relatives.
    Llama3 {
        /// How apostrophe endings are compared.
        contractions: Contractions,
        /// The longest run of digits in one piece: 3 for Llama 3, 1 for Qwen 2.
        max_digits: usize,
        /// Whether combining marks count as letters (newer Qwen models).
        marks: bool,
    },
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const FOLDED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const SPELT_OUT: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";
const WORDS: &str = r"|[^\r\n\p{L}\p{N}]?\p{L}+|";
const WORDS_AND_MARKS: &str = r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|";
const REST: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const REST_AND_MARKS: &str = r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Splitter {
    /// The splitter for a pattern, if it is one of the known ones, letter for letter.
    pub(crate) fn for_pattern(pattern: &str) -> Option<Self> {
        if pattern == GPT2 {
            return Some(Self::Gpt2);
        }
        for (head, contractions) in
            [(FOLDED, Contractions::UnicodeFold), (SPELT_OUT, Contractions::AsciiFold)]
        {
            for (digits, max_digits) in [(r"\p{N}{1,3}", 3), (r"\p{N}", 1)] {
                for (words, rest, marks) in [(WORDS, REST, false), (WORDS_AND_MARKS, REST_AND_MARKS, true)] {
                    if pattern.len() == head.len() + words.len() + digits.len() + rest.len()
                        && pattern == format!("{head}{words}{digits}{rest}")
                    {
                        return Some(Self::Llama3 { contractions, max_digits, marks });
                    }
                }
            }
        }
        None
    }

    /// Calls `piece` with the byte range of each piece of `text`, in order and without gaps.
    pub(crate) fn split(self, text: &str, mut piece: impl FnMut(usize, usize)) {
        let mut start = 0;
        while start < text.len() {
            let rest = &text[start..];
            let len = match self {
                Self::Gpt2 => gpt2_piece(rest),
                Self::Llama3 { contractions, max_digits, marks } => {
                    llama3_piece(rest, contractions, max_digits, marks)
                }
            };
            // Every branch takes at least one character; `max` keeps the loop finite should that ever be broken.
            let len = len.max(rest.chars().next().map_or(1, char::len_utf8));
            piece(start, start + len);
            start += len;
        }
    }
}

/// The length in bytes of the first piece of `rest`, which is not empty.
fn gpt2_piece(rest: &str) -> usize {
    let mut chars = rest.chars();
    let Some(first) = chars.next() else { return 0 };
    if first == '\''
        && let Some(len) = contraction(rest, Contractions::Exact)
    {
        return len;
    }
    // A single space sticks to what follows it, whatever class that is.
    let (lead, head) = match chars.next() {
        Some(second) if first == ' ' && !is(second, SPACE) => (1, second),
        _ => (0, first),
    };
    if is(head, SPACE) {
        return whitespace(rest);
    }
    let class = class_of(head) & (LETTER | NUMBER);
    lead + run(&rest[lead..], |c| is_word_class(c, class))
}

/// The length in bytes of the first piece of `rest`, which is not empty.
fn llama3_piece(rest: &str, contractions: Contractions, max_digits: usize, marks: bool) -> usize {
    let letter = if marks { LETTER | MARK } else { LETTER };
    let mut chars = rest.chars();
    let Some(first) = chars.next() else { return 0 };
    if first == '\''
        && let Some(len) = contraction(rest, contractions)
    {
        return len;
    }
    // Letters, with at most one character in front that is neither a line break, a letter nor a digit.
    let second = chars.next();
    if !is(first, LETTER | NUMBER) && !matches!(first, '\r' | '\n') && second.is_some_and(|c| is(c, letter)) {
        return first.len_utf8() + run(&rest[first.len_utf8()..], |c| is(c, letter));
    }
    if is(first, letter) {
        return run(rest, |c| is(c, letter));
    }
    if is(first, NUMBER) {
        return rest.chars().take(max_digits).take_while(|&c| is(c, NUMBER)).map(char::len_utf8).sum();
    }
    // Punctuation and symbols, with one space in front and the line breaks behind.
    let other = |c: char| !is(c, SPACE | NUMBER | letter);
    let lead = usize::from(first == ' ' && second.is_some_and(other));
    if lead == 1 || other(first) {
        let symbols = lead + run(&rest[lead..], other);
        return symbols + run(&rest[symbols..], |c| matches!(c, '\r' | '\n'));
    }
    // White space up to and with its last line break.
    let blank = run(rest, |c| is(c, SPACE));
    if let Some(last_break) = rest[..blank].rfind(['\r', '\n']) {
        return last_break + 1;
    }
    whitespace(rest)
}

/// White space at the start of `rest`: all of it at the end of the text, otherwise all but the last character,
/// which goes with what follows; a single one is a piece of its own.
fn whitespace(rest: &str) -> usize {
    let len = run(rest, |c| is(c, SPACE));
    if len == rest.len() {
        return len;
    }
    let last = rest[..len].chars().next_back().map_or(0, char::len_utf8);
    if len > last { len - last } else { len }
}

/// The length in bytes of an apostrophe ending at the start of `rest`.
fn contraction(rest: &str, mode: Contractions) -> Option<usize> {
    let fold = |c: char| match mode {
        Contractions::Exact => c,
        Contractions::AsciiFold => c.to_ascii_lowercase(),
        Contractions::UnicodeFold if c == '\u{17F}' => 's',
        Contractions::UnicodeFold => c.to_ascii_lowercase(),
    };
    let mut chars = rest.chars().skip(1);
    let first = chars.next()?;
    match fold(first) {
        's' | 't' | 'm' | 'd' => Some(1 + first.len_utf8()),
        'r' | 'v' => (fold(chars.next()?) == 'e').then_some(3),
        'l' => (fold(chars.next()?) == 'l').then_some(3),
        _ => None,
    }
}

fn run(text: &str, keep: impl Fn(char) -> bool) -> usize {
    text.find(|c| !keep(c)).unwrap_or(text.len())
}

/// Whether `c` is of the letter or number class `class`; class 0 means neither, and not white space.
fn is_word_class(c: char, class: u8) -> bool {
    let of = class_of(c);
    if class == 0 { of & (LETTER | NUMBER | SPACE) == 0 } else { of & class != 0 }
}

const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 4;
const MARK: u8 = 8;

fn is(c: char, mask: u8) -> bool {
    class_of(c) & mask != 0
}

fn class_of(c: char) -> u8 {
    let code = c as usize;
    let table = &*CLASSES;
    table.blocks[usize::from(table.index[code >> 8])][code & 0xFF]
}

/// Classes of all characters: 256 to a block, equal blocks stored once.
struct Classes {
    index: Vec<u16>,
    blocks: Vec<[u8; 256]>,
}

/// Built from the tables of the regex library, so that "letter" means the same here as in the pattern.
static CLASSES: LazyLock<Classes> = LazyLock::new(|| {
    let mut flat = vec![0_u8; 0x11_0000];
    for (pattern, flag) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"\p{M}", MARK)] {
        let hir = regex_syntax::parse(pattern).expect("a constant pattern");
        if let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(class)) = hir.kind() {
            for range in class.ranges() {
                flat[range.start() as usize..=range.end() as usize].iter_mut().for_each(|f| *f |= flag);
            }
        }
    }
    let mut blocks: Vec<[u8; 256]> = Vec::new();
    let mut known = std::collections::HashMap::new();
    let index = flat
        .chunks_exact(256)
        .map(|chunk| {
            let mut block = [0_u8; 256];
            block.copy_from_slice(chunk);
            *known.entry(block).or_insert_with(|| {
                blocks.push(block);
                u16::try_from(blocks.len() - 1).expect("at most 4352 blocks")
            })
        })
        .collect();
    Classes { index, blocks }
});

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const SPELT: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN_MARKS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const ALL: [&str; 5] = [GPT2, LLAMA3, QWEN2, SPELT, QWEN_MARKS];

    fn ours(pattern: &str, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        Splitter::for_pattern(pattern)
            .expect("a known pattern")
            .split(text, |a, b| pieces.push(text[a..b].to_owned()));
        pieces
    }

    fn reference(pattern: &str, text: &str) -> Vec<String> {
        static REGEXES: LazyLock<Vec<fancy_regex::Regex>> =
            LazyLock::new(|| ALL.iter().map(|p| fancy_regex::Regex::new(p).expect("valid")).collect());
        let regex = &REGEXES[ALL.iter().position(|p| *p == pattern).expect("one of them")];
        let mut pieces = Vec::new();
        let mut end = 0;
        for found in regex.find_iter(text) {
            let found = found.expect("no limit hit");
            if found.start() > end {
                pieces.push(text[end..found.start()].to_owned());
            }
            pieces.push(found.as_str().to_owned());
            end = found.end();
        }
        assert_eq!(end, text.len(), "the reference covers the text");
        pieces
    }

    #[test]
    fn unknown_patterns_are_not_claimed() {
        assert_eq!(Splitter::for_pattern(r"\s+"), None);
        assert_eq!(Splitter::for_pattern(&GPT2.replace("'d", "'x")), None);
    }

    /// Text made of the characters that decide between the branches, in any order.
    fn tricky() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            4 => proptest::sample::select(vec![
                " ", "  ", "\n", "\r", "\r\n", "\t", "'", "'s", "'S", "'\u{17F}", "'re", "'RE", "'vE", "'ll", "'lL",
                "'d", "'x", "a", "Z", "é", "中", "ß", "1", "22", "٣", "½", "Ⅷ", ".", "!?", "^", "_", "\u{200D}",
                "\u{301}", "e\u{301}", "\u{A0}", "\u{2003}", "\u{3000}", "\u{85}", "😀", "\u{1F468}\u{200D}\u{1F469}",
                "ก็", "हिन्दी", "\u{0}", "\u{FFFD}", "\u{10FFFF}",
            ]).prop_map(str::to_owned),
            1 => any::<char>().prop_map(String::from),
        ];
        proptest::collection::vec(piece, 0..40).prop_map(|p| p.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn equals_the_pattern(text in tricky()) {
            for pattern in ALL {
                prop_assert_eq!(ours(pattern, &text), reference(pattern, &text));
            }
        }
    }

    #[test]
    fn every_single_character_and_pair_with_space() {
        for pattern in ALL {
            let regex = fancy_regex::Regex::new(pattern).expect("valid");
            for c in (0..0x11_0000).step_by(7).filter_map(char::from_u32) {
                let text = format!("a{c} {c}1");
                let want: Vec<_> = regex.find_iter(&text).map(|m| m.expect("no limit").as_str()).collect();
                assert_eq!(ours(pattern, &text), want, "{c:?}");
            }
        }
    }

    #[test]
    fn large_monotone_texts_are_split_at_once() {
        let start = std::time::Instant::now();
        for unit in ["a", " ", "^", "\u{200D}", "\u{301}", "\n", " \n", "'s", "1", "a "] {
            let text = unit.repeat(600 * 1024 / unit.len());
            for pattern in ALL {
                let mut end = 0;
                Splitter::for_pattern(pattern).expect("known").split(&text, |a, b| {
                    assert_eq!(a, end);
                    end = b;
                });
                assert_eq!(end, text.len());
            }
        }
        // 50 passes over 600 KB; a quadratic splitter would need hours.
        assert!(start.elapsed().as_secs() < 20, "took {:?}", start.elapsed());
    }

    #[test]
    fn six_hundred_kilobytes_equal_the_pattern() {
        for unit in ["a", " ", "^", "\u{200D}", "\u{301}", "a b"] {
            let text = format!("{}x", unit.repeat(600 * 1024 / unit.len()));
            for pattern in [GPT2, LLAMA3, QWEN2] {
                assert_eq!(ours(pattern, &text), reference(pattern, &text), "{unit:?}");
            }
        }
    }
}
