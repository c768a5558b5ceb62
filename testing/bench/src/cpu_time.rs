//! CPU time of processes, by thread.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Result, host};

/// Part of the name of a vCPU thread of QEMU that was started with `debug-threads=on`.
const VCPU_THREAD: &str = "/TCG";

/// CPU time in milliseconds, user and system.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct CpuTime {
    /// vCPU threads.
    pub(crate) vcpu_ms: f64,
    /// All other threads.
    pub(crate) other_ms: f64,
}

/// CPU time of each thread of some processes so far.
#[derive(Clone, Debug)]
pub(crate) struct CpuClock(BTreeMap<PathBuf, (String, f64)>);

impl CpuClock {
    /// Reads the threads of these processes (proc(5), `schedstat`: the first number is the time on
    /// a CPU in ns).
    pub(crate) fn read(processes: &[u32]) -> Result<Self> {
        let failed = host("reading CPU times of threads");
        let mut threads = BTreeMap::new();
        for process in processes {
            for task in fs::read_dir(format!("/proc/{process}/task")).map_err(failed)? {
                let path = task.map_err(failed)?.path();
                // A thread that ends meanwhile was idle.
                if let Some(used) = thread(&path) {
                    threads.insert(path, used);
                }
            }
        }
        Ok(Self(threads))
    }

    /// CPU time of the calling thread so far, in milliseconds.
    pub(crate) fn own_ms() -> f64 {
        thread(Path::new("/proc/thread-self")).map_or(0.0, |(_, ms)| ms)
    }

    /// CPU time of the existing threads since `before`. That of threads that have ended since is
    /// missing.
    pub(crate) fn since(&self, before: &Self) -> CpuTime {
        let mut used = CpuTime::default();
        for (path, (name, ms)) in &self.0 {
            let ms = ms - before.0.get(path).map_or(0.0, |(_, before)| *before);
            match name.contains(VCPU_THREAD) {
                true => used.vcpu_ms += ms,
                false => used.other_ms += ms,
            }
        }
        used
    }
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of one run")]
fn thread(task: &Path) -> Option<(String, f64)> {
    let name = fs::read_to_string(task.join("comm")).ok()?;
    let times = fs::read_to_string(task.join("schedstat")).ok()?;
    let ns: u64 = times.split_whitespace().next()?.parse().ok()?;
    Some((name.trim().to_owned(), ns as f64 / 1e6))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn busy_threads_have_cpu_time_and_sleeping_ones_none() {
        let me = std::process::id();
        let before = CpuClock::read(&[me]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let began = Instant::now();
        let mut turns = 0u64;
        while began.elapsed() < Duration::from_millis(50) {
            turns = turns.wrapping_add(1);
        }
        let used = CpuClock::read(&[me]).unwrap().since(&before);
        assert!(used.other_ms >= 20.0, "{used:?} for {turns} turns");
        assert_eq!(used.vcpu_ms, 0.0);
    }
}
