//! How much memory this process may still take: what the machine has, within the limits of its control groups.

use std::path::{Component, Path};

/// Names of the limit and of what is used, in both versions of control groups.
const V2: [&str; 2] = ["memory.max", "memory.current"];
const V1: [&str; 2] = ["memory.limit_in_bytes", "memory.usage_in_bytes"];

/// MiB that can be had without swapping.
pub(super) fn available_mib() -> Option<usize> {
    available(Path::new("/")).map(|bytes| bytes >> 20)
}

/// The same in bytes, as the files under `root` say.
fn available(root: &Path) -> Option<usize> {
    let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().trim_end_matches(" kB").parse().ok()?;
    let machine = kib.saturating_mul(1 << 10);
    Some(of_groups(root).map_or(machine, |group| group.min(machine)))
}

/// The least that any group above this process leaves; `None` if none has a limit.
fn of_groups(root: &Path) -> Option<usize> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounted = root.join("sys/fs/cgroup");
    let least = |line: &str| {
        // `0::PATH` of version 2, `NUMBER:CONTROLLERS:PATH` of version 1.
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        match controllers {
            "" => least_on_the_way(&mounted, Path::new(path), V2),
            _ if controllers.split(',').any(|name| name == "memory") => {
                least_on_the_way(&mounted.join("memory"), Path::new(path), V1)
            }
            _ => None,
        }
    };
    groups.lines().filter_map(least).min()
}

/// The least that is left from the group at `path` up to `top`. In a container the path may be that of the host, of
/// which only the end is mounted, as the top: groups that are not there are passed over.
fn least_on_the_way(top: &Path, path: &Path, [limit, used]: [&str; 2]) -> Option<usize> {
    let inside: std::path::PathBuf =
        path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let left = |group: &Path| {
        let number = |file: &str| {
            std::fs::read_to_string(top.join(group).join(file)).ok()?.trim().parse::<usize>().ok()
        };
        // `max` is no number: no limit.
        Some(number(limit)?.saturating_sub(number(used).unwrap_or(0)))
    };
    inside.ancestors().filter_map(left).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// A root with 1000 MiB to be had and these files, whose numbers are MiB.
    fn root(cgroup: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("folders");
            std::fs::write(path, text).expect("written");
        };
        write("proc/meminfo", "MemTotal:  4096000 kB\nMemAvailable:  1024000 kB\n");
        write("proc/self/cgroup", cgroup);
        for (path, value) in files {
            let text = value.parse::<usize>().map_or((*value).to_owned(), |mib| (mib * MIB).to_string());
            write(&format!("sys/fs/cgroup/{path}"), &format!("{text}\n"));
        }
        dir
    }

    fn mib(cgroup: &str, files: &[(&str, &str)]) -> Option<usize> {
        available(root(cgroup, files).path()).map(|bytes| bytes / MIB)
    }

    #[test]
    fn the_machine_is_the_bound_where_no_group_has_one() {
        assert_eq!(mib("", &[]), Some(1000));
        assert_eq!(mib("0::/a\n", &[("a/memory.max", "max"), ("a/memory.current", "900")]), Some(1000));
        assert_eq!(mib("0::/a\n", &[("a/memory.max", "8000")]), Some(1000));
        assert_eq!(available(Path::new("/nowhere")), None);
    }

    #[test]
    fn the_least_group_on_the_way_counts() {
        let files = [
            ("system.slice/ingle.service/memory.max", "800"),
            ("system.slice/ingle.service/memory.current", "100"),
            ("system.slice/memory.max", "600"),
            ("system.slice/memory.current", "350"),
            ("other/memory.max", "1"),
        ];
        assert_eq!(mib("0::/system.slice/ingle.service\n", &files), Some(250));
        assert_eq!(mib("0::/\n", &files), Some(1000));
        let full = [("memory.max", "10"), ("memory.current", "20")];
        assert_eq!(mib("0::/\n", &full), Some(0));
    }

    #[test]
    fn in_a_container_the_top_counts() {
        let files = [("memory.max", "300"), ("memory.current", "50")];
        assert_eq!(mib("0::/kubepods/pod1/abc\n", &files), Some(250));
        assert_eq!(mib("0::/../abc\n", &files), Some(250));
    }

    #[test]
    fn version_1_is_read_too() {
        let cgroup = "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/a\n";
        let files = [
            ("memory/docker/abc/memory.limit_in_bytes", "500"),
            ("memory/docker/abc/memory.usage_in_bytes", "100"),
            ("cpu,cpuacct/a/memory.limit_in_bytes", "1"),
        ];
        assert_eq!(mib(cgroup, &files), Some(400));
    }
}
