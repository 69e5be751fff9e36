//! What a model's post processor puts around a text, and around and between two texts.
//!
//! Found once by asking the tokenizer library about texts of one token each, so that encoding is a copy and truncation
//! can leave the special tokens whole. Truncation is that of the library: the end of a text goes; of a pair, first the
//! end of the longer one ("longest first").

use tokenizers::{Encoding, Token};

use crate::text::TextError;

/// Ids that no file can name: ids are checked to be below 2^22.
const PROBES: [u32; 2] = [u32::MAX, u32::MAX - 1];

/// A run of special tokens with their segments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Run {
    ids: Vec<u32>,
    types: Vec<u8>,
}

/// Special tokens around a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frame {
    /// Before and after the text.
    single: [Run; 2],
    /// Before, between and after two texts, and the segment of each; `None`: the post processor takes no pairs.
    pair: Option<([Run; 3], [u8; 2])>,
}

/// A framed text or pair.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Framed {
    /// Token ids, special ones included.
    pub ids: Vec<u32>,
    /// Segment of each token; empty where all are 0.
    pub types: Vec<u8>,
    /// Tokens that were left out.
    pub dropped: usize,
}

/// Which end of a text is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Side {
    /// The beginning is kept.
    #[default]
    Right,
    /// The end is kept.
    Left,
}

impl Frame {
    /// Asks `inner`.
    ///
    /// # Errors
    /// If the post processor fails on a text or does not keep it exactly once.
    pub(crate) fn of(inner: &tokenizers::Tokenizer) -> Result<Self, TextError> {
        let probe = |id: u32| Encoding::from_tokens(vec![Token::new(id, String::new(), (0, 0))], 0);
        let around = inner
            .post_process(probe(PROBES[0]), None, true)
            .map_err(|e| TextError::Load(format!("the post processor does not work: {e}")))?;
        let (runs, _) = cut(&around, 1).ok_or_else(|| {
            TextError::Load("the post processor does not keep the text exactly once".into())
        })?;
        let mut runs = runs.into_iter();
        let single = [runs.next().unwrap_or_default(), runs.next().unwrap_or_default()];
        // The second text is of segment 1 until the post processor says otherwise, as in the library.
        let mut second = probe(PROBES[1]);
        second.set_type_ids(vec![1]);
        let pair = inner.post_process(probe(PROBES[0]), Some(second), true).ok().and_then(|around| {
            let (runs, types) = cut(&around, 2)?;
            let mut runs = runs.into_iter();
            let mut next = || runs.next().unwrap_or_default();
            Some(([next(), next(), next()], [*types.first()?, *types.get(1)?]))
        });
        Ok(Self { single, pair })
    }

    /// The ids before and after a text.
    pub(crate) fn around(&self) -> (&[u32], &[u32]) {
        let [before, after] = &self.single;
        (&before.ids, &after.ids)
    }

    /// Whether pairs can be framed.
    #[must_use]
    pub fn takes_pairs(&self) -> bool {
        self.pair.is_some()
    }

    /// Special tokens of a text.
    #[must_use]
    pub fn num_special(&self) -> usize {
        self.single.iter().map(|run| run.ids.len()).sum()
    }

    /// Special tokens of a pair.
    #[must_use]
    pub fn num_special_pair(&self) -> usize {
        self.pair.iter().flat_map(|(runs, _)| runs).map(|run| run.ids.len()).sum()
    }

    /// `text` with its special tokens, cut to `max` tokens in all.
    #[must_use]
    pub fn text(&self, text: &[u32], max: usize, side: Side) -> Framed {
        let [before, after] = &self.single;
        let room = max.saturating_sub(self.num_special());
        let kept = keep(text, room, side);
        let mut out = Framed { dropped: text.len() - kept.len(), ..Framed::default() };
        out.push(&before.ids, &before.types);
        out.push(kept, &vec![0; kept.len()]);
        out.push(&after.ids, &after.types);
        out.tidy()
    }

    /// The pair of `first` and `second` with its special tokens, cut to `max` tokens in all.
    ///
    /// # Errors
    /// If the post processor takes no pairs.
    pub fn pair(&self, first: &[u32], second: &[u32], max: usize, side: Side) -> Result<Framed, TextError> {
        let Some(([before, between, after], types)) = &self.pair else {
            return Err(TextError::Invalid("this model's tokenizer takes no pairs of texts".into()));
        };
        let room = max.saturating_sub(self.num_special_pair());
        let (a, b) = longest_first(first.len(), second.len(), room);
        let (a, b) = (keep(first, a, side), keep(second, b, side));
        let mut out = Framed { dropped: first.len() + second.len() - a.len() - b.len(), ..Framed::default() };
        out.push(&before.ids, &before.types);
        out.push(a, &vec![types[0]; a.len()]);
        out.push(&between.ids, &between.types);
        out.push(b, &vec![types[1]; b.len()]);
        out.push(&after.ids, &after.types);
        Ok(out.tidy())
    }
}

impl Framed {
    fn push(&mut self, ids: &[u32], types: &[u8]) {
        self.ids.extend_from_slice(ids);
        self.types.extend_from_slice(types);
    }

    fn tidy(mut self) -> Self {
        if self.types.iter().all(|segment| *segment == 0) {
            self.types = Vec::new();
        }
        self
    }
}

fn keep(text: &[u32], room: usize, side: Side) -> &[u32] {
    let len = text.len().min(room);
    match side {
        Side::Right => &text[..len],
        Side::Left => &text[text.len() - len..],
    }
}

/// Lengths that two texts are cut to, so that they fit `room` together.
fn longest_first(a: usize, b: usize, room: usize) -> (usize, usize) {
    if a.saturating_add(b) <= room {
        return (a, b);
    }
    let (short, long) = (a.min(b), a.max(b));
    let half = room / 2;
    // Only the longer one is cut, to no less than the shorter; if that is not enough both have about half.
    let (short, long) = if short <= half { (short, long.min(room - short)) } else { (half, room - half) };
    if a <= b { (short, long) } else { (long, short) }
}

/// The runs before, between and after the probes, and the probes' segments; `None` if they are not each there once, in
/// order.
fn cut(around: &Encoding, num_probes: usize) -> Option<(Vec<Run>, Vec<u8>)> {
    let mut runs = vec![Run::default()];
    let mut types = Vec::new();
    for (id, segment) in around.get_ids().iter().zip(around.get_type_ids()) {
        let segment = u8::try_from(*segment).ok()?;
        if PROBES.contains(id) {
            if PROBES.get(types.len()) != Some(id) {
                return None;
            }
            types.push(segment);
            runs.push(Run::default());
        } else if let Some(run) = runs.last_mut() {
            run.ids.push(*id);
            run.types.push(segment);
        }
    }
    (types.len() == num_probes).then_some((runs, types))
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
