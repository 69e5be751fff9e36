//! `ingle` and `ingle-cuda`: which of the two computes, and what is said when neither can use a GPU.
//!
//! The driver is a library of a few lines, compiled here; `ingle-cuda` is a script that says what it was called with.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use ingle_tests::{TinyModel, binary, command, run};

/// A driver of one GPU, or of none that works.
const DRIVER: &str = r#"
typedef unsigned long size;
#ifndef REFUSES
#define REFUSES 0
#endif
int cuInit(unsigned flags) { return REFUSES; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int len, int device) {
  const char *from = "Test GPU";
  int i = 0;
  for (; from[i] && i + 1 < len; i++) name[i] = from[i];
  name[i] = 0;
  return 0;
}
int cuDeviceTotalMem_v2(size *bytes, int device) { *bytes = 24ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 9; return 0; }
int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
"#;

/// A copy of the program in a folder of its own, with what lies beside it.
struct Installed(tempfile::TempDir);

impl Installed {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        copy(binary(), &folder.path().join("ingle"));
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Puts a driver where `ingle` finds it.
    fn driver(&self, define: &str) {
        let source = self.path("driver.c");
        std::fs::write(&source, DRIVER).expect("written");
        let mut cc = Command::new("cc");
        cc.args(["-w", "-shared", "-fPIC", define, "-o"]).arg(self.path("libcuda.so.1")).arg(&source);
        assert!(cc.status().expect("a C compiler").success());
    }

    /// Puts an `ingle-cuda` beside it.
    fn cuda_build(&self, version: &str) {
        let text = format!(
            "#!/bin/sh\nif [ \"$1\" = --version ]; then echo ingle {version}; exit; fi\necho called: \"$@\"\n"
        );
        let draft = self.path("draft");
        std::fs::write(&draft, text).expect("written");
        copy(&draft, &self.path("ingle-cuda"));
    }

    fn run(&self, args: &[&str]) -> ingle_tests::Run {
        let mut ingle = Command::new(self.path("ingle"));
        for (name, value) in command().get_envs() {
            match value {
                Some(value) => ingle.env(name, value),
                None => ingle.env_remove(name),
            };
        }
        ingle.args(args).env("LD_LIBRARY_PATH", self.0.path());
        run(ingle)
    }
}

/// Copied by another process: a child forked by another test would keep our file open for writing, and what is open
/// for writing cannot be executed.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("install").args(["-m", "755"]).args([from, to]).status();
    assert!(status.expect("install").success());
}

#[test]
fn a_gpu_and_its_program_are_used_when_both_are_there() {
    let model = TinyModel::llama();
    let installed = Installed::new();
    let args = ["run", model.arg(), "Hello", "-n", "2"];
    let on = |device| installed.run(&[&args[..], &["--device", device]].concat());

    // Nothing is there: auto computes here, cuda is refused.
    let told = installed.run(&args);
    assert!(told.code == Some(0) && !told.stderr.contains("note:"), "{told:?}");
    let told = on("cuda");
    assert_eq!(told.code, Some(1), "{told:?}");
    for word in ["--device cuda:0", "no NVIDIA driver", "libcuda.so.1", "--device cpu"] {
        assert!(told.error().contains(word), "{word}: {told:?}");
    }

    // A GPU, but no program for it.
    installed.driver("-DREFUSES=0");
    let told = installed.run(&args);
    assert_eq!(told.code, Some(0), "{told:?}");
    assert!(
        told.stderr.contains("note: a GPU is not used (Test GPU, 24 GiB, compute capability 8.9)"),
        "{told:?}"
    );
    let told = on("cuda");
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(
        told.error().contains("scripts/install --cuda") && told.error().contains("--device cpu"),
        "{told:?}"
    );
    let told = installed.run(&["doctor"]);
    for word in ["runs CUDA 13.0", "cuda:0 Test GPU, 24 GiB", "ingle-cuda is not there", "not used"] {
        assert!(told.stdout.contains(word), "{word}: {told:?}");
    }

    // Both.
    installed.cuda_build(env!("CARGO_PKG_VERSION"));
    for device in ["auto", "cuda", "cuda:0"] {
        let told = on(device);
        assert_eq!(told.code, Some(0), "{told:?}");
        let wanted = format!("called: run {} Hello -n 2 --device {device}\n", model.arg());
        assert_eq!(told.stdout, wanted, "{told:?}");
    }
    assert!(!on("cpu").stdout.contains("called:"));
    let told = on("cuda:1");
    assert!(told.code == Some(1) && told.error().contains("there is no GPU 1"), "{told:?}");
    let told = installed.run(&["doctor"]);
    assert!(told.stdout.contains("used by --device auto, through the program above"), "{told:?}");

    // A program of another version is not trusted.
    installed.cuda_build("0.0.1");
    let told = on("cuda");
    assert!(told.code == Some(1) && told.error().contains("is ingle 0.0.1"), "{told:?}");
    assert!(on("auto").stderr.contains("note: a GPU is not used"));
}

#[test]
fn a_driver_without_a_gpu_is_told() {
    let model = TinyModel::llama();
    let installed = Installed::new();
    installed.driver("-DREFUSES=100");
    installed.cuda_build(env!("CARGO_PKG_VERSION"));
    let told = installed.run(&["run", model.arg(), "Hello", "-n", "2", "--device", "cuda"]);
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(told.error().contains("cuInit says CUDA_ERROR_NO_DEVICE (100)"), "{told:?}");
    let told = installed.run(&["run", model.arg(), "Hello", "-n", "2"]);
    assert!(told.code == Some(0) && !told.stdout.contains("called:"), "{told:?}");
}

#[test]
fn a_device_that_is_none_is_a_wrong_flag() {
    let mut wrong = command();
    wrong.args(["run", "model", "Hello", "--device", "gpu"]);
    let told = run(wrong);
    assert_eq!(told.code, Some(2), "{told:?}");
    assert!(told.stderr.contains("auto, cpu, cuda, cuda:N or metal"), "{told:?}");
}
