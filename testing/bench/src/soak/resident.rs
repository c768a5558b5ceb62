//! Memory of the back end process over time, and whether it grows.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::proc_text::kib;

/// Between two samples.
const PERIOD: Duration = Duration::from_secs(1);

/// Maximum rise of the fitted line over all samples, in bytes, for flat memory.
///
/// The back end keeps a few page sets with at most one bit per guest page, 32 KiB for 1 GiB, and
/// answers of about 100 KiB for the duration of a request. So several hundred KiB come and go with
/// the guest's activity, and 512 KiB are more than that. A leak per step adds up: 512 KiB in an
/// hour with three steps a second is 50 bytes a step.
///
/// Over an hour with four guests, the line of the heap rose by 272 to 444 KiB, most of it in the
/// first ten minutes, until the allocator's per-thread arenas reach their size.
pub const MAX_RISE_BYTES: f64 = (512 << 10) as f64;

/// The part of the run whose samples are ignored: buffers and the allocator's arenas reach their
/// size.
const WARM_UP_DIVISOR: u32 = 5;
const MAX_WARM_UP: Duration = Duration::from_secs(60);

/// Memory of a process at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Time since the first sample.
    pub at: Duration,
    /// Heap and stacks.
    pub own_bytes: u64,
    /// Resident pages of the program and its libraries, which the kernel may drop.
    pub program_bytes: u64,
    /// Guest memory resident through its mapping.
    pub guest_bytes: u64,
}

/// Memory of a process over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Resident {
    /// Number of samples after the warm-up.
    pub samples: usize,
    /// Time that they cover.
    pub minutes: f64,
    /// First sample of heap and stacks, in bytes.
    pub start_bytes: u64,
    /// Maximum.
    pub highest_bytes: u64,
    /// Last sample.
    pub end_bytes: u64,
    /// Least-squares slope.
    pub slope_bytes_per_minute: f64,
    /// Rise of that line from the first sample to the last.
    pub rise_bytes: f64,
    /// Whether the rise is at most [`MAX_RISE_BYTES`].
    pub flat: bool,
    /// Maximum resident bytes of the program.
    pub program_highest_bytes: u64,
    /// Maximum guest memory resident through the process's mapping.
    pub guest_highest_bytes: u64,
}

impl Resident {
    /// Summarises the samples of a run.
    pub fn of(samples: &[Sample]) -> Self {
        let end = samples.last().map_or(Duration::ZERO, |sample| sample.at);
        let warm = (end / WARM_UP_DIVISOR).min(MAX_WARM_UP);
        let counted: Vec<_> = samples.iter().copied().filter(|sample| sample.at >= warm).collect();
        let (Some(first), Some(last)) = (counted.first(), counted.last()) else {
            return Self::default();
        };
        let minutes = (last.at - first.at).as_secs_f64() / 60.0;
        let slope_bytes_per_minute = slope_per_minute(&counted);
        let rise_bytes = slope_bytes_per_minute * minutes;
        let highest = |of: fn(&Sample) -> u64| counted.iter().map(of).max().unwrap_or(0);
        Self {
            samples: counted.len(),
            minutes,
            start_bytes: first.own_bytes,
            highest_bytes: highest(|sample| sample.own_bytes),
            end_bytes: last.own_bytes,
            slope_bytes_per_minute,
            rise_bytes,
            flat: rise_bytes <= MAX_RISE_BYTES,
            program_highest_bytes: highest(|sample| sample.program_bytes),
            guest_highest_bytes: highest(|sample| sample.guest_bytes),
        }
    }
}

/// Slope of the least-squares line, in bytes per minute; 0 with fewer than two different times.
#[expect(clippy::cast_precision_loss, reason = "bytes of a process are far below 2^53")]
fn slope_per_minute(samples: &[Sample]) -> f64 {
    let points = || samples.iter().map(|s| (s.at.as_secs_f64() / 60.0, s.own_bytes as f64));
    let count = samples.len() as f64;
    let mean_time = points().map(|(time, _)| time).sum::<f64>() / count;
    let mean_bytes = points().map(|(_, bytes)| bytes).sum::<f64>() / count;
    let together: f64 =
        points().map(|(time, bytes)| (time - mean_time) * (bytes - mean_bytes)).sum();
    let spread: f64 = points().map(|(time, _)| (time - mean_time).powi(2)).sum();
    if spread > 0.0 { together / spread } else { 0.0 }
}

/// Samples a process once a second in a thread.
pub struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<Vec<Sample>>,
}

impl Watch {
    /// Starts to sample the process `pid`.
    pub fn start(pid: u32) -> Self {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let began = Instant::now();
            let mut samples = Vec::new();
            loop {
                samples.extend(sample(pid, began.elapsed()));
                if stopped.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout) {
                    return samples;
                }
            }
        });
        Self { stop, thread }
    }

    /// Stops and returns the samples.
    pub fn end(self) -> Vec<Sample> {
        drop(self.stop);
        self.thread.join().unwrap_or_default()
    }
}

/// `None` if the process has ended.
fn sample(pid: u32, at: Duration) -> Option<Sample> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?, at)
}

fn parse(status: &str, at: Duration) -> Option<Sample> {
    let bytes = |name: &str| Some(kib(status, name)? << 10);
    Some(Sample {
        at,
        own_bytes: bytes("RssAnon")?,
        program_bytes: bytes("RssFile")?,
        guest_bytes: bytes("RssShmem")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One sample a second.
    fn series(seconds: u64, own_bytes: impl Fn(u64) -> u64) -> Vec<Sample> {
        let sample = |second| Sample {
            at: Duration::from_secs(second),
            own_bytes: own_bytes(second),
            program_bytes: 5,
            guest_bytes: 7,
        };
        (0..seconds).map(sample).collect()
    }

    #[test]
    fn the_slope_is_that_of_the_line() {
        let samples = series(600, |second| 1000 + 20 * second);
        let resident = Resident::of(&samples);
        assert!((resident.slope_bytes_per_minute - 1200.0).abs() < 1e-6, "{resident:?}");
        assert_eq!((resident.start_bytes, resident.end_bytes), (1000 + 20 * 60, 1000 + 20 * 599));
        assert_eq!((resident.program_highest_bytes, resident.guest_highest_bytes), (5, 7));
    }

    #[test]
    fn varying_memory_is_flat_and_growing_memory_is_not() {
        let wave = |second: u64| (10 << 20) + (second * 7919 % 61) * (400 << 10) / 61;
        assert!(Resident::of(&series(180, wave)).flat);
        assert!(Resident::of(&series(3600, wave)).flat);
        // A leak of 64 bytes in each of 4 steps per second.
        assert!(!Resident::of(&series(3600, |second| wave(second) + 256 * second)).flat);
        // A leak of a page per second, in the shortest run.
        assert!(!Resident::of(&series(180, |second| wave(second) + 4096 * second)).flat);
        // Falling memory is no problem.
        assert!(Resident::of(&series(180, |second| (90 << 20) - 4096 * second)).flat);
    }

    #[test]
    fn the_warm_up_is_ignored() {
        let step = |second: u64| if second < 60 { second << 20 } else { 60 << 20 };
        assert_eq!(Resident::of(&series(3600, step)).rise_bytes, 0.0);
        assert!(!Resident::of(&series(100, step)).flat);
    }

    #[test]
    fn few_samples_have_no_slope() {
        assert_eq!(Resident::of(&[]), Resident::default());
        assert!(!Resident::default().flat, "there are no samples");
        let one = Resident::of(&series(1, |_| 5));
        assert_eq!((one.slope_bytes_per_minute, one.highest_bytes), (0.0, 5));
    }

    #[test]
    fn proc_status_is_parsed() {
        let status =
            "Name:\tx\nVmRSS:\t 9 kB\nRssAnon:\t 2 kB\nRssFile:\t 3 kB\nRssShmem:\t 4 kB\n";
        let sample = parse(status, Duration::ZERO).unwrap();
        assert_eq!((sample.own_bytes, sample.program_bytes), (2 << 10, 3 << 10));
        assert_eq!(sample.guest_bytes, 4 << 10);
        assert_eq!(parse("Name:\tx\n", Duration::ZERO), None);
        assert!(super::sample(std::process::id(), Duration::ZERO).unwrap().own_bytes > 0);
    }
}
