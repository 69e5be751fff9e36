//! The machine and the program that a result was made with: it means nothing without them.

use serde::{Deserialize, Serialize};

/// Where and with what a result was made.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Environment {
    /// When, in UTC.
    pub date: String,
    /// Version of the benchmark.
    pub ingle_version: String,
    /// The command line, secrets left out.
    pub command: Vec<String>,
    /// Name of the processor.
    pub cpu: String,
    /// Processors that this process may use.
    pub num_cpus: usize,
    /// Instruction sets of the processor that matter here.
    pub cpu_features: Vec<String>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Operating system and kernel.
    pub os: String,
    /// Load average of the last minute when the benchmark began: other work falsifies figures.
    pub load_average: f64,
}

/// Features of x86 and Arm processors that decide how fast a model runs, as the kernel spells them.
const FEATURES: [&str; 12] = [
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
];

impl Environment {
    /// What this machine says of itself; what it does not say is empty.
    #[must_use]
    pub fn detect() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line =
                cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
        };
        let flags = field("flags").or_else(|| field("Features")).unwrap_or_default();
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let memory = read("/proc/meminfo");
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let memory = memory.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        let release = read("/proc/sys/kernel/osrelease");
        Self {
            date: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            ingle_version: env!("CARGO_PKG_VERSION").to_owned(),
            command: command(std::env::args()),
            cpu: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            num_cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu_features: FEATURES
                .iter()
                .filter(|name| flags.contains(name))
                .map(ToString::to_string)
                .collect(),
            memory_mib: memory.unwrap_or(0) >> 10,
            os: format!("{} {}", std::env::consts::OS, release.trim()).trim().to_owned(),
            load_average: read("/proc/loadavg")
                .split_whitespace()
                .next()
                .and_then(|first| first.parse().ok())
                .unwrap_or(0.0),
        }
    }

    /// One line for people.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "{}, {} processors ({}), {:.0} GiB, {}; ingle {}; {}; load {:.1} at start",
            self.cpu,
            self.num_cpus,
            self.cpu_features.join(" "),
            self.memory_mib as f64 / 1024.0,
            self.os,
            self.ingle_version,
            self.date,
            self.load_average,
        )
    }
}

/// The arguments without keys and headers, which are secrets, and with the program's name alone for its path.
fn command(args: impl Iterator<Item = String>) -> Vec<String> {
    let mut hide = false;
    let mut shown = Vec::new();
    for (idx, arg) in args.enumerate() {
        let (name, value) =
            arg.split_once('=').map_or((arg.as_str(), None), |(name, value)| (name, Some(value)));
        let secret = ["--api-key", "--header", "--hf-token"].contains(&name);
        shown.push(if std::mem::take(&mut hide) {
            "***".to_owned()
        } else if secret && value.is_some() {
            format!("{name}=***")
        } else if idx == 0 {
            arg.rsplit('/').next().unwrap_or_default().to_owned()
        } else {
            hide = secret;
            arg
        });
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_kept() {
        let args = ["bin/ingle", "bench", "--api-key", "k", "--header=x:y", "--url", "http://a"];
        let shown = command(args.iter().map(ToString::to_string));
        assert_eq!(shown, ["ingle", "bench", "--api-key", "***", "--header=***", "--url", "http://a"]);
    }

    #[test]
    fn the_machine_is_told() {
        let environment = Environment::detect();
        assert!(environment.num_cpus > 0 && !environment.cpu.is_empty(), "{environment:?}");
        assert!(environment.line().contains(env!("CARGO_PKG_VERSION")));
    }
}
