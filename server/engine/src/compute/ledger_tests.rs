//! The ledger in simulated time: parties are little programs of steps and pauses.

use super::*;
use proptest::prelude::*;

const REGION: Duration = Duration::from_micros(100);

/// A party that computes steps of `step` regions, then pauses for `pause` regions (0: never).
struct Program {
    id: PartyId,
    step: u32,
    pause: u32,
    /// Regions left of the step; 0: it pauses.
    left: u32,
    pause_left: u32,
    computed: u64,
    /// Regions in a row that it waited for the turn, and the most of them.
    waits: u64,
    longest: u64,
}

struct World {
    ledger: Ledger,
    programs: Vec<Program>,
    now: Duration,
}

impl World {
    fn new(share: f64, programs: &[(ComputeClass, u32, u32)]) -> Self {
        let mut ledger = Ledger::new(share);
        let programs = programs
            .iter()
            .map(|&(class, step, pause)| Program {
                id: ledger.join(class),
                step,
                pause,
                left: 0,
                pause_left: 0,
                computed: 0,
                waits: 0,
                longest: 0,
            })
            .collect();
        Self { ledger, programs, now: Duration::ZERO }
    }

    /// One region's time: whoever holds the turn computes, those that pause get on with that.
    fn tick(&mut self) {
        for program in &mut self.programs {
            if program.left == 0 && program.pause_left == 0 {
                program.left = program.step;
                if self.ledger.holder() == Some(program.id) {
                    self.ledger.hand_over(true);
                } else {
                    self.ledger.want(program.id);
                }
            }
        }
        // Before its region the holder looks whether another should go first.
        self.ledger.hand_over(false);
        let holder = self.ledger.holder();
        let wanted = self.programs.iter().any(|program| program.left > 0);
        assert!(holder.is_some() || !wanted, "work waits and nobody computes");
        self.now += REGION;
        self.ledger.advance(self.now);
        for program in &mut self.programs {
            if holder == Some(program.id) {
                assert!(program.left > 0, "the turn is held by one that pauses");
                program.computed += 1;
                program.waits = 0;
                program.left -= 1;
                if program.left == 0 && program.pause > 0 {
                    program.pause_left = program.pause;
                    self.ledger.release(program.id);
                }
            } else if program.left > 0 {
                program.waits += 1;
                program.longest = program.longest.max(program.waits);
            } else {
                program.pause_left = program.pause_left.saturating_sub(1);
            }
        }
    }

    fn run(mut self, ticks: u32) -> Self {
        for _ in 0..ticks {
            self.tick();
        }
        self
    }

    fn computed(&self, idx: usize) -> f64 {
        self.programs[idx].computed as f64
    }
}

use ComputeClass::{Encode, Generate};

#[test]
fn shares_are_kept_when_both_always_have_work() {
    for share in [0.1, 0.35, 0.5, 0.8] {
        for (generate, encode) in [(90, 400), (2, 3), (90, 1), (5000, 5000)] {
            let world = World::new(share, &[(Generate, generate, 0), (Encode, encode, 0)]).run(40_000);
            let got = world.computed(1) / 40_000.0;
            assert!((got - share).abs() < 0.02, "share {share}, steps {generate} and {encode}: {got}");
        }
    }
}

#[test]
fn what_one_does_not_use_is_the_others() {
    let alone = World::new(0.35, &[(Generate, 90, 0), (Encode, 400, 1_000_000)]).run(20_000);
    // One step of the encoder, then it pauses for good.
    assert_eq!(alone.programs[1].computed, 400);
    assert_eq!(alone.programs[0].computed, 19_600);
    let alone = World::new(0.35, &[(Encode, 400, 0)]).run(1000);
    assert_eq!(alone.programs[0].computed, 1000);
}

#[test]
fn a_decode_step_waits_for_one_slice_of_its_own_length_at_most() {
    // Steps of 9 ms and batches of 100 ms at a third: a slice is half a step.
    let world = World::new(1.0 / 3.0, &[(Generate, 90, 0), (Encode, 1000, 0)]).run(40_000);
    assert!(world.programs[0].longest <= 47, "{} regions", world.programs[0].longest);
}

#[test]
fn a_chat_that_arrives_is_next_after_the_shortest_turn() {
    // The encoder has computed for long when the chat comes for one step every second.
    let world = World::new(0.35, &[(Encode, 1000, 0), (Generate, 50, 10_000)]).run(100_000);
    let quantum = (ENCODE_QUANTUM.as_micros() / REGION.as_micros()) as u64;
    assert!(world.programs[1].longest <= quantum + 1, "{} regions", world.programs[1].longest);
}

#[test]
fn a_single_query_gets_into_a_long_prefill() {
    // Steps of 500 ms: after the quantum of 10 ms the query goes first.
    let world = World::new(0.35, &[(Generate, 5000, 0), (Encode, 20, 3000)]).run(100_000);
    assert!(world.programs[1].longest <= 101, "{} regions", world.programs[1].longest);
}

#[test]
fn nobody_saves_up_turns() {
    // An hour of encoding alone, then both: the newcomer does not shut the other out, nor is it shut out.
    let mut ledger = Ledger::new(0.35);
    let (chat, job) = (ledger.join(Generate), ledger.join(Encode));
    ledger.want(job);
    ledger.advance(Duration::from_secs(3600));
    ledger.want(chat);
    assert!(ledger.hand_over(false), "the newcomer starts level and goes first");
    let ms = Duration::from_millis(1);
    let mut computed = [0_u32; 2];
    let mut now = Duration::from_secs(3600);
    for _ in 0..10_000 {
        now += ms;
        computed[usize::from(ledger.holder() == Some(job))] += 1;
        ledger.advance(now);
        ledger.hand_over(true);
    }
    assert!((3300..3700).contains(&computed[1]), "{computed:?}");

    // The same after a pause of both.
    ledger.release(chat);
    ledger.release(job);
    assert_eq!(ledger.holder(), None);
    ledger.want(chat);
    ledger.advance(now + Duration::from_secs(1));
    ledger.want(job);
    assert!(ledger.hand_over(true), "one second alone is not held against the chat, nor given to it");
}

#[test]
fn parties_of_one_class_take_turns() {
    let world = World::new(0.35, &[(Encode, 3000, 0), (Encode, 10, 0), (Generate, 90, 0)]).run(100_000);
    let [one, two, chat] = [0, 1, 2].map(|idx| world.computed(idx) / 100_000.0);
    assert!((chat - 0.65).abs() < 0.03, "{chat}");
    assert!(one > 0.1 && two > 0.05, "{one} {two}");
}

#[test]
fn odd_shares_are_tamed() {
    for share in [f64::NAN, f64::INFINITY, -3.0, 0.0, 1.0] {
        let world = World::new(share, &[(Generate, 90, 0), (Encode, 90, 0)]).run(40_000);
        assert!(world.computed(0) > 200.0 && world.computed(1) > 200.0, "{share}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Any mix of programs: someone computes whenever there is work (asserted in `tick`), nobody starves, time adds up.
    #[test]
    fn nobody_starves(
        share in 0.05_f64..0.95,
        mix in proptest::collection::vec((any::<bool>(), 1_u32..800, 0_u32..300), 1..5),
    ) {
        let programs: Vec<_> =
            mix.iter().map(|&(gen_, step, pause)| (if gen_ { Generate } else { Encode }, step, pause)).collect();
        let world = World::new(share, &programs).run(30_000);
        let total: u64 = world.programs.iter().map(|p| p.computed).sum();
        let busy: f64 = ComputeClass::ALL.iter().map(|c| world.ledger.stats(*c).busy_seconds).sum();
        prop_assert!((busy - total as f64 * REGION.as_secs_f64()).abs() < 1e-6 * total as f64);
        for program in &world.programs {
            prop_assert!(program.computed > 0);
            // Each of the others may hold the turn for some quanta in a row, by the shares.
            prop_assert!(program.longest < 15_000, "waited for {} regions", program.longest);
        }
    }
}
