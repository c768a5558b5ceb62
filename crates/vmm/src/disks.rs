//! The disks of a machine: locking, syncing and comparing them.
//!
//! A running guest has its disks locked. During a switchover neither side has the run lock for a
//! moment; the guest lock then keeps other guests out. See docs/migration.md, "Disks".

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use diagnostics::{shortened, visible};
use migration::limits::STALL;

use crate::block::{DiskFile, DiskMismatch, DiskShape, GuestDisk};
use crate::disk_reads::{Limits, OPEN, POLL_INTERVAL, READ_TIMEOUT, STACK_BYTES, each_in_time};
use crate::error::Error;
use crate::machine::Machine;

/// Maximum number of syncs while the guest still runs.
const MAX_SYNCS: usize = 4;

/// A sync that is short enough to repeat during the downtime.
const SHORT_SYNC: Duration = Duration::from_millis(20);

/// How long a sync may take during the downtime: less than the peer of a migration waits for a
/// keepalive then.
pub(crate) const PAUSED_SYNC_TIMEOUT: Duration = Duration::from_secs(4);

/// To describe a disk, some 200 samples are read, which takes a busy disk a few seconds. No peer
/// waits meanwhile.
const DESCRIBE: Limits = Limits { one: READ_TIMEOUT, all: Duration::from_secs(60) };

/// To compare disks while the source waits, after they were opened.
const COMPARE: Limits = Limits { one: READ_TIMEOUT, all: Duration::from_secs(12) };
const _: () = assert!(OPEN.all.as_secs() + COMPARE.all.as_secs() < STALL.as_secs());

/// Who waits while disks are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiter {
    /// The source, which expects keepalives.
    Source,
    /// The operator, who restores the guest from a file.
    Operator,
}

/// A path for a message, shortened.
fn for_message(path: &str) -> String {
    /// Maximum bytes.
    const MAX_SHOWN: usize = 80;
    shortened(&visible(path), MAX_SHOWN)
}

fn sync_one(disk: &DiskFile) -> Result<(), Error> {
    let lost = |source| Error::Lost { path: disk.path().to_path_buf(), source };
    disk.sync().map_err(lost)
}

/// Marks the single thread that may be stuck as active, until dropped.
struct SyncInProgress(Arc<AtomicBool>);

impl SyncInProgress {
    /// `None` if one is active already.
    fn begin(flag: &Arc<AtomicBool>) -> Option<Self> {
        let was = flag.swap(true, Ordering::SeqCst);
        (!was).then(|| Self(Arc::clone(flag)))
    }
}

impl Drop for SyncInProgress {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Machine {
    /// Takes the disks for a guest that boots here.
    ///
    /// # Errors
    /// Another guest uses one of them; none is taken then.
    pub(crate) fn take_new_disks(&self) -> Result<(), Error> {
        self.all_disks(DiskFile::take_new, DiskFile::release)
    }

    /// Reserves the disks for an incoming guest.
    ///
    /// # Errors
    /// As [`take_new_disks`](Self::take_new_disks).
    pub(crate) fn expect_disks(&self) -> Result<(), Error> {
        self.all_disks(DiskFile::expect, DiskFile::release)
    }

    /// Takes the disks for a guest that is about to run.
    ///
    /// # Errors
    /// Another guest or the peer uses one of them; none is taken then.
    pub(crate) fn take_disks(&self) -> Result<(), Error> {
        self.all_disks(DiskFile::take, DiskFile::prepare_switchover)
    }

    /// Lets the peer take the disks.
    pub(crate) fn prepare_disk_switchover(&self) {
        self.disks.iter().for_each(|disk| disk.prepare_switchover());
    }

    /// Releases the disks.
    pub(crate) fn release_disks(&self) {
        self.disks.iter().for_each(|disk| disk.release());
    }

    fn all_disks(
        &self,
        take: fn(&DiskFile) -> Result<(), Error>,
        undo: fn(&DiskFile),
    ) -> Result<(), Error> {
        let taken = self.disks.iter().try_for_each(|disk| take(disk));
        taken.inspect_err(|_| self.disks.iter().for_each(|disk| undo(disk)))
    }

    /// Syncs the writable disks, so that other hosts read what was written. Waits while
    /// `keep_going` returns true for the time taken: a file system that does not answer would block
    /// without end.
    ///
    /// # Errors
    /// A disk lost a write, which the guest's next flush reports ([`Error::Lost`]); or the sync
    /// takes too long ([`Error::Stuck`]) and continues in the background.
    pub(crate) fn sync_disks(&self, keep_going: impl Fn(Duration) -> bool) -> Result<(), Error> {
        let disks: Vec<_> = self.disks.iter().filter(|disk| !disk.shape().read_only).collect();
        if disks.is_empty() {
            return Ok(());
        }
        let names = disks.iter().map(|disk| disk.path().display().to_string());
        let names = names.collect::<Vec<_>>().join(", ");
        let late = |what: &str| Error::Stuck { what: format!("{names}: {what}") };
        let Some(in_progress) = SyncInProgress::begin(&self.syncing) else {
            return Err(late("an earlier sync has not returned yet"));
        };
        let (sender, receiver) = mpsc::channel();
        let disks: Vec<_> = disks.into_iter().map(Arc::clone).collect();
        let sync = move || {
            // Syncs all disks, even after an error: only a sync detects and keeps a disk's error.
            let synced: Vec<_> = disks.iter().map(|disk| sync_one(disk)).collect();
            drop(in_progress);
            // Fails if the caller no longer waits.
            let _ = sender.send(synced.into_iter().collect());
        };
        let began = Instant::now();
        let thread = thread::Builder::new().name("sync".into()).stack_size(STACK_BYTES).spawn(sync);
        thread.map_err(Error::host("starting a thread"))?;
        loop {
            match receiver.recv_timeout(POLL_INTERVAL) {
                Ok(synced) => return synced,
                Err(RecvTimeoutError::Timeout) if keep_going(began.elapsed()) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let ms = began.elapsed().as_millis();
                    return Err(late(&format!("the sync did not finish in {ms} ms")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let source = io::Error::other("a thread panicked");
                    return Err(Error::Host { what: "syncing a disk", source });
                }
            }
        }
    }

    /// Syncs repeatedly while the guest runs, until a sync is short enough for the downtime.
    ///
    /// # Errors
    /// As [`sync_disks`](Self::sync_disks).
    pub(crate) fn sync_disks_before_pause(
        &self,
        keep_going: impl Fn(Duration) -> bool,
    ) -> Result<(), Error> {
        for _ in 0..MAX_SYNCS {
            let began = Instant::now();
            self.sync_disks(&keep_going)?;
            if began.elapsed() <= SHORT_SYNC {
                break;
            }
        }
        Ok(())
    }

    /// The shapes of the disks.
    pub(crate) fn disk_shapes(&self) -> Vec<DiskShape> {
        self.disks.iter().map(|disk| disk.shape()).collect()
    }

    /// Reads each disk with its index; see [`each_in_time`].
    fn read_each<T: Send + 'static>(
        &self,
        limits: Limits,
        keep_going: impl Fn() -> bool,
        read: impl Fn(&DiskFile, usize, &dyn Fn() -> io::Result<()>) -> T + Clone + Send + 'static,
    ) -> Result<Vec<Option<T>>, Error> {
        let paths: Vec<_> = self.disks.iter().map(|disk| disk.path()).collect();
        let disks = self.disks.clone();
        let read = move |index: usize, step: &dyn Fn() -> io::Result<()>| {
            disks.get(index).map(|disk| read(disk, index, step))
        };
        let found = each_in_time(&paths, limits, keep_going, read)?;
        Ok(found.into_iter().map(Option::flatten).collect())
    }

    /// Describes the disks, unless `keep_going` becomes false.
    ///
    /// # Errors
    /// A disk cannot be read, or not in time.
    pub(crate) fn describe_disks(
        &self,
        keep_going: impl Fn() -> bool,
    ) -> Result<Vec<GuestDisk>, Error> {
        let describe = |disk: &DiskFile, _: usize, step: &dyn Fn() -> io::Result<()>| {
            let wrong = |source| Error::File { path: disk.path().to_path_buf(), source };
            disk.describe(step).map_err(wrong)
        };
        let described = self.read_each(DESCRIBE, keep_going, describe)?;
        let late = |disk: &DiskFile| {
            let (path, s) = (disk.path().display(), DESCRIBE.all.as_secs());
            Error::Stuck {
                what: format!("{path}: the samples that identify the disk were not read in {s} s"),
            }
        };
        let described = self.disks.iter().zip(described);
        described.map(|(disk, found)| found.unwrap_or_else(|| Err(late(disk)))).collect()
    }

    /// Compares the disks with those that the guest had at the source, of the same number and
    /// shapes, and keeps the limits reported there. Other disks are taken only if the operator
    /// `accepts` them.
    ///
    /// # Errors
    /// A disk is not the guest's, the operator's fault; or it does not answer.
    pub(crate) fn adopt_disks(
        &self,
        guest_disks: &[GuestDisk],
        accepts: bool,
        waiter: Waiter,
    ) -> Result<(), Error> {
        let limits = if waiter == Waiter::Source { COMPARE } else { DESCRIBE };
        let owned: Arc<[GuestDisk]> = guest_disks.into();
        let check = move |disk: &DiskFile, index: usize, step: &dyn Fn() -> io::Result<()>| {
            disk.check(&owned, index, step)
        };
        let checked = self.read_each(limits, || true, check)?;
        let late = || {
            let why = format!("was not compared within {} s", limits.all.as_secs());
            Err(DiskMismatch { why, index: None })
        };
        for (number, ((disk, was), checked)) in
            (1..).zip(self.disks.iter().zip(guest_disks).zip(checked))
        {
            disk.keep_limits(was.limits);
            let Err(DiskMismatch { why, index }) = checked.unwrap_or_else(late) else { continue };
            let path = for_message(&disk.path().to_string_lossy());
            let old = for_message(was.identity.path());
            if accepts {
                tracing::warn!(disk = path, had = old, why, "operator: another disk is accepted");
                continue;
            }
            // The operator may have named the right disks in another order.
            let order = index.map_or_else(String::new, |index| {
                let place = index + 1;
                format!(". It is the guest's disk {place}: the order is wrong")
            });
            let what = format!(
                "{path} is not disk {number} of the guest, which was {old}: it {why}{order}. Name \
                 the guest's disks in their order, or give --accept-disks to use these instead"
            );
            return Err(Error::Option { what });
        }
        Ok(())
    }
}
