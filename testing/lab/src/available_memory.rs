//! Available memory of this machine. Without this check, the kernel would kill a guest, or another
//! process, in the middle of its work.

use crate::error::{Context, LabError, Result};

/// The kernel's estimate of available memory.
const MEMORY: &str = "/proc/meminfo";

/// Checks that this machine has this much memory available.
pub(crate) fn check(needed_mib: u64) -> Result<()> {
    let text = std::fs::read_to_string(MEMORY).context(|| format!("read {MEMORY}"))?;
    let available_mib = available_mib(&text).ok_or_else(|| LabError::Unexpected {
        what: MEMORY.to_owned(),
        detail: "it has no line MemAvailable".to_owned(),
    })?;
    if available_mib >= needed_mib {
        return Ok(());
    }
    Err(LabError::Host {
        what: format!("give guests {needed_mib} MiB of memory"),
        advice: format!("it has {available_mib} MiB available"),
    })
}

fn available_mib(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       24684328 kB\nMemAvailable:    2098176 kB\nBuffers:  4 kB\n";
        assert_eq!(available_mib(text), Some(2049));
        assert_eq!(available_mib("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn too_little_memory_is_an_error() {
        check(1).unwrap();
        let error = check(1 << 40).unwrap_err().to_string();
        assert!(error.contains("MiB available"), "{error}");
    }
}
