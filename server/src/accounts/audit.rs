//! The audit log: one JSON object a request, appended to a file. Prompts are in it only if they were asked for, answers
//! never. Writing happens on a thread of its own; lines that do not fit its queue are dropped and counted, because a
//! slow disk must not stop serving.

use std::{fs::OpenOptions, io::Write, path::Path};

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

/// Writes entries.
#[derive(Debug, Clone)]
pub struct Audit {
    writer: NonBlocking,
    dropped: ErrorCounter,
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
        let (writer, guard) =
            NonBlockingBuilder::default().lossy(true).thread_name("ingle-audit").finish(file);
        let dropped = writer.error_counter();
        Ok((Self { writer, dropped, with_prompts }, guard))
    }

    pub(crate) fn with_prompts(&self) -> bool {
        self.with_prompts
    }

    /// Lines that were lost.
    pub(crate) fn dropped(&self) -> usize {
        self.dropped.dropped_lines()
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
}
