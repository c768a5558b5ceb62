//! Reading the files of disks for no longer than somebody may wait.
//!
//! A file system that does not answer holds whoever asks it, for ever if need be: so each disk is read
//! in a thread of its own, which is left where it does not come back, and of which there is one.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{POLL_INTERVAL, STACK_BYTES};
use crate::error::Error;

/// How long is waited.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For one read: a disk that does not answer for so long did not finish a request of its guest
    /// either.
    pub(super) one: Duration,
    /// For all disks, each of which may answer slowly.
    pub(super) all: Duration,
}

/// Disks that are being read, by number and path. Those of a guest that did not arrive are still
/// among them when the next one is awaited with the same.
static UNDER_WAY: Mutex<BTreeSet<(usize, PathBuf)>> = Mutex::new(BTreeSet::new());

fn under_way() -> MutexGuard<'static, BTreeSet<(usize, PathBuf)>> {
    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of them, until this is dropped.
struct Place((usize, PathBuf));

impl Place {
    /// # Errors
    /// It is being read.
    fn take(number: usize, path: &Path) -> Result<Self, Error> {
        let place = (number, path.to_path_buf());
        if under_way().insert(place.clone()) {
            return Ok(Self(place));
        }
        let what = format!("{}: an earlier read has not come back yet", path.display());
        Err(Error::Stuck { what })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        under_way().remove(&self.0);
    }
}

/// How far the reading of a disk is.
struct Reading<T> {
    path: PathBuf,
    reads: Arc<AtomicU64>,
    /// The last number that was seen, and since when.
    seen: (u64, Instant),
    found: Option<T>,
}

impl<T: Send + 'static> Reading<T> {
    fn begin(
        (number, path): (usize, &Path),
        over: &Arc<AtomicBool>,
        tells: Sender<(usize, T)>,
        work: impl FnOnce(usize, &dyn Fn() -> io::Result<()>) -> T + Send + 'static,
    ) -> Result<Self, Error> {
        let place = Place::take(number, path)?;
        let reads = Arc::<AtomicU64>::default();
        let (counted, over) = (Arc::clone(&reads), Arc::clone(over));
        let read = move || {
            let step = || {
                counted.fetch_add(1, Ordering::Relaxed);
                let is_over = over.load(Ordering::Relaxed);
                if is_over { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
            };
            let found = work(number, &step);
            drop(place);
            // Nobody waits any more where it cannot be told.
            let _ = tells.send((number, found));
        };
        let thread = thread::Builder::new().name("read".into()).stack_size(STACK_BYTES).spawn(read);
        thread.map_err(Error::host("starting a thread"))?;
        let path = path.to_path_buf();
        Ok(Self { path, reads, seen: (0, Instant::now()), found: None })
    }

    /// # Errors
    /// It does not answer.
    fn look(&mut self, limits: Limits) -> Result<(), Error> {
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

/// Says that nobody waits any more, when it is dropped.
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does `work` for each of the disks at `paths` with its number from 0, all at once. It calls what it
/// is given after each read, and ends where that fails. What was not found in time is `None`; so is
/// what was not found when `goes_on` was false.
///
/// # Errors
/// A disk does not answer, is still being read from before, or the reading panicked.
pub(super) fn each_in_time<T: Send + 'static>(
    paths: &[&Path],
    limits: Limits,
    goes_on: impl Fn() -> bool,
    work: impl FnOnce(usize, &dyn Fn() -> io::Result<()>) -> T + Clone + Send + 'static,
) -> Result<Vec<Option<T>>, Error> {
    let began = Instant::now();
    let (tells, told) = mpsc::channel();
    let over = Over(Arc::default());
    let mut readings = Vec::new();
    for (number, path) in paths.iter().enumerate() {
        readings.push(Reading::begin((number, path), &over.0, tells.clone(), work.clone())?);
    }
    drop(tells);
    while readings.iter().any(|reading| reading.found.is_none()) {
        match told.recv_timeout(POLL_INTERVAL) {
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
        readings.iter_mut().try_for_each(|reading| reading.look(limits))?;
        if began.elapsed() >= limits.all || !goes_on() {
            break;
        }
    }
    Ok(readings.into_iter().map(|reading| reading.found).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Far longer than what is waited for takes.
    const TEST_TIMEOUT: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(300);

    #[test]
    fn a_slow_disk_is_read_for_as_long_as_it_answers() {
        let path = Path::new("/slow/disk");
        // Longer in all than for one, which is far longer than one takes.
        let one = Duration::from_secs(2);
        let limits = Limits { one, all: TEST_TIMEOUT };
        let slow = move |_: usize, step: &dyn Fn() -> io::Result<()>| {
            for _ in 0..25 {
                thread::sleep(one / 20);
                step().unwrap();
            }
        };
        assert_eq!(each_in_time(&[path], limits, || true, slow).unwrap(), [Some(())]);
        // But not for ever, or when nobody wants it any more.
        let endless = |_: usize, step: &dyn Fn() -> io::Result<()>| {
            while step().is_ok() {
                thread::sleep(SHORT / 100);
            }
        };
        let limits = Limits { one: TEST_TIMEOUT, all: SHORT };
        assert_eq!(each_in_time(&[path], limits, || true, endless).unwrap(), [None]);
        while !under_way().iter().all(|(_, other)| other != path) {
            thread::sleep(POLL_INTERVAL);
        }
        let limits = Limits { one: TEST_TIMEOUT, all: TEST_TIMEOUT };
        assert_eq!(each_in_time(&[path], limits, || false, endless).unwrap(), [None]);
    }

    #[test]
    fn a_dead_disk_holds_one_thread_and_nobody_else() {
        let path = Path::new("/dead/disk");
        let limits = Limits { one: SHORT, all: TEST_TIMEOUT };
        let (lets_go, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let begun = Arc::<AtomicU64>::default();
        let dead = {
            let begun = Arc::clone(&begun);
            move |_: usize, _: &dyn Fn() -> io::Result<()>| {
                begun.fetch_add(1, Ordering::SeqCst);
                held.lock().unwrap().recv().unwrap_err();
            }
        };
        let name = path.to_str().unwrap();
        let error = each_in_time(&[path], limits, || true, dead.clone()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("did not finish a request"), "{error}");
        let error = each_in_time(&[path], limits, || true, dead.clone()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("an earlier read"), "{error}");
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        // It answers again.
        drop(lets_go);
        while each_in_time(&[path], limits, || true, dead.clone()).is_err() {
            thread::sleep(POLL_INTERVAL);
        }
    }
}
