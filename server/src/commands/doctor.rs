//! `ingle doctor`: what this machine offers and what of it is used.

use std::io::Write;

use ingle_engine::{Isa, gpu, isa, num_threads, set_num_threads};

use super::memory::available_mib;
use crate::cli::DoctorArgs;
use crate::launcher::CudaBuild;

/// Prints a report, with advice where something is not as good as it could be.
///
/// # Errors
/// If standard output cannot be written.
pub fn doctor(args: &DoctorArgs) -> anyhow::Result<()> {
    set_num_threads(args.threads);
    let mut lines =
        vec![("ingle", format!("{}, built for {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH))];
    let (used, available) = (isa(), Isa::available());
    let names = |sets: &[Isa]| sets.iter().map(|set| set.name()).collect::<Vec<_>>().join(", ");
    lines.push((
        "instruction set",
        format!("{} in use; this processor has {}", used.name(), names(&available)),
    ));
    lines.push(("", used.explanation().to_owned()));
    if let Ok(wanted) = std::env::var("INGLE_ISA") {
        if wanted != used.name() {
            lines.push(("advice", format!("INGLE_ISA={wanted} is not among them and has no effect")));
        } else if used != available[0] {
            lines.push(("advice", format!("INGLE_ISA={wanted} holds back {}", available[0].name())));
        }
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    lines.push((
        "threads",
        format!("{} compute; this process may use {processors} processors", num_threads()),
    ));
    if num_threads() > processors {
        lines.push((
            "advice",
            "more threads than processors wait for each other: leave --threads at 0".to_owned(),
        ));
    }
    match available_mib() {
        Some(mib) => lines.push(("memory", format!("{mib} MiB can be had for weights and cache"))),
        None => lines.push(("memory", "the system does not tell".to_owned())),
    }
    lines.push(("large pages", large_pages()));
    lines.extend(nvidia_lines());
    lines.push((
        "metal",
        match (cfg!(feature = "metal"), gpu::open_metal()) {
            (false, _) => "not in this build (cargo build --features metal)".to_owned(),
            (true, Ok(_)) => "a GPU is there and can be used (--device auto takes it)".to_owned(),
            (true, Err(error)) => format!("built in, but no GPU can be used: {error}; --device cpu works"),
        },
    ));
    let mut out = std::io::stdout().lock();
    for (name, text) in lines {
        writeln!(out, "{name:<16} {text}")?;
    }
    Ok(())
}

/// The driver, its GPUs, the program that can use them, and what comes of it.
fn nvidia_lines() -> Vec<(&'static str, String)> {
    let driver = gpu::nvidia();
    let mut lines = vec![(
        "nvidia driver",
        match &driver {
            Ok(driver) => format!("runs CUDA {}.{} and older", driver.cuda.0, driver.cuda.1),
            Err(why) => why.to_string(),
        },
    )];
    for (number, gpu) in driver.iter().flat_map(|driver| &driver.gpus).enumerate() {
        lines.push(("", format!("cuda:{number} {gpu}")));
    }
    let build = CudaBuild::find();
    lines.push(("cuda build", if cfg!(feature = "cuda") { "this program".to_owned() } else { build.line() }));
    let verdict = match driver {
        Err(_) => "not used: there is no GPU; --device auto computes on the CPU".to_owned(),
        Ok(_) if cfg!(feature = "cuda") => match opened() {
            Ok(memory) => format!("used by --device auto: {memory}"),
            Err(error) => format!("not used: {error}; --device cpu works"),
        },
        Ok(_) => match build {
            CudaBuild::Ready(_) => "used by --device auto, through the program above".to_owned(),
            _ => "not used: the program above cannot; --device auto computes on the CPU".to_owned(),
        },
    };
    lines.push(("cuda", verdict));
    lines
}

/// Opens the first GPU, as a model would, and tells its memory.
fn opened() -> anyhow::Result<String> {
    let memory = gpu::device_memory(&gpu::open_cuda(0)?)?;
    Ok(memory.map_or_else(String::new, |memory| {
        format!("{} of {} MiB of its memory are free", memory.free >> 20, memory.total >> 20)
    }))
}

/// Whether the system gives weights pages of 2 MiB.
fn large_pages() -> String {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    match std::fs::read_to_string(path) {
        Ok(text) if text.contains("[never]") => {
            format!("off; decoding is some percent faster with `echo madvise > {path}`")
        }
        Ok(_) => "used for weights".to_owned(),
        Err(_) => "not of this system".to_owned(),
    }
}
