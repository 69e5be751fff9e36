//! Who may compute next: weighted fair queueing between two classes, in turns within one.
//!
//! Each class has a virtual time that grows by the time it computes divided by its weight; the turn goes to the class
//! whose virtual time is lower. A class that comes back after a pause starts at the virtual time of those that went on,
//! so nobody saves up turns and nobody pays for turns that no one else wanted. No clock in here: [`Ledger::advance`] is
//! told the time.

use std::collections::VecDeque;
use std::time::Duration;

use super::ComputeStats;

/// What a party does with its turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ComputeClass {
    /// It generates: somebody reads the tokens as they come.
    Generate,
    /// It encodes: embeddings and scores.
    Encode,
}

impl ComputeClass {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Generate, Self::Encode];

    fn idx(self) -> usize {
        match self {
            Self::Generate => 0,
            Self::Encode => 1,
        }
    }
}

/// A generating step that takes longer than this is interrupted if encoders have the lower virtual time.
const GENERATE_QUANTUM: Duration = Duration::from_millis(10);
/// An encoder computes at least this long before it is interrupted: handing over costs some tens of microseconds.
const ENCODE_QUANTUM: Duration = Duration::from_millis(1);
/// Parties of one class take turns of this length.
const CLASS_QUANTUM: Duration = Duration::from_millis(10);

/// Number of a party.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PartyId(usize);

#[derive(Debug)]
struct Party {
    class: ComputeClass,
    busy: Duration,
}

#[derive(Debug, Default)]
struct Class {
    weight: f64,
    /// Seconds computed, divided by the weight.
    virtual_time: f64,
    /// Who waits, longest first.
    waiting: VecDeque<(PartyId, Duration)>,
    stats: ComputeStats,
}

#[derive(Debug, Clone, Copy)]
struct Hold {
    party: PartyId,
    since: Duration,
}

/// See the module's words.
#[derive(Debug)]
pub(super) struct Ledger {
    classes: [Class; 2],
    parties: Vec<Party>,
    hold: Option<Hold>,
    now: Duration,
    /// Where a class starts that had nothing to do.
    virtual_now: f64,
}

impl Ledger {
    pub(super) fn new(encode_share: f64) -> Self {
        let encode = if encode_share.is_finite() { encode_share.clamp(0.01, 0.99) } else { 0.5 };
        let class = |weight| Class {
            weight,
            stats: ComputeStats { share: weight, ..ComputeStats::default() },
            ..Class::default()
        };
        Self {
            classes: [class(1.0 - encode), class(encode)],
            parties: Vec::new(),
            hold: None,
            now: Duration::ZERO,
            virtual_now: 0.0,
        }
    }

    pub(super) fn join(&mut self, class: ComputeClass) -> PartyId {
        self.parties.push(Party { class, busy: Duration::ZERO });
        PartyId(self.parties.len() - 1)
    }

    pub(super) fn holder(&self) -> Option<PartyId> {
        self.hold.map(|hold| hold.party)
    }

    /// Whether anybody waits.
    pub(super) fn is_wanted(&self) -> bool {
        self.classes.iter().any(|class| !class.waiting.is_empty())
    }

    pub(super) fn stats(&self, class: ComputeClass) -> ComputeStats {
        self.classes[class.idx()].stats
    }

    pub(super) fn party_busy(&self, party: PartyId) -> Duration {
        self.parties[party.0].busy
    }

    /// Charges the time since the last call to whoever holds the turn. A clock that goes back stands still.
    pub(super) fn advance(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        let Some(hold) = self.hold else { return };
        let party = &mut self.parties[hold.party.0];
        party.busy += passed;
        let class = &mut self.classes[party.class.idx()];
        class.virtual_time += passed.as_secs_f64() / class.weight;
        class.stats.busy_seconds += passed.as_secs_f64();
        self.virtual_now = self.virtual_now.max(self.lowest_active());
    }

    /// `party` wants the turn: it has it at once if nobody else does, else it waits.
    pub(super) fn want(&mut self, party: PartyId) {
        let idx = self.parties[party.0].class.idx();
        if !self.is_active(idx) {
            let class = &mut self.classes[idx];
            class.virtual_time = class.virtual_time.max(self.virtual_now);
        }
        self.classes[idx].waiting.push_back((party, self.now));
        if self.hold.is_none() {
            self.grant();
        }
    }

    /// Gives the turn of its holder to another if that one should go first; the old holder then waits. `boundary`: the
    /// holder is between two steps, where stopping costs it least.
    pub(super) fn hand_over(&mut self, boundary: bool) -> bool {
        let Some(hold) = self.hold else { return false };
        let own = self.parties[hold.party.0].class;
        let held = self.now.saturating_sub(hold.since);
        let other = match own {
            ComputeClass::Generate => ComputeClass::Encode,
            ComputeClass::Encode => ComputeClass::Generate,
        };
        let quantum = match own {
            _ if boundary => Duration::ZERO,
            ComputeClass::Generate => GENERATE_QUANTUM,
            ComputeClass::Encode => ENCODE_QUANTUM,
        };
        let (mine, theirs) = (&self.classes[own.idx()], &self.classes[other.idx()]);
        let other_class =
            !theirs.waiting.is_empty() && theirs.virtual_time <= mine.virtual_time && held >= quantum;
        let same_class = !mine.waiting.is_empty() && held >= CLASS_QUANTUM;
        if !other_class && !same_class {
            return false;
        }
        let mine = &mut self.classes[own.idx()];
        mine.stats.handovers += 1;
        mine.waiting.push_back((hold.party, self.now));
        self.hold = None;
        self.grant_from(if other_class { other.idx() } else { own.idx() });
        true
    }

    /// `party` wants nothing more.
    pub(super) fn release(&mut self, party: PartyId) {
        if self.holder() == Some(party) {
            self.hold = None;
            self.grant();
        }
        let idx = self.parties[party.0].class.idx();
        self.classes[idx].waiting.retain(|(waiting, _)| *waiting != party);
        if self.hold.is_none() && !self.is_wanted() {
            // The next to come starts level with whoever computed most.
            self.virtual_now =
                self.classes.iter().fold(self.virtual_now, |v, class| v.max(class.virtual_time));
        }
    }

    /// Gives the free turn to the class with the lower virtual time; of two with the same, to the one that generates.
    fn grant(&mut self) {
        let first = |idx: usize| {
            let class = &self.classes[idx];
            (!class.waiting.is_empty()).then_some((class.virtual_time, idx))
        };
        let next = match (first(0), first(1)) {
            (Some(generate), Some(encode)) => Some(if encode.0 < generate.0 { encode } else { generate }),
            (one, two) => one.or(two),
        };
        if let Some((_, idx)) = next {
            self.grant_from(idx);
        }
    }

    fn grant_from(&mut self, idx: usize) {
        let class = &mut self.classes[idx];
        let Some((party, since)) = class.waiting.pop_front() else { return };
        let waited = self.now.saturating_sub(since).as_secs_f64();
        class.stats.waited_seconds += waited;
        class.stats.longest_wait_seconds = class.stats.longest_wait_seconds.max(waited);
        self.hold = Some(Hold { party, since: self.now });
    }

    fn is_active(&self, idx: usize) -> bool {
        let holds = self.hold.is_some_and(|hold| self.parties[hold.party.0].class.idx() == idx);
        holds || !self.classes[idx].waiting.is_empty()
    }

    /// The lowest virtual time of those that compute or wait; 0 if nobody does.
    fn lowest_active(&self) -> f64 {
        let active = (0..2).filter(|idx| self.is_active(*idx)).map(|idx| self.classes[idx].virtual_time);
        active.reduce(f64::min).unwrap_or(0.0)
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
