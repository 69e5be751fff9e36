//! The audit log: one JSON object a request, appended to a file. Prompts are in it only if they were asked for, answers
//! never. Writing happens on a thread of its own; lines that do not fit its queue, or that the file does not take, are
//! dropped and counted, because a slow or full disk must not stop serving.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

/// What is said of a request.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Entry<'a> {
    pub(crate) request_id: &'a str,
    pub(crate) key: String,
    pub(crate) route: &'a str,
    pub(crate) model: &'a str,
    pub(crate) asked_for: &'a str,
    pub(crate) stream: bool,
    pub(crate) status: u16,
    pub(crate) finish_reason: &'a str,
    pub(crate) prompt_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) latency_ms: f64,
    pub(crate) first_token_ms: Option<f64>,
    pub(crate) queue_ms: Option<f64>,
    pub(crate) from_cache: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt: Option<&'a str>,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    #[serde(flatten)]
    entry: &'a Entry<'a>,
}

/// The log says at most so often that the file takes nothing.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// The file, and what it did not take.
struct Lines<W> {
    file: W,
    failed: Arc<AtomicUsize>,
    complained: Option<Instant>,
}

impl<W: Write> Write for Lines<W> {
    /// Takes all of `line`, one way or the other: a caller that tried again would write half a line twice.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.file.write_all(line) {
            let failed = self.failed.fetch_add(1, Ordering::Relaxed).saturating_add(1);
            if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
                self.complained = Some(Instant::now());
                tracing::warn!(%error, lines = failed, "the audit log cannot be written; lines of it are lost");
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes entries.
#[derive(Debug, Clone)]
pub struct Audit {
    writer: NonBlocking,
    /// Lines that did not fit the queue.
    dropped: ErrorCounter,
    /// Lines that the file did not take.
    failed: Arc<AtomicUsize>,
    with_prompts: bool,
}

impl Audit {
    /// Appends to the file at `path`, which is made if it is not there, for its owner only. The log is flushed when the
    /// guard is dropped.
    ///
    /// # Errors
    /// If the file cannot be opened for appending.
    pub fn open(path: &Path, with_prompts: bool) -> std::io::Result<(Self, WorkerGuard)> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let failed = Arc::new(AtomicUsize::new(0));
        let lines: Lines<File> = Lines { file, failed: Arc::clone(&failed), complained: None };
        let (writer, guard) =
            NonBlockingBuilder::default().lossy(true).thread_name("ingle-audit").finish(lines);
        let dropped = writer.error_counter();
        Ok((Self { writer, dropped, failed, with_prompts }, guard))
    }

    pub(crate) fn with_prompts(&self) -> bool {
        self.with_prompts
    }

    /// Lines that were lost.
    pub(crate) fn dropped(&self) -> usize {
        self.dropped.dropped_lines().saturating_add(self.failed.load(Ordering::Relaxed))
    }

    pub(crate) fn write(&self, entry: &Entry<'_>) {
        let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
        let Ok(mut line) = serde_json::to_vec(&Line { time, entry }) else { return };
        line.push(b'\n');
        // The writer never blocks and never fails; it counts what it drops.
        let _ = self.writer.clone().write_all(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_appended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        for status in [200, 429] {
            let (audit, guard) = Audit::open(&path, false).unwrap();
            audit.write(&Entry { request_id: "r\n", status, ..Entry::default() });
            drop(guard);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!((&lines[0]["status"], &lines[1]["status"]), (&200.into(), &429.into()));
        assert_eq!(lines[0]["request_id"], "r\n");
        assert!(lines[0].get("prompt").is_none());
    }

    #[test]
    fn lines_that_a_full_disk_does_not_take_are_counted() {
        let (audit, guard) = Audit::open(Path::new("/dev/full"), false).unwrap();
        for _ in 0..3 {
            audit.write(&Entry::default());
        }
        drop(guard);
        assert_eq!(audit.dropped(), 3);
    }
}
