//! The program under test, and running it to its end.

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant, SystemTime},
};

use crate::PATIENCE;

const HINT: &str = "build it first: cargo build --release -p ingle";

/// Names another program to test than the one that was built with these tests.
const PROGRAM: &str = "INGLE_TEST_PROGRAM";

/// The `ingle` of the profile these tests were built with, which must be there and newer than its sources; or what
/// `INGLE_TEST_PROGRAM` names.
///
/// # Panics
/// If it is not; the message says what to run.
#[must_use]
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(program) = std::env::var_os(PROGRAM).map(PathBuf::from) {
            assert!(program.is_file(), "{PROGRAM}: {} is not there", program.display());
            return program;
        }
        let test = std::env::current_exe().expect("a test knows its own path");
        // .../PROFILE/deps/integration-HASH
        let profile = test.ancestors().nth(2).expect("a test lies in a profile's folder");
        let binary = profile.join(format!("ingle{}", std::env::consts::EXE_SUFFIX));
        assert!(binary.is_file(), "{} is not there; {HINT}", binary.display());
        if let Some(newer) = newer_source(&profile.join("ingle.d"), &binary) {
            panic!("{} is older than {newer}; {HINT}", binary.display());
        }
        binary
    })
}

/// A source of `binary`, from cargo's list of them, that has changed since it was built.
fn newer_source(list: &Path, binary: &Path) -> Option<String> {
    let modified = |path: &Path| -> Option<SystemTime> { path.metadata().ok()?.modified().ok() };
    let built = modified(binary)?;
    let list = std::fs::read_to_string(list).ok()?;
    let (_, sources) = list.split_once(": ")?;
    sources.split_whitespace().find(|source| modified(Path::new(source)) > Some(built)).map(str::to_owned)
}

/// A command of the program under test that sees nothing of the user's settings and never asks the hub.
#[must_use]
pub fn command() -> Command {
    let mut command = Command::new(binary());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("INGLE_") || name.to_string_lossy().starts_with("HF_") {
            command.env_remove(name);
        }
    }
    command.env("INGLE_OFFLINE", "true").env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Run {
    /// The exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

impl Run {
    /// The one line that begins with `error: `.
    ///
    /// # Panics
    /// If there is none, or more than one, or any sign of a panic.
    #[must_use]
    pub fn error(&self) -> &str {
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "one error line is wanted: {self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        errors[0]
    }
}

/// Runs `ingle` with `args` to its end.
#[must_use]
pub fn ingle(args: &[&str]) -> Run {
    let mut command = command();
    command.args(args);
    run(command)
}

/// Runs `command` to its end.
///
/// # Panics
/// If it does not end in [`PATIENCE`].
#[must_use]
pub fn run(mut command: Command) -> Run {
    let started = Instant::now();
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let stdout = collect(child.stdout.take().expect("piped above"));
    let stderr = collect(child.stderr.take().expect("piped above"));
    let code = wait(&mut child, PATIENCE);
    let took = started.elapsed();
    let _ = child.kill();
    let text = |reader: thread::JoinHandle<String>| reader.join().expect("the reader does not panic");
    let run = Run { code: code.unwrap_or_default(), stdout: text(stdout), stderr: text(stderr), took };
    assert!(code.is_some(), "it did not end: {command:?} {run:?}");
    run
}

/// Waits for the end of `child`: its status, `None` inside if a signal ended it; `None` if it still runs after `limit`.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Option<Option<i32>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("our own child can be waited for") {
            return Some(status.code());
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is worth showing.
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
