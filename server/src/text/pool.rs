//! Worker threads for tokenizing and rendering.
//!
//! A large text takes a while, and a model's own pattern or template may take longer than it should. Such work must
//! not sit on the threads that serve sockets, so it goes through a short queue to a few threads of its own. When the
//! queue is full the answer is [`TextError::Busy`] at once; after the deadline it is [`TextError::Timeout`]. Work
//! whose caller has gone away is dropped before it starts. A panic ends that piece of work, not the worker.

use crate::text::TextError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// How much text work is allowed at the same time.
#[derive(Debug, Clone)]
pub struct TextLimits {
    /// Number of threads.
    pub workers: usize,
    /// How many pieces of work may wait.
    pub queue: usize,
    /// The longest text in bytes.
    pub max_bytes: usize,
    /// From handing in to the result.
    pub deadline: Duration,
}

impl Default for TextLimits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { workers: cores.clamp(1, 4), queue: 256, max_bytes: 8 << 20, deadline: Duration::from_secs(10) }
    }
}

/// Stack of a worker. Patterns and templates may nest.
const STACK: usize = 16 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// The workers. Cheap to share by reference; dropping it lets the threads end.
pub struct TextPool {
    jobs: SyncSender<Job>,
    limits: TextLimits,
}

impl TextPool {
    /// Starts the workers.
    pub fn new(limits: TextLimits) -> std::io::Result<Self> {
        let (jobs, receiver) = sync_channel::<Job>(limits.queue.max(1));
        // A lock, because the standard channel has one receiver; it is held only to take a job out.
        let receiver = Arc::new(Mutex::new(receiver));
        for index in 0..limits.workers.max(1) {
            let receiver = Arc::clone(&receiver);
            std::thread::Builder::new()
                .name(format!("text-{index}"))
                .stack_size(STACK)
                .spawn(move || work(&receiver))?;
        }
        Ok(Self { jobs, limits })
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
        let (sender, result) = oneshot::channel();
        let job: Job = Box::new(move || {
            if sender.is_closed() {
                return;
            }
            let done = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| {
                tracing::error!("a panic while handling text; the request ends with an error");
                Err(TextError::Internal)
            });
            // The caller may have given up meanwhile.
            let _ = sender.send(done);
        });
        self.jobs.try_send(job).map_err(|e| match e {
            TrySendError::Full(_) => TextError::Busy,
            TrySendError::Disconnected(_) => TextError::Internal,
        })?;
        match tokio::time::timeout(self.limits.deadline, result).await {
            Ok(Ok(done)) => done,
            Ok(Err(_)) => Err(TextError::Internal),
            Err(_) => Err(TextError::Timeout { seconds: self.limits.deadline.as_secs() }),
        }
    }
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
}
