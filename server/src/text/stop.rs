//! Finding stop strings in text that arrives in pieces.
//!
//! [`StopMatcher::push`] takes a piece and says what may be sent on. It never lets out a character that belongs to a
//! stop string, and holds back nothing else: what stays inside is the longest end of the text so far that is a
//! proper beginning of some stop string. The result does not depend on where the pieces are cut.
//!
//! When several stop strings match, the one that is complete first wins; of those that end at the same character,
//! the longest, which starts leftmost.

/// What [`StopMatcher::push`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that can be sent on now.
    pub emit: String,
    /// A stop string was found; `emit` ends just before it, and nothing more comes.
    pub stopped: bool,
    /// Which stop string it was, as an index into the list given to [`StopMatcher::new`].
    pub stop_index: Option<usize>,
}

/// An Aho-Corasick automaton over the bytes of the stop strings, and the text it holds back.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    nodes: Vec<Node>,
    node: usize,
    held: String,
    stopped: bool,
}

#[derive(Debug, Clone, Default)]
struct Node {
    /// Children by byte, sorted.
    next: Vec<(u8, usize)>,
    /// The node of the longest proper suffix.
    fail: usize,
    /// How many bytes lead here: the length of the text to hold back.
    depth: usize,
    /// The longest stop string that ends here: its length and index.
    found: Option<(usize, usize)>,
}

impl StopMatcher {
    /// A matcher for these stop strings. Empty strings are ignored: they would match everywhere.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let mut nodes = vec![Node::default()];
        for (index, stop) in stops.iter().enumerate() {
            let stop = stop.as_ref().as_bytes();
            if stop.is_empty() {
                continue;
            }
            let mut at = 0;
            for &byte in stop {
                at = match child(&nodes, at, byte) {
                    Some(next) => next,
                    None => {
                        let depth = nodes[at].depth + 1;
                        nodes.push(Node { depth, ..Node::default() });
                        let new = nodes.len() - 1;
                        let slot = nodes[at].next.partition_point(|(b, _)| *b < byte);
                        nodes[at].next.insert(slot, (byte, new));
                        new
                    }
                };
            }
            nodes[at].found.get_or_insert((stop.len(), index));
        }
        // Breadth first, so that the shorter suffix is always done.
        let mut queue: std::collections::VecDeque<usize> = nodes[0].next.iter().map(|(_, n)| *n).collect();
        while let Some(at) = queue.pop_front() {
            let suffix = nodes[at].fail;
            if nodes[at].found.is_none() {
                nodes[at].found = nodes[suffix].found;
            }
            for (byte, next) in nodes[at].next.clone() {
                nodes[next].fail = step(&nodes, suffix, byte);
                queue.push_back(next);
            }
        }
        Self { nodes, node: 0, held: String::new(), stopped: false }
    }

    /// Whether there is anything to look for.
    pub fn is_empty(&self) -> bool {
        self.nodes.len() == 1
    }

    /// Takes the next piece of text. After a stop string was found, nothing more comes out.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome { stopped: true, ..StopOutcome::default() };
        }
        if self.is_empty() {
            return StopOutcome { emit: text.to_owned(), ..StopOutcome::default() };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (offset, &byte) in text.as_bytes().iter().enumerate() {
            self.node = step(&self.nodes, self.node, byte);
            if let Some((len, index)) = self.nodes[self.node].found {
                // The match lies inside what is held plus this piece: all of it was a proper beginning until now.
                let start = (before + offset + 1).saturating_sub(len);
                self.stopped = true;
                let mut emit = std::mem::take(&mut self.held);
                emit.truncate(start);
                return StopOutcome { emit, stopped: true, stop_index: Some(index) };
            }
        }
        // A held suffix equals the beginning of a stop string, so it starts at a character, never inside one.
        let keep_from = self.held.len() - self.nodes[self.node].depth;
        let held = self.held.split_off(keep_from);
        StopOutcome { emit: std::mem::replace(&mut self.held, held), ..StopOutcome::default() }
    }

    /// The end of the text: what was held back and did not become a stop string.
    pub fn finish(&mut self) -> String {
        self.node = 0;
        if self.stopped { String::new() } else { std::mem::take(&mut self.held) }
    }

    /// The text that is held back now.
    pub fn held(&self) -> &str {
        &self.held
    }
}

fn child(nodes: &[Node], at: usize, byte: u8) -> Option<usize> {
    let next = &nodes[at].next;
    next.binary_search_by_key(&byte, |(b, _)| *b).ok().map(|i| next[i].1)
}

fn step(nodes: &[Node], mut at: usize, byte: u8) -> usize {
    loop {
        if let Some(next) = child(nodes, at, byte) {
            return next;
        }
        if at == 0 {
            return 0;
        }
        at = nodes[at].fail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same by trying everything: the first end at which some stop string is complete.
    fn naive(text: &str, stops: &[String]) -> (String, bool) {
        for end in 1..=text.len() {
            let longest = stops
                .iter()
                .filter(|s| !s.is_empty() && text.as_bytes()[..end].ends_with(s.as_bytes()))
                .max_by_key(|s| s.len());
            if let Some(stop) = longest {
                return (text[..end - stop.len()].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn naive_held<'t>(text: &'t str, stops: &[String]) -> &'t str {
        for (start, _) in text.char_indices() {
            let suffix = &text[start..];
            if stops.iter().any(|s| s.len() > suffix.len() && s.starts_with(suffix)) {
                return suffix;
            }
        }
        ""
    }

    fn words() -> impl Strategy<Value = String> {
        proptest::collection::vec(
            proptest::sample::select(vec!["a", "b", "ab", "é", "日", "😀", "\n"]),
            0..14,
        )
        .prop_map(|v| v.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]
        #[test]
        fn equals_the_naive_search_for_any_cut(
            text in words(),
            stops in proptest::collection::vec(words(), 0..4),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..5),
        ) {
            let mut borders: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
            let mut at: Vec<usize> = cuts.iter().map(|c| borders[c.index(borders.len())]).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            borders.clear();
            let mut matcher = StopMatcher::new(&stops);
            let (want, want_stopped) = naive(&text, &stops);
            let (mut got, mut stopped) = (String::new(), false);
            for pair in at.windows(2) {
                let out = matcher.push(&text[pair[0]..pair[1]]);
                got.push_str(&out.emit);
                if !stopped && !out.stopped {
                    // Exactly what could still become a stop string is held, no more and no less.
                    prop_assert_eq!(matcher.held(), naive_held(&text[..pair[1]], &stops));
                }
                if stopped {
                    prop_assert!(out.emit.is_empty());
                }
                stopped |= out.stopped;
                prop_assert!(want.starts_with(&got), "leaked: {got:?} for {want:?}");
            }
            got.push_str(&matcher.finish());
            prop_assert_eq!((got, stopped), (want, want_stopped));
        }
    }

    #[test]
    fn names_the_stop_string_and_cuts_at_the_first_of_two() {
        let mut matcher = StopMatcher::new(&["END", "STOP"]);
        let out = matcher.push("one STOP two STOP END");
        assert_eq!(out, StopOutcome { emit: "one ".into(), stopped: true, stop_index: Some(1) });
        assert_eq!(matcher.push("more"), StopOutcome { stopped: true, ..StopOutcome::default() });
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn a_prefix_that_did_not_become_a_stop_string_comes_out_at_the_end() {
        let mut matcher = StopMatcher::new(&["</s>"]);
        assert_eq!(matcher.push("x </").emit, "x ");
        assert_eq!(matcher.finish(), "</");
    }

    #[test]
    fn empty_stop_strings_match_nothing() {
        let mut matcher = StopMatcher::new(&[""]);
        assert!(matcher.is_empty());
        assert_eq!(matcher.push("text").emit, "text");
    }
}
