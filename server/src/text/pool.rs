//! Worker threads for tokenizing and rendering.
//!
//! A large text takes a while, and a model's own pattern or template may take longer than it should. Such work must
//! not sit on the threads that serve sockets, so it goes through a short queue to a few threads of its own. When the
//! queue is full the answer is [`TextError::Busy`] at once; after the deadline it is [`TextError::Timeout`]. Work
//! whose caller has gone away is dropped before it starts, and ends early where it asks [`given_up`]. A panic ends that
//! piece of work, not the worker.
//!
//! Large texts have threads and a queue of their own, so small ones never wait behind them, and a budget of bytes: what a
//! tokenizer needs is a large multiple of the text.

use crate::text::TextError;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};

/// How much text work is allowed at the same time.
#[derive(Debug, Clone)]
pub struct TextLimits {
    /// Threads for small texts, and as many for large ones.
    pub workers: usize,
    /// How many pieces of work may wait, small and large ones each.
    pub queue: usize,
    /// The longest text in bytes. All large texts that are worked on at a time have no more together.
    pub max_bytes: usize,
    /// A text of more bytes is a large one.
    pub small_bytes: usize,
    /// From handing in to the result.
    pub deadline: Duration,
}

impl Default for TextLimits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            workers: cores.clamp(1, 4),
            queue: 256,
            max_bytes: 8 << 20,
            small_bytes: 64 << 10,
            deadline: Duration::from_secs(10),
        }
    }
}

/// Stack of a worker. Patterns and templates may nest.
const STACK: usize = 16 << 20;
/// The budget of bytes is counted in these.
const UNIT: usize = 1 << 10;

type Job = Box<dyn FnOnce() + Send>;

thread_local! {
    /// Set once nobody waits for what this thread does.
    static CALLER_GONE: RefCell<Arc<AtomicBool>> = RefCell::default();
}

/// Whether nobody waits for what this thread does any more. Long work asks now and then, and ends early.
pub(crate) fn given_up() -> bool {
    CALLER_GONE.with_borrow(|gone| gone.load(Ordering::Relaxed))
}

/// Tells the worker when its caller has gone, by a timeout or by closing the connection.
struct Caller(Arc<AtomicBool>);

impl Drop for Caller {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The workers. Cheap to share by reference; dropping it lets the threads end.
pub struct TextPool {
    small: SyncSender<Job>,
    large: SyncSender<Job>,
    /// Large texts that may wait or be worked on.
    places: Arc<Semaphore>,
    /// Bytes of large texts that may be worked on, in [`UNIT`]s.
    budget: Arc<Semaphore>,
    limits: TextLimits,
}

impl TextPool {
    /// Starts the workers.
    pub fn new(limits: TextLimits) -> std::io::Result<Self> {
        let (workers, queue) = (limits.workers.max(1), limits.queue.max(1));
        Ok(Self {
            small: start("text", workers, queue)?,
            large: start("large-text", workers, queue)?,
            places: Arc::new(Semaphore::new(queue)),
            budget: Arc::new(Semaphore::new(units(limits.max_bytes) as usize)),
            limits,
        })
    }

    /// The limits in force.
    pub fn limits(&self) -> &TextLimits {
        &self.limits
    }

    /// Runs `f` on a worker. `bytes` is how much text it will look at; more than the limit is refused here.
    pub async fn run<T, F>(&self, bytes: usize, f: F) -> Result<T, TextError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, TextError> + Send + 'static,
    {
        if bytes > self.limits.max_bytes {
            return Err(TextError::TooLong { bytes, limit: self.limits.max_bytes });
        }
        let work = self.run_in_time(bytes, f);
        tokio::time::timeout(self.limits.deadline, work)
            .await
            .unwrap_or_else(|_| Err(TextError::Timeout { seconds: self.limits.deadline.as_secs() }))
    }

    async fn run_in_time<T, F>(&self, bytes: usize, f: F) -> Result<T, TextError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, TextError> + Send + 'static,
    {
        let (jobs, permits) = if bytes > self.limits.small_bytes {
            let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| TextError::Busy)?;
            let share = Arc::clone(&self.budget).acquire_many_owned(units(bytes)).await;
            (&self.large, Some((place, share.map_err(|_| TextError::Internal)?)))
        } else {
            (&self.small, None)
        };
        let gone = Arc::new(AtomicBool::new(false));
        let _caller = Caller(Arc::clone(&gone));
        let (sender, result) = oneshot::channel();
        let job: Job = Box::new(move || {
            // Given back when the work has ended, however long ago its caller went.
            let _permits = permits;
            if sender.is_closed() {
                return;
            }
            CALLER_GONE.set(gone);
            let done = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| {
                tracing::error!("a panic while handling text; the request ends with an error");
                Err(TextError::Internal)
            });
            // The caller may have given up meanwhile.
            let _ = sender.send(done);
        });
        jobs.try_send(job).map_err(|e| match e {
            TrySendError::Full(_) => TextError::Busy,
            TrySendError::Disconnected(_) => TextError::Internal,
        })?;
        result.await.unwrap_or(Err(TextError::Internal))
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

/// Starts `workers` threads behind a queue.
fn start(name: &str, workers: usize, queue: usize) -> std::io::Result<SyncSender<Job>> {
    let (jobs, receiver) = sync_channel::<Job>(queue);
    // A lock, because the standard channel has one receiver; it is held only to take a job out.
    let receiver = Arc::new(Mutex::new(receiver));
    for index in 0..workers {
        let receiver = Arc::clone(&receiver);
        std::thread::Builder::new()
            .name(format!("{name}-{index}"))
            .stack_size(STACK)
            .spawn(move || work(&receiver))?;
    }
    Ok(jobs)
}

fn work(receiver: &Mutex<Receiver<Job>>) {
    loop {
        let job = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(workers: usize, queue: usize, deadline_ms: u64) -> TextPool {
        TextPool::new(TextLimits {
            workers,
            queue,
            max_bytes: 100,
            small_bytes: 10,
            deadline: Duration::from_millis(deadline_ms),
        })
        .expect("threads")
    }

    #[tokio::test]
    async fn returns_what_the_work_returns_and_survives_a_panic() {
        let pool = pool(1, 4, 5000);
        assert_eq!(pool.run(1, || Ok(7)).await, Ok(7));
        let quiet: Result<(), _> = pool.run(1, || std::panic::resume_unwind(Box::new("test"))).await;
        assert_eq!(quiet, Err(TextError::Internal));
        assert_eq!(pool.run(1, || Ok(8)).await, Ok(8));
    }

    #[tokio::test]
    async fn too_much_text_is_refused_before_the_queue() {
        let pool = pool(1, 1, 5000);
        assert_eq!(pool.run(101, || Ok(())).await, Err(TextError::TooLong { bytes: 101, limit: 100 }));
    }

    #[tokio::test]
    async fn a_full_queue_is_busy_and_a_slow_job_times_out() {
        let pool = Arc::new(pool(1, 1, 200));
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let first = {
            let pool = Arc::clone(&pool);
            tokio::spawn(async move {
                pool.run(1, move || {
                    let _ = blocked.recv();
                    Ok(())
                })
                .await
            })
        };
        // Until the worker has taken the first job, the only place in the queue may be its own.
        let mut waiting = Vec::new();
        let mut busy = false;
        for _ in 0..50 {
            let pool = Arc::clone(&pool);
            let job = tokio::spawn(async move { pool.run(1, || Ok(())).await });
            tokio::time::sleep(Duration::from_millis(2)).await;
            if job.is_finished() {
                busy |= job.await.expect("joined") == Err(TextError::Busy);
            } else {
                waiting.push(job);
            }
            if busy {
                break;
            }
        }
        assert!(busy, "a full queue must answer at once");
        assert_eq!(first.await.expect("joined"), Err(TextError::Timeout { seconds: 0 }));
        release.send(()).expect("the worker still waits");
        for job in waiting {
            let _ = job.await;
        }
        // The worker is free again.
        assert_eq!(pool.run(1, || Ok(3)).await, Ok(3));
    }

    #[tokio::test]
    async fn small_texts_do_not_wait_behind_large_ones() {
        let pool = Arc::new(pool(1, 8, 5000));
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let large = |work: Box<dyn FnOnce() + Send>| {
            let pool = Arc::clone(&pool);
            tokio::spawn(async move {
                pool.run(100, move || {
                    work();
                    Ok(())
                })
                .await
            })
        };
        let first = large(Box::new(move || blocked.recv().unwrap_or(())));
        let second = large(Box::new(|| ()));
        for _ in 0..20 {
            assert_eq!(pool.run(10, || Ok(1)).await, Ok(1));
        }
        assert!(!first.is_finished() && !second.is_finished());
        release.send(()).expect("the first still runs");
        assert_eq!(first.await.expect("joined"), Ok(()));
        assert_eq!(second.await.expect("joined"), Ok(()));
    }

    #[tokio::test]
    async fn large_texts_share_a_budget() {
        // Threads for two, bytes for one.
        let pool = pool(2, 8, 5000);
        let running = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let job = || {
            let running = Arc::clone(&running);
            pool.run(100, move || {
                let together = running.fetch_add(1, Ordering::SeqCst) + 1;
                std::thread::sleep(Duration::from_millis(20));
                running.fetch_sub(1, Ordering::SeqCst);
                Ok(together)
            })
        };
        assert_eq!(tokio::join!(job(), job(), job()), (Ok(1), Ok(1), Ok(1)));
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_learns_of_it() {
        let pool = pool(1, 4, 500);
        let (sender, ended) = std::sync::mpsc::channel();
        let work = move || {
            while !given_up() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = sender.send(());
            Err::<(), _>(TextError::GivenUp)
        };
        assert_eq!(pool.run(100, work).await, Err(TextError::Timeout { seconds: 0 }));
        ended.recv_timeout(Duration::from_secs(5)).expect("the work ended");
        // Its share of the budget is there again, and the flag is the next one's own.
        assert_eq!(pool.run(100, || Ok(given_up())).await, Ok(false));
    }
}
