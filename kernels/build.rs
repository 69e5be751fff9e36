//! Compiles `cuda/*.cu` for every generation of GPU that is served, one fat binary a file. Nothing without the feature `cuda`.
//!
//! nvcc is found as `INGLE_NVCC`, which is for these files alone, as `NVCC`, `$CUDA_HOME/bin/nvcc`, `$CUDA_PATH/bin/nvcc`, or
//! on the path; it needs no GPU and no driver.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// Machine code for A100, L4 and RTX 40, H100 and H200, RTX 50; text of the last for whatever comes after.
const ARCHITECTURES: [&str; 4] = ["80", "89", "90a", "120"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for name in ["INGLE_NVCC", "NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=cuda");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1_usize).max(1);
    let nvcc = nvcc();
    let mut running: Vec<(PathBuf, Child)> = Vec::new();
    for source in sources() {
        if running.len() == jobs {
            finish(running.remove(0));
        }
        let target = out.join(source.file_stem().expect("a source has a name")).with_extension("fatbin");
        let child = compile(&nvcc, &source, &target).spawn().unwrap_or_else(|error| {
            panic!("the feature `cuda` needs the CUDA compiler: {} does not start ({error}); set NVCC or CUDA_HOME", nvcc.display())
        });
        running.push((source, child));
    }
    running.into_iter().for_each(finish);
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("INGLE_NVCC").or_else(|| env::var_os("NVCC")) {
        return nvcc.into();
    }
    let home = env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH"));
    home.map_or("nvcc".into(), |home| Path::new(&home).join("bin/nvcc"))
}

/// The `.cu` files, in order of their names.
fn sources() -> Vec<PathBuf> {
    let files = std::fs::read_dir("cuda").expect("the folder of the kernels");
    let mut sources: Vec<PathBuf> = files.filter_map(|file| Some(file.ok()?.path())).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    sources
}

fn compile(nvcc: &Path, source: &Path, target: &Path) -> Command {
    let mut command = Command::new(nvcc);
    command.args(["--fatbin", "-std=c++17", "-O3"]);
    for architecture in ARCHITECTURES {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    let last = ARCHITECTURES[ARCHITECTURES.len() - 1];
    command.arg(format!("-gencode=arch=compute_{last},code=compute_{last}"));
    command.arg("-o").arg(target).arg(source);
    command
}

fn finish((source, mut child): (PathBuf, Child)) {
    let status = child.wait().expect("nvcc is waited for once");
    assert!(status.success(), "nvcc does not compile {}: {status}", source.display());
}
