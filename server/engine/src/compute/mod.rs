//! Who computes: the models of one process share its processors in turns.
//!
//! One parallel region runs at a time (`kernels/src/cpu/pool.rs`), so two models that computed at once would only be in
//! each other's way. Instead a model's thread holds the [`ComputeArbiter`]'s turn while it computes:
//!
//! 1. it takes the turn before a step and keeps it over its steps until it has nothing to do;
//! 2. between steps, and before each parallel region inside one, it looks whether another should go on instead;
//! 3. it gives the turn back before it waits for work.
//!
//! [`ledger`] decides, a pure state machine that is told the time; this file holds the lock and the waiting.

mod ledger;
mod sharing;

pub use ledger::ComputeClass;
pub use sharing::Sharing;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ledger::{Ledger, PartyId};

/// How the turn was used so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ComputeStats {
    /// Share that the class may count on, 0 to 1.
    pub share: f64,
    /// Seconds that it held the turn.
    pub busy_seconds: f64,
    /// Seconds that it wanted the turn and another had it.
    pub waited_seconds: f64,
    /// The longest of these waits.
    pub longest_wait_seconds: f64,
    /// Times that it handed the turn to another while it had more to do.
    pub handovers: u64,
}

/// Gives turns. Clones are the same arbiter.
#[derive(Debug, Clone)]
pub struct ComputeArbiter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// A lock, because parties on different threads must agree on who goes next; held for a few instructions.
    ledger: Mutex<Ledger>,
    changed: Condvar,
    start: Instant,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

impl ComputeArbiter {
    /// `encode_share` of the time is for encoders when both they and the generating model have work; what one does not
    /// use is the other's. It is kept between 0.01 and 0.99.
    #[must_use]
    pub fn new(encode_share: f64) -> Self {
        let shared = Shared {
            ledger: Mutex::new(Ledger::new(encode_share)),
            changed: Condvar::new(),
            start: Instant::now(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A new party of `class`.
    #[must_use]
    pub fn join(&self, class: ComputeClass) -> Turn {
        let party = self.shared.lock().join(class);
        Turn(Seat { shared: self.shared.clone(), party })
    }

    /// How `class` used its turns so far.
    #[must_use]
    pub fn stats(&self, class: ComputeClass) -> ComputeStats {
        let mut ledger = self.shared.lock();
        ledger.advance(self.shared.now());
        ledger.stats(class)
    }
}

/// One party's access to the turn; belongs to one thread. Dropping it gives the turn back.
#[derive(Debug)]
pub struct Turn(Seat);

#[derive(Debug, Clone)]
struct Seat {
    shared: Arc<Shared>,
    party: PartyId,
}

impl Turn {
    /// Begins a step: waits for the turn, or, if it is held already, lets another go first whose turn it is.
    pub fn begin_step(&self) {
        let Seat { shared, party } = &self.0;
        let mut ledger = shared.lock();
        ledger.advance(shared.now());
        if ledger.holder() != Some(*party) {
            ledger.want(*party);
        } else if !ledger.hand_over(true) {
            return;
        }
        self.0.wait(ledger);
    }

    /// Inside a step: lets another go first whose turn it is. Returns at once for a party that does not hold the turn.
    pub fn checkpoint(&self) {
        self.0.checkpoint();
    }

    /// Gives the turn back; nothing happens if it is not held.
    pub fn release(&self) {
        let Seat { shared, party } = &self.0;
        let mut ledger = shared.lock();
        ledger.advance(shared.now());
        ledger.release(*party);
        shared.changed.notify_all();
    }

    /// Seconds that this party held the turn.
    #[must_use]
    pub fn busy_seconds(&self) -> f64 {
        let Seat { shared, party } = &self.0;
        let mut ledger = shared.lock();
        ledger.advance(shared.now());
        ledger.party_busy(*party).as_secs_f64()
    }

    /// Makes the calling thread look before every parallel region it starts whether another should go first.
    pub fn watch_this_thread(&self) {
        let seat = self.0.clone();
        ingle_models::set_checkpoint(Some(Box::new(move || seat.checkpoint())));
    }
}

impl Seat {
    fn checkpoint(&self) {
        let mut ledger = self.shared.lock();
        if ledger.holder() != Some(self.party) || !ledger.is_wanted() {
            return;
        }
        ledger.advance(self.shared.now());
        if ledger.hand_over(false) {
            self.wait(ledger);
        }
    }

    fn wait(&self, mut ledger: MutexGuard<'_, Ledger>) {
        // Whoever has the turn now must hear of it.
        self.shared.changed.notify_all();
        while ledger.holder() != Some(self.party) {
            ledger = self.shared.changed.wait(ledger).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn one_at_a_time_and_everybody_gets_through() {
        let arbiter = ComputeArbiter::new(0.5);
        let inside = Arc::new(AtomicUsize::new(0));
        let classes = [ComputeClass::Generate, ComputeClass::Encode, ComputeClass::Encode];
        let threads: Vec<_> = classes
            .into_iter()
            .map(|class| {
                let (turn, inside) = (arbiter.join(class), inside.clone());
                std::thread::spawn(move || {
                    for step in 0..200 {
                        turn.begin_step();
                        for _ in 0..4 {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two at once");
                            inside.fetch_sub(1, Ordering::SeqCst);
                            turn.checkpoint();
                        }
                        if step % 7 == 0 {
                            turn.release();
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("no thread panics");
        }
        // The turns were dropped, so it is free.
        let turn = arbiter.join(ComputeClass::Generate);
        turn.begin_step();
        assert!(arbiter.stats(ComputeClass::Encode).busy_seconds > 0.0);
    }

    #[test]
    fn a_party_without_the_turn_passes_its_checkpoints() {
        let arbiter = ComputeArbiter::new(0.5);
        let (one, two) = (arbiter.join(ComputeClass::Generate), arbiter.join(ComputeClass::Encode));
        one.begin_step();
        two.checkpoint();
        two.release();
        one.begin_step();
        assert_eq!(two.busy_seconds(), 0.0);
    }
}
