//! `ingle doctor`: what this machine offers and what of it is used.

use std::io::Write;

use ingle_engine::{Device, Isa, isa, num_threads, set_num_threads};

use super::load::available_memory_mib;
use crate::cli::DoctorArgs;

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
    match available_memory_mib() {
        Some(mib) => lines.push(("memory", format!("{mib} MiB can be had for weights and cache"))),
        None => lines.push(("memory", "the system does not tell".to_owned())),
    }
    lines.push(("large pages", large_pages()));
    for (name, built, device) in [
        ("cuda", cfg!(feature = "cuda"), Device::new_cuda as fn(usize) -> _),
        ("metal", cfg!(feature = "metal"), Device::new_metal),
    ] {
        let text = if built {
            match device(0) {
                Ok(_) => "a GPU is there and can be used (--device auto takes it)".to_owned(),
                Err(error) => format!("built in, but no GPU can be used: {error}; --device cpu works"),
            }
        } else {
            format!("not in this build (cargo build --features {name})")
        };
        lines.push((name, text));
    }
    let mut out = std::io::stdout().lock();
    for (name, text) in lines {
        writeln!(out, "{name:<16} {text}")?;
    }
    Ok(())
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
