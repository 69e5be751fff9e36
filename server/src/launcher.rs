//! Two programs behind one name.
//!
//! A build with CUDA is linked to the NVIDIA driver and does not start where there is none, so it is a program of its
//! own, `ingle-cuda`, beside `ingle`. Asked for a GPU, `ingle` becomes that program (the process and its arguments stay
//! the same); asked for one that cannot be had, it says what is missing.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ingle_engine::gpu::{Driver, NoGpu, nvidia};

use crate::cli::{self, DeviceName, bench::BenchCommand};

/// Name of the program with CUDA.
const CUDA_BUILD: &str = "ingle-cuda";
/// Set for a program that was started from here, so that it does not start itself for ever.
const LAUNCHED: &str = "INGLE_LAUNCHED";

/// The program with CUDA that belongs to this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CudaBuild {
    /// It is not there.
    Missing(PathBuf),
    /// It does not run, and why.
    Broken(PathBuf, String),
    /// It is of another version.
    Other(PathBuf, String),
    /// It can be used.
    Ready(PathBuf),
}

impl CudaBuild {
    /// Looks for it beside this program, links resolved, and asks its version: a program whose libraries are missing
    /// does not get that far.
    pub(crate) fn find() -> Self {
        let own = std::env::current_exe().and_then(|path| path.canonicalize()).unwrap_or_default();
        Self::find_at(own.with_file_name(CUDA_BUILD))
    }

    fn find_at(path: PathBuf) -> Self {
        if !path.is_file() {
            return Self::Missing(path);
        }
        let output = match Command::new(&path).arg("--version").env(LAUNCHED, "1").output() {
            Ok(output) => output,
            Err(error) => return Self::Broken(path, error.to_string()),
        };
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let line = said.lines().next().unwrap_or_default().trim().to_owned();
            return Self::Broken(path, if line.is_empty() { output.status.to_string() } else { line });
        }
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if version == own_version() { Self::Ready(path) } else { Self::Other(path, version) }
    }

    /// Why it cannot be used; `None` if it can.
    fn fault(&self) -> Option<String> {
        Some(match self {
            Self::Ready(_) => return None,
            Self::Missing(path) => format!(
                "this build has no CUDA, and {} is not there; `scripts/install --cuda` builds it",
                path.display()
            ),
            Self::Broken(path, why) => format!("{} does not run: {why}", path.display()),
            Self::Other(path, version) => {
                format!("{} is {version}, not {}: install both together", path.display(), own_version())
            }
        })
    }

    /// A line for people.
    pub(crate) fn line(&self) -> String {
        match self {
            Self::Ready(path) => path.display().to_string(),
            other => other.fault().unwrap_or_default(),
        }
    }
}

fn own_version() -> String {
    format!("ingle {}", env!("CARGO_PKG_VERSION"))
}

/// What to do about the device that a command wants.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// Go on in this program, after telling that a GPU is left unused, if one is.
    Stay(Option<String>),
    /// Become that program.
    Become(PathBuf),
    /// The wish cannot be fulfilled.
    Refuse(String),
}

fn choose(device: DeviceName, driver: &Result<Driver, NoGpu>, build: impl FnOnce() -> CudaBuild) -> Choice {
    let wanted = match device {
        DeviceName::Cpu | DeviceName::Metal => return Choice::Stay(None),
        DeviceName::Auto => None,
        DeviceName::Cuda(number) => Some(number),
    };
    let driver = match (driver, wanted) {
        (Ok(driver), _) => driver,
        (Err(_), None) => return Choice::Stay(None),
        (Err(why), Some(_)) => return Choice::Refuse(why.to_string()),
    };
    if let Some(number) = wanted.filter(|number| *number >= driver.gpus.len()) {
        return Choice::Refuse(format!("there is no GPU {number}; the driver knows {}", driver.gpus.len()));
    }
    let build = build();
    match (build.fault(), build) {
        (None, CudaBuild::Ready(path)) => Choice::Become(path),
        (fault, _) => {
            let fault = fault.unwrap_or_default();
            match wanted {
                Some(_) => Choice::Refuse(fault),
                None => {
                    let gpu = driver.gpus.first().map(ToString::to_string).unwrap_or_default();
                    Choice::Stay(Some(format!("a GPU is not used ({gpu}): {fault}")))
                }
            }
        }
    }
}

/// The device that `command` computes on; `None` if it computes nothing.
fn device_of(command: &cli::Command) -> Option<DeviceName> {
    Some(match command {
        cli::Command::Serve(args) => args.load.device,
        cli::Command::Run(args) => args.load.device,
        cli::Command::Perplexity(args) => args.load.device,
        cli::Command::Embed(args) => args.device,
        cli::Command::Check(args) => args.device,
        cli::Command::Bench(args) => match &args.command {
            Some(BenchCommand::Model(args)) => args.load.device,
            _ => return None,
        },
        _ => return None,
    })
}

/// Becomes `ingle-cuda` if `command` wants a GPU that only that program can use. Returns if this one is to go on.
///
/// # Errors
/// What is missing for the GPU that was asked for.
pub fn hand_over(command: &cli::Command) -> anyhow::Result<()> {
    let Some(device) = device_of(command) else { return Ok(()) };
    if cfg!(feature = "cuda")
        || matches!(device, DeviceName::Cpu | DeviceName::Metal)
        || std::env::var_os(LAUNCHED).is_some()
    {
        return Ok(());
    }
    match choose(device, &nvidia(), CudaBuild::find) {
        Choice::Stay(note) => {
            if let Some(note) = note {
                note_on_stderr(&note);
            }
            Ok(())
        }
        Choice::Refuse(why) => anyhow::bail!("--device {device}: {why}; --device cpu always works"),
        Choice::Become(path) => Err(become_it(&path).into()),
    }
}

/// Only returns if it fails.
fn become_it(path: &Path) -> std::io::Error {
    Command::new(path).args(std::env::args_os().skip(1)).env(LAUNCHED, "1").exec()
}

fn note_on_stderr(note: &str) {
    use std::io::Write;
    // Nobody need listen there.
    let _ = writeln!(std::io::stderr(), "note: {note}");
}

#[cfg(test)]
mod tests {
    use ingle_engine::gpu::Gpu;

    use super::*;

    fn driver(gpus: usize) -> Result<Driver, NoGpu> {
        let gpu = Gpu { name: "Test GPU".into(), memory: 8 << 30, compute_capability: (9, 0) };
        Ok(Driver { cuda: (13, 0), gpus: vec![gpu; gpus] })
    }

    #[test]
    fn a_gpu_is_used_if_all_is_there_and_else_said_what_is_missing() {
        let ready = || CudaBuild::Ready("/x/ingle-cuda".into());
        let missing = || CudaBuild::Missing("/x/ingle-cuda".into());
        let none = Err(NoGpu::NoDriver("libcuda.so.1: not found".into()));
        let become_it = Choice::Become("/x/ingle-cuda".into());
        assert_eq!(choose(DeviceName::Auto, &driver(1), ready), become_it);
        assert_eq!(choose(DeviceName::Cuda(1), &driver(2), ready), become_it);
        assert_eq!(choose(DeviceName::Cpu, &driver(1), ready), Choice::Stay(None));
        assert_eq!(choose(DeviceName::Metal, &driver(1), ready), Choice::Stay(None));
        assert_eq!(choose(DeviceName::Auto, &none, ready), Choice::Stay(None));
        let refused = |choice| match choice {
            Choice::Refuse(why) => why,
            other => panic!("{other:?}"),
        };
        assert!(
            refused(choose(DeviceName::Cuda(0), &none, ready)).contains("no NVIDIA driver: libcuda.so.1")
        );
        assert!(refused(choose(DeviceName::Cuda(2), &driver(2), ready)).contains("there is no GPU 2"));
        let why = refused(choose(DeviceName::Cuda(0), &driver(1), missing));
        assert!(why.contains("/x/ingle-cuda is not there; `scripts/install --cuda`"), "{why}");
        let other = || CudaBuild::Other("/x/ingle-cuda".into(), "ingle 0.0.1".into());
        assert!(
            refused(choose(DeviceName::Cuda(0), &driver(1), other)).contains("is ingle 0.0.1, not ingle")
        );
        match choose(DeviceName::Auto, &driver(1), missing) {
            Choice::Stay(Some(note)) => assert!(note.contains("Test GPU, 8 GiB, compute capability 9.0")),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_program_that_does_not_start_is_told_from_one_that_does() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ingle-cuda");
        let draft = folder.path().join("draft");
        let put = |text: &str| {
            std::fs::write(&draft, text).unwrap();
            std::fs::set_permissions(&draft, PermissionsExt::from_mode(0o755)).unwrap();
            // Another process writes it: a child that another test forks meanwhile would keep our file open for
            // writing, and what is open for writing cannot be executed.
            let copied = Command::new("cp").arg(&draft).arg(&path).status().unwrap();
            assert!(copied.success());
            CudaBuild::find_at(path.clone())
        };
        assert_eq!(CudaBuild::find_at(path.clone()), CudaBuild::Missing(path.clone()));
        let own = own_version();
        assert_eq!(put(&format!("#!/bin/sh\necho {own}\n")), CudaBuild::Ready(path.clone()));
        assert_eq!(
            put("#!/bin/sh\necho ingle 0.0.0\n"),
            CudaBuild::Other(path.clone(), "ingle 0.0.0".into())
        );
        let why = "libcublas.so.13: cannot open shared object file";
        assert_eq!(
            put(&format!("#!/bin/sh\necho {why} >&2\nexit 127\n")),
            CudaBuild::Broken(path.clone(), why.into())
        );
    }
}
