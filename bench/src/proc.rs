//! What the kernel says of a process: CPU time and memory, from `/proc/PID`.

use anyhow::{Context, Result};
use std::time::Duration;

/// CPU time (user and system, all threads, also those that have ended) that process `pid` has used so far. Resolution: one
/// clock tick, 10 ms on all usual kernels.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("can't read {path}: has the process ended?"))?;
    let ticks = parse_stat(&text).with_context(|| format!("{path} is not in the form that proc(5) describes"))?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// [`cpu_time`] of all of `pids` together.
pub(crate) fn cpu_time_of(pids: &[u32]) -> Result<Duration> {
    pids.iter().map(|pid| cpu_time(*pid)).sum()
}

/// Resident memory of process `pid` in KiB.
pub(crate) fn rss_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("can't read {path}: has the process ended?"))?;
    parse_rss(&text).with_context(|| format!("{path} has no VmRSS"))
}

/// `utime + stime` of a `/proc/PID/stat` line. The second field is the command in parentheses, and may itself hold spaces and
/// parentheses: fields are counted from the last `)`.
fn parse_stat(text: &str) -> Option<u64> {
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    // Field 3 (state) is the first here; utime is field 14, stime 15.
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn parse_rss(text: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_fields_are_found_behind_any_command_name() {
        let line = "4711 (a) b (c) S 1 4711 4711 0 -1 4194560 900 0 3 0 123 45 7 8 20 0 1 0 900 1 2 3";
        assert_eq!(parse_stat(line), Some(168));
        assert_eq!(parse_stat("4711 (short) S 1 2"), None);
        assert_eq!(parse_stat("nothing"), None);
    }

    #[test]
    fn resident_memory_is_read_in_kib() {
        assert_eq!(parse_rss("Name:\tx\nVmHWM:\t 9 kB\nVmRSS:\t   68432 kB\n"), Some(68432));
        assert_eq!(parse_rss("Name:\tkthread\n"), None);
    }

    #[test]
    fn this_process_has_used_what_it_burns() {
        let pid = std::process::id();
        let before = cpu_time(pid).unwrap();
        let start = std::time::Instant::now();
        let mut x = 1u64;
        while cpu_time(pid).unwrap() < before + Duration::from_millis(50) {
            x = std::hint::black_box(x.wrapping_mul(3));
            assert!(start.elapsed() < Duration::from_secs(20), "CPU time stands still");
        }
        assert!(rss_kib(pid).unwrap() > 100);
    }
}
