//! A thread pool for short parallel regions.
//!
//! A region lasts microseconds to milliseconds and regions follow each other closely while a step runs, so workers spin
//! for a moment after each region before they sleep, and the caller never waits for a worker that has not begun:
//!
//! 1. the caller publishes a job and opens the gate; sleeping workers are woken;
//! 2. caller and workers claim piece after piece from one counter;
//! 3. when none is left the caller closes the gate and waits only for the workers inside.
//!
//! An idle process uses no processor time.

use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::error::Result;

/// How long a worker spins for the next region before it sleeps. Longer than the gaps between the regions of a step,
/// shorter than anybody would notice on a processor meter.
const SPIN: Duration = Duration::from_micros(60);

static WANTED_THREADS: AtomicUsize = AtomicUsize::new(0);
static PINNED: AtomicBool = AtomicBool::new(false);
static POOL: OnceLock<Pool> = OnceLock::new();

/// Sets how many threads compute, the calling one included; 0: as many as this process may use. Only the call before
/// the first computation counts.
pub fn set_num_threads(num_threads: usize) {
    WANTED_THREADS.store(num_threads, Ordering::Relaxed);
}

/// Whether each thread of the pool keeps to one processor of those this process may use (Linux; elsewhere nothing happens).
/// Threads that start a computation stay free, so the first processor is left to them. Only the call before the first
/// computation counts.
pub fn pin_threads(pinned: bool) {
    PINNED.store(pinned, Ordering::Relaxed);
}

/// How many threads compute.
#[must_use]
pub fn num_threads() -> usize {
    pool().workers.len() + 1
}

/// Runs `piece(0..num_pieces)` on all threads, each index once, and returns when all have ended. A panic of a piece is
/// passed on to the caller after the region.
pub fn run(num_pieces: usize, piece: impl Fn(usize) + Sync) {
    CHECKPOINT.with(|slot| {
        // Absent while it runs and while the region does: a region inside a region must not stop halfway.
        let _back = slot.take().map(|checkpoint| {
            let back = PutBack(slot, Some(checkpoint));
            if let Some(checkpoint) = &back.1 {
                checkpoint();
            }
            back
        });
        pool().run(num_pieces, &piece);
    });
}

/// As [`run`] for pieces that may fail; the first failure is given back, and pieces that begin after it are left out.
pub(super) fn try_run(num_pieces: usize, piece: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let failed = OnceLock::new();
    run(num_pieces, |idx| {
        if failed.get().is_none()
            && let Err(error) = piece(idx)
        {
            // Another thread's failure may be there already: one is enough.
            let _ = failed.set(error);
        }
    });
    failed.into_inner().map_or(Ok(()), Err)
}

/// Cuts `count` items into pieces for [`run`] that get smaller towards the end, so that all threads end together: multiples
/// of `group` items while much is left, then powers of two down to `unit` (the last may be smaller).
pub(super) fn cut(count: usize, unit: usize, group: usize) -> Vec<Range<usize>> {
    cut_for(num_threads(), count, unit, group)
}

fn cut_for(threads: usize, count: usize, unit: usize, group: usize) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut first = 0;
    while first < count {
        // Half of an equal share of what is left: whoever is late with one has its other half to make up for it.
        let share = (count - first) / (2 * threads);
        let len = if share >= group { share / group * group } else { 1 << share.max(unit).ilog2() };
        let end = count.min(first + len);
        pieces.push(first..end);
        first = end;
    }
    pieces
}

type Checkpoint = Box<dyn Fn()>;

thread_local! {
    static CHECKPOINT: Cell<Option<Checkpoint>> = const { Cell::new(None) };
}

/// Calls `checkpoint` before every parallel region that this thread starts from now on; `None`: no more. It may wait:
/// no thread of the pool is held meanwhile. So two models that take turns on one pool can hand over in the middle of a
/// forward pass.
pub fn set_checkpoint(checkpoint: Option<Box<dyn Fn()>>) {
    CHECKPOINT.with(|slot| slot.set(checkpoint));
}

/// Puts the checkpoint back after its region, also when that panics.
struct PutBack<'a>(&'a Cell<Option<Checkpoint>>, Option<Checkpoint>);

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        self.0.set(self.1.take());
    }
}

type Piece<'a> = &'a (dyn Fn(usize) + Sync);

struct Pool {
    workers: Vec<Worker>,
    shared: &'static Shared,
    /// One region at a time: a second caller computes alone meanwhile.
    region: Mutex<()>,
}

struct Worker {
    thread: Thread,
    asleep: &'static AtomicBool,
}

struct Shared {
    /// `epoch << 32 | CLOSED? | number of workers inside`.
    gate: AtomicU64,
    next: AtomicUsize,
    job: Mutex<Option<Job>>,
    panicked: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    /// Lifetime erased; valid while the gate of its epoch is open or has workers inside.
    piece: Piece<'static>,
    num_pieces: usize,
}

const CLOSED: u64 = 1 << 31;
const COUNT: u64 = CLOSED - 1;

fn pool() -> &'static Pool {
    POOL.get_or_init(|| {
        let wanted = WANTED_THREADS.load(Ordering::Relaxed);
        // available_parallelism respects affinity masks and cgroup quotas.
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        Pool::new(if wanted == 0 { available } else { wanted })
    })
}

impl Pool {
    fn new(num_threads: usize) -> Self {
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            gate: AtomicU64::new(CLOSED),
            next: AtomicUsize::new(0),
            job: Mutex::new(None),
            panicked: AtomicBool::new(false),
        }));
        let workers = (1..num_threads)
            .filter_map(|idx| {
                let asleep: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
                let builder = std::thread::Builder::new().name(format!("ingle-compute-{idx}"));
                let pinned = PINNED.load(Ordering::Relaxed);
                let start = move || {
                    if pinned {
                        keep_to_processor(idx);
                    }
                    work(shared, asleep);
                };
                let handle = builder.spawn(start).ok()?;
                Some(Worker { thread: handle.thread().clone(), asleep })
            })
            .collect();
        Self { workers, shared, region: Mutex::new(()) }
    }

    fn run(&self, num_pieces: usize, piece: Piece<'_>) {
        let region =
            if num_pieces > 1 && !self.workers.is_empty() { self.region.try_lock().ok() } else { None };
        let Some(_region) = region else {
            (0..num_pieces).for_each(piece);
            return;
        };
        let shared = self.shared;
        // SAFETY: the reference is used by this thread and by workers inside the gate only; this function returns
        // after the gate is closed and empty, also when a piece panics.
        let piece: Piece<'static> = unsafe { std::mem::transmute::<Piece<'_>, Piece<'static>>(piece) };
        let job = Job { piece, num_pieces };
        *shared.job.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(job);
        shared.next.store(0, Ordering::Relaxed);
        let epoch = (shared.gate.load(Ordering::Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        shared.gate.store(epoch << 32, Ordering::SeqCst);
        for worker in self.workers.iter().take(num_pieces - 1) {
            if worker.asleep.load(Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.claim(job)));
        if own.is_err() {
            // Nobody else needs to start a piece of a region that failed.
            shared.next.store(num_pieces, Ordering::Relaxed);
        }
        shared.gate.fetch_or(CLOSED, Ordering::SeqCst);
        let mut spins = 0_u32;
        while shared.gate.load(Ordering::Acquire) & COUNT != 0 {
            spins += 1;
            // With fewer processors than threads the worker inside may be waiting for ours.
            if spins.is_multiple_of(1 << 14) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let others = shared.panicked.swap(false, Ordering::Relaxed);
        drop(_region);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!others, "a compute thread panicked in a parallel region");
    }
}

impl Shared {
    fn claim(&self, job: Job) {
        loop {
            let idx = self.next.fetch_add(1, Ordering::Relaxed);
            if idx >= job.num_pieces {
                return;
            }
            (job.piece)(idx);
        }
    }

    /// Enters the gate if it is open in another epoch than `seen`; returns that epoch.
    fn enter(&self, seen: u64) -> Option<u64> {
        let gate = self.gate.load(Ordering::SeqCst);
        if gate >> 32 == seen || gate & CLOSED != 0 {
            return None;
        }
        self.gate
            .compare_exchange(gate, gate + 1, Ordering::SeqCst, Ordering::Relaxed)
            .ok()
            .map(|gate| gate >> 32)
    }
}

/// Keeps the calling thread to processor `idx` of those it may use now, counted round. Where that cannot be had it
/// stays free: it is a matter of speed alone.
#[cfg(target_os = "linux")]
fn keep_to_processor(idx: usize) {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: a set of zero bytes is an empty set; the calls read and write `size` bytes of it and concern this thread
    // alone (0); numbers stay below CPU_SETSIZE, the capacity of a set.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size, &raw mut allowed) != 0 {
            return;
        }
        let processors: Vec<usize> =
            (0..libc::CPU_SETSIZE as usize).filter(|cpu| libc::CPU_ISSET(*cpu, &allowed)).collect();
        if let Some(processor) = processors.get(idx % processors.len().max(1)) {
            let mut own: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(*processor, &mut own);
            libc::sched_setaffinity(0, size, &raw const own);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn keep_to_processor(_: usize) {}

fn work(shared: &'static Shared, asleep: &'static AtomicBool) {
    let mut seen = 0;
    loop {
        let since = Instant::now();
        let mut spins = 0_u32;
        let epoch = loop {
            if let Some(epoch) = shared.enter(seen) {
                break epoch;
            }
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(64) && since.elapsed() > SPIN {
                // Announce sleep first, then look once more: the caller opens the gate first, then looks for sleepers.
                asleep.store(true, Ordering::SeqCst);
                let gate = shared.gate.load(Ordering::SeqCst);
                if gate >> 32 == seen || gate & CLOSED != 0 {
                    std::thread::park();
                }
                asleep.store(false, Ordering::SeqCst);
            }
        };
        seen = epoch;
        let job = *shared.job.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(job) = job
            && catch_unwind(AssertUnwindSafe(|| shared.claim(job))).is_err()
        {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.gate.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn pieces_cover_all_and_get_smaller() {
        for threads in [1, 2, 3, 16] {
            for (unit, group) in [(1, 8), (2, 8)] {
                for count in [0, 1, 2, 3, 7, 18, 36, 96, 97, 3072] {
                    let pieces = super::cut_for(threads, count, unit, group);
                    let mut end = 0;
                    for piece in &pieces {
                        assert!(piece.start == end && piece.end > end);
                        end = piece.end;
                    }
                    assert_eq!(end, count);
                    assert!(pieces.is_sorted_by_key(|piece| std::cmp::Reverse(piece.len())));
                    assert!(pieces.len() <= 8 * threads * (count.max(2).ilog2() as usize));
                }
            }
        }
        let lens =
            |pieces: Vec<std::ops::Range<usize>>| pieces.iter().map(std::ops::Range::len).collect::<Vec<_>>();
        assert_eq!(lens(super::cut_for(2, 18, 1, 8)), [4, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]);
    }

    use super::*;

    #[test]
    fn every_piece_runs_once() {
        let pool = Pool::new(3);
        for num_pieces in [0, 1, 2, 3, 7, 100] {
            for _ in 0..200 {
                let counts: Vec<AtomicUsize> = (0..num_pieces).map(|_| AtomicUsize::new(0)).collect();
                pool.run(num_pieces, &|idx| {
                    counts[idx].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for bad in 0..8 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|idx| assert_ne!(idx, bad, "planted"));
            }));
            assert!(outcome.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(8, &|idx| {
                sum.fetch_add(idx, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 28);
        }
    }

    #[test]
    fn a_region_inside_a_region_runs_inline() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(4, &|idx| {
                sum.fetch_add(idx, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 24);
    }

    #[test]
    fn a_checkpoint_comes_before_each_outer_region_and_survives_a_panic() {
        let seen = std::rc::Rc::new(Cell::new(0));
        let counter = seen.clone();
        set_checkpoint(Some(Box::new(move || counter.set(counter.get() + 1))));
        run(4, |_| run(4, |_| {}));
        // The calling thread may or may not take part in the outer region; inside it there are no checkpoints.
        assert_eq!(seen.get(), 1);
        assert!(catch_unwind(AssertUnwindSafe(|| run(2, |_| panic!("planted")))).is_err());
        assert_eq!(seen.get(), 2);
        run(1, |_| {});
        assert_eq!(seen.get(), 3);
        set_checkpoint(None);
        run(2, |_| {});
        assert_eq!(seen.get(), 3);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_pinned_thread_keeps_to_one_processor() {
        for idx in [0, 1, 1000] {
            let counted = std::thread::spawn(move || {
                keep_to_processor(idx);
                // SAFETY: as in `keep_to_processor`.
                unsafe {
                    let mut own: libc::cpu_set_t = std::mem::zeroed();
                    libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut own);
                    libc::CPU_COUNT(&own)
                }
            });
            assert_eq!(counted.join().expect("no panic"), 1);
        }
    }

    #[test]
    fn workers_that_slept_wake_up() {
        let pool = Pool::new(2);
        for _ in 0..5 {
            std::thread::sleep(SPIN * 4);
            let sum = AtomicUsize::new(0);
            pool.run(64, &|idx| {
                sum.fetch_add(idx, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 2016);
        }
    }
}
