//! Simulation of scheduler and block pool: thousands of seeds, each a small world of requests with cancellations, slow
//! readers, failures and little memory, every invariant checked after every step.
//!
//! A seed that fails prints its options. `INGLE_SIM_SEED=17` runs that seed alone, `INGLE_SIM_SEEDS=1000000` runs more.

mod checks;
mod client;
mod exhaustive;
mod options;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use ingle_engine::Fault;
use world::{Report, run};

const KEY: [u8; 32] = [1; 32];

/// One test after the other: the second one silences panic messages, which belong to the whole process.
static ALONE: Mutex<()> = Mutex::new(());

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

/// A run that also takes a panic as a failure.
fn guarded(seed: u64, fault: Option<Fault>) -> Result<Report, String> {
    catch_unwind(AssertUnwindSafe(|| run(seed, fault, KEY))).unwrap_or_else(|_| Err("panic".into()))
}

#[test]
fn invariants_hold_in_every_world() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let seeds = match env("INGLE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..env("INGLE_SIM_SEEDS").unwrap_or(2000),
    };
    let mut sum = Report::default();
    for seed in seeds.clone() {
        let report = guarded(seed, None)
            .unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}\n{:#?}", options::Options::of(seed)));
        // The key that names blocks must not show in any decision.
        if seed % 100 == 0 {
            let again = run(seed, None, [2; 32]).unwrap_or_else(|wrong| panic!("seed {seed} again: {wrong}"));
            assert_eq!(report.trace, again.trace, "seed {seed} ran differently the second time");
        }
        sum.steps += report.steps;
        sum.finished += report.finished;
        sum.cancelled += report.cancelled;
        sum.failed += report.failed;
        sum.refused += report.refused;
        sum.preemptions += report.preemptions;
        sum.evictions += report.evictions;
        sum.cached_tokens += report.cached_tokens;
        sum.scheduled_tokens += report.scheduled_tokens;
        sum.recomputed_tokens += report.recomputed_tokens;
        sum.ahead += report.ahead;
        sum.in_vain += report.in_vain;
    }
    println!("{sum:?}");
    if seeds.end - seeds.start >= 2000 {
        // A simulation in which nothing happens proves nothing.
        assert!(sum.finished > 10_000 && sum.cancelled > 500 && sum.failed > 500, "{sum:?}");
        assert!(sum.preemptions > 500 && sum.evictions > 50 && sum.cached_tokens > 10_000, "{sum:?}");
        assert!(sum.ahead > 50_000 && sum.in_vain > 1000, "{sum:?}");
    }
}

/// I8, the other half: what the invariants compare with is what the engine answers when a request is alone, with
/// room for everything and nothing cached.
#[test]
fn the_expected_answers_are_those_of_a_request_alone() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for seed in 0..200 {
        world::run_alone(seed).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

/// I18: a simulation that misses a planted bug is too weak.
#[test]
fn every_planted_bug_is_caught() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // The faults panic on purpose, often; their messages would drown a real one.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for fault in Fault::ALL {
        match (0..10_000).find_map(|seed| guarded(seed, Some(fault)).err().map(|wrong| (seed, wrong))) {
            Some((seed, wrong)) => {
                println!("{fault:?}: seed {seed}: {wrong:.100}");
                // It is the fault that was caught, not the world.
                if guarded(seed, None).is_err() {
                    missed.push(fault);
                }
            }
            None => missed.push(fault),
        }
    }
    std::panic::set_hook(hook);
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
