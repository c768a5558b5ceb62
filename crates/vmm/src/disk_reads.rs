//! Reads disks in separate threads, with time limits.
//!
//! A file system that does not answer blocks its caller without end. So each disk is read in its
//! own thread, one at a time, which is abandoned if it does not return.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::block::{DiskFile, DiskOptions};
use crate::error::Error;

/// How often a wait checks its conditions.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Stack of a thread that syncs or reads a disk.
pub(crate) const STACK_BYTES: usize = 128 << 10;

/// How long one read may take: as long as a disk may take to pause.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(4);

/// To open the disks.
pub(crate) const OPEN: Limits = Limits { one: READ_TIMEOUT, all: READ_TIMEOUT };

/// Time limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// For one read. A disk that does not answer for this long would not finish a request of the
    /// guest either.
    pub(crate) one: Duration,
    /// For all disks together.
    pub(crate) all: Duration,
}

/// Opens the disks of a machine.
///
/// # Errors
/// A disk cannot be opened, has an invalid size, or does not answer.
pub(crate) fn open(options: &[DiskOptions]) -> Result<Vec<Arc<DiskFile>>, Error> {
    let paths: Vec<_> = options.iter().map(|disk| disk.path.as_path()).collect();
    let owned: Arc<[DiskOptions]> = options.into();
    let open = move |index: usize, _: &dyn Fn() -> io::Result<()>| {
        owned.get(index).map(|disk| DiskFile::open(disk).map(Arc::new))
    };
    let opened = each_in_time(&paths, OPEN, || true, open)?.into_iter().zip(&paths);
    let late = |path: &Path| {
        let (path, ms) = (path.display(), OPEN.all.as_millis());
        Error::Stuck { what: format!("{path} was not opened in {ms} ms") }
    };
    opened.map(|(found, path)| found.flatten().unwrap_or_else(|| Err(late(path)))).collect()
}

/// Disks that are being read, by number and path. They may include those of an earlier migration
/// that failed, which the next one uses again.
static ACTIVE_READS: Mutex<BTreeSet<(usize, PathBuf)>> = Mutex::new(BTreeSet::new());

fn active_reads() -> MutexGuard<'static, BTreeSet<(usize, PathBuf)>> {
    ACTIVE_READS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Marks a disk as being read, until dropped.
struct ActiveRead((usize, PathBuf));

impl ActiveRead {
    /// # Errors
    /// It is being read already.
    fn take(number: usize, path: &Path) -> Result<Self, Error> {
        let key = (number, path.to_path_buf());
        if active_reads().insert(key.clone()) {
            return Ok(Self(key));
        }
        let what = format!("{}: an earlier read has not returned yet", path.display());
        Err(Error::Stuck { what })
    }
}

impl Drop for ActiveRead {
    fn drop(&mut self) {
        active_reads().remove(&self.0);
    }
}

/// The progress of reading a disk.
struct Reading<T> {
    path: PathBuf,
    reads: Arc<AtomicU64>,
    /// The number of reads at the last poll, and when it changed.
    seen: (u64, Instant),
    found: Option<T>,
}

impl<T: Send + 'static> Reading<T> {
    fn begin(
        (number, path): (usize, &Path),
        over: &Arc<AtomicBool>,
        sender: Sender<(usize, T)>,
        work: impl FnOnce(usize, &dyn Fn() -> io::Result<()>) -> T + Send + 'static,
    ) -> Result<Self, Error> {
        let active = ActiveRead::take(number, path)?;
        let reads = Arc::<AtomicU64>::default();
        let (counted, over) = (Arc::clone(&reads), Arc::clone(over));
        let read = move || {
            let step = || {
                counted.fetch_add(1, Ordering::Relaxed);
                let is_over = over.load(Ordering::Relaxed);
                if is_over { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
            };
            let found = work(number, &step);
            drop(active);
            // Fails if the caller no longer waits.
            let _ = sender.send((number, found));
        };
        let thread = thread::Builder::new().name("read".into()).stack_size(STACK_BYTES).spawn(read);
        thread.map_err(Error::host("starting a thread"))?;
        let path = path.to_path_buf();
        Ok(Self { path, reads, seen: (0, Instant::now()), found: None })
    }

    /// # Errors
    /// The disk does not answer.
    fn poll(&mut self, limits: Limits) -> Result<(), Error> {
        let reads = self.reads.load(Ordering::Relaxed);
        if reads != self.seen.0 {
            self.seen = (reads, Instant::now());
        }
        if self.found.is_some() || self.seen.1.elapsed() < limits.one {
            return Ok(());
        }
        let (path, ms) = (self.path.display(), limits.one.as_millis());
        Err(Error::Stuck { what: format!("{path} did not finish a request in {ms} ms") })
    }
}

/// On drop, signals the threads that the caller no longer waits.
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Calls `work` for each of the disks at `paths`, with its index, in parallel. `work` must call its
/// second argument after each read and end if that fails. The result is `None` for a disk that took
/// too long, or was not done when `keep_going` returned false.
///
/// # Errors
/// A disk does not answer, an earlier read of it has not returned, or `work` panicked.
pub(crate) fn each_in_time<T: Send + 'static>(
    paths: &[&Path],
    limits: Limits,
    keep_going: impl Fn() -> bool,
    work: impl FnOnce(usize, &dyn Fn() -> io::Result<()>) -> T + Clone + Send + 'static,
) -> Result<Vec<Option<T>>, Error> {
    let began = Instant::now();
    let (sender, receiver) = mpsc::channel();
    let over = SetOnDrop(Arc::default());
    let mut readings = Vec::new();
    for (number, path) in paths.iter().enumerate() {
        readings.push(Reading::begin((number, path), &over.0, sender.clone(), work.clone())?);
    }
    drop(sender);
    while readings.iter().any(|reading| reading.found.is_none()) {
        match receiver.recv_timeout(POLL_INTERVAL) {
            Ok((number, found)) => {
                if let Some(reading) = readings.get_mut(number) {
                    reading.found = Some(found);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let source = io::Error::other("a thread panicked");
                return Err(Error::Host { what: "reading a disk", source });
            }
        }
        readings.iter_mut().try_for_each(|reading| reading.poll(limits))?;
        if began.elapsed() >= limits.all || !keep_going() {
            break;
        }
    }
    Ok(readings.into_iter().map(|reading| reading.found).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEST_TIMEOUT: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(300);

    #[test]
    fn a_slow_disk_is_read_for_as_long_as_it_answers() {
        let path = Path::new("/slow/disk");
        // All reads take longer than the limit for one; each takes far less.
        let one = Duration::from_secs(2);
        let limits = Limits { one, all: TEST_TIMEOUT };
        let slow = move |_: usize, step: &dyn Fn() -> io::Result<()>| {
            for _ in 0..25 {
                thread::sleep(one / 20);
                step().unwrap();
            }
        };
        assert_eq!(each_in_time(&[path], limits, || true, slow).unwrap(), [Some(())]);
        // But not without end, and not after `keep_going` returns false.
        let endless = |_: usize, step: &dyn Fn() -> io::Result<()>| {
            while step().is_ok() {
                thread::sleep(SHORT / 100);
            }
        };
        let limits = Limits { one: TEST_TIMEOUT, all: SHORT };
        assert_eq!(each_in_time(&[path], limits, || true, endless).unwrap(), [None]);
        while !active_reads().iter().all(|(_, other)| other != path) {
            thread::sleep(POLL_INTERVAL);
        }
        let limits = Limits { one: TEST_TIMEOUT, all: TEST_TIMEOUT };
        assert_eq!(each_in_time(&[path], limits, || false, endless).unwrap(), [None]);
    }

    #[test]
    fn a_dead_disk_blocks_one_thread_and_no_caller() {
        let path = Path::new("/dead/disk");
        let limits = Limits { one: SHORT, all: TEST_TIMEOUT };
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let started = Arc::<AtomicU64>::default();
        let dead = {
            let started = Arc::clone(&started);
            move |_: usize, _: &dyn Fn() -> io::Result<()>| {
                started.fetch_add(1, Ordering::SeqCst);
                held.lock().unwrap().recv().unwrap_err();
            }
        };
        let name = path.to_str().unwrap();
        let error = each_in_time(&[path], limits, || true, dead.clone()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("did not finish a request"), "{error}");
        let error = each_in_time(&[path], limits, || true, dead.clone()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("an earlier read"), "{error}");
        assert_eq!(started.load(Ordering::SeqCst), 1);
        // It answers again.
        drop(release);
        while each_in_time(&[path], limits, || true, dead.clone()).is_err() {
            thread::sleep(POLL_INTERVAL);
        }
    }
}
