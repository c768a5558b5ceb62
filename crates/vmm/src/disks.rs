//! The files of a machine's disks: what is in them, and whose they are.
//!
//! A guest that runs here has them. One that changes sides has them on neither for a moment, and
//! nobody else can begin with them meanwhile; see docs/migration.md, "Disks".

mod reading;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use diagnostics::{shortened, visible};
use migration::limits::STALL;

use self::reading::{Limits, each_in_time};
use crate::block::{DiskFile, DiskOptions, DiskShape, GuestDisk, NotThis};
use crate::error::Error;
use crate::machine::Machine;

/// How often, at most, what was written to the disks is brought there while the guest still runs.
const MAX_SYNCS: usize = 4;

/// A sync as short as the guest may wait for.
const SHORT: Duration = Duration::from_millis(20);

/// How long a sync may take while the guest stands still: less than the other side of a migration
/// waits for a sign of life then.
pub(crate) const SYNC_TIME: Duration = Duration::from_secs(4);

/// How often it is looked whether a sync is still to be waited for.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Stack of a thread that syncs.
const STACK_BYTES: usize = 128 << 10;

/// What is read of disks to know them again is some 200 pieces of each, which a disk with much else to
/// do answers in some seconds. Nobody waits at the other side meanwhile.
const DESCRIBE: Limits = Limits { one: READ_TIME, all: Duration::from_secs(60) };

/// The same where the source waits for the answer, and the disks have to be opened before.
const COMPARE: Limits = Limits { one: READ_TIME, all: Duration::from_secs(12) };
const OPEN: Limits = Limits { one: READ_TIME, all: READ_TIME };
const _: () = assert!(OPEN.all.as_secs() + COMPARE.all.as_secs() < STALL.as_secs());

/// How long one such piece may take: as long as a disk has to stop for its guest.
const READ_TIME: Duration = Duration::from_secs(4);

/// Who has the guest's disks compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// The guest's source, for no longer than a peer may be silent.
    Source,
    /// The operator, who restores the guest from a file.
    Operator,
}

/// Opens the disks of a machine.
///
/// # Errors
/// One cannot be opened or is none, or it does not answer.
pub(crate) fn open(options: &[DiskOptions]) -> Result<Vec<Arc<DiskFile>>, Error> {
    let paths: Vec<_> = options.iter().map(|disk| disk.path.as_path()).collect();
    let theirs: Arc<[DiskOptions]> = options.into();
    let open = move |index: usize, _: &dyn Fn() -> io::Result<()>| {
        theirs.get(index).map(|disk| DiskFile::open(disk).map(Arc::new))
    };
    let opened = each_in_time(&paths, OPEN, || true, open)?.into_iter().zip(&paths);
    let late = |path: &Path| {
        let (path, ms) = (path.display(), OPEN.all.as_millis());
        Error::Stuck { what: format!("{path} was not opened in {ms} ms") }
    };
    opened.map(|(found, path)| found.flatten().unwrap_or_else(|| Err(late(path)))).collect()
}

/// A path in a message, which has other things to say as well.
fn shown(path: &str) -> String {
    /// Bytes of it.
    const MAX_SHOWN: usize = 80;
    shortened(&visible(path), MAX_SHOWN)
}

fn sync_one(disk: &DiskFile) -> Result<(), Error> {
    let lost = |source| Error::Lost { path: disk.path().to_path_buf(), source };
    disk.sync().map_err(lost)
}

/// A thread that may be stuck is at work, of which there is one; until this is dropped.
struct Busy(Arc<AtomicBool>);

impl Busy {
    /// `None` where there is one.
    fn begin(flag: &Arc<AtomicBool>) -> Option<Self> {
        let was = flag.swap(true, Ordering::SeqCst);
        (!was).then(|| Self(Arc::clone(flag)))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Machine {
    /// The guest begins here.
    ///
    /// # Errors
    /// Another guest has one of its disks; none is taken then.
    pub(crate) fn take_new_disks(&self) -> Result<(), Error> {
        self.all_disks(DiskFile::take_new, DiskFile::release)
    }

    /// The guest is to come, and is at its source still.
    ///
    /// # Errors
    /// As [`take_new_disks`](Self::take_new_disks).
    pub(crate) fn expect_disks(&self) -> Result<(), Error> {
        self.all_disks(DiskFile::expect, DiskFile::release)
    }

    /// The guest is about to run.
    ///
    /// # Errors
    /// Another guest has one of its disks, or the other side has them; none is taken then.
    pub(crate) fn take_disks(&self) -> Result<(), Error> {
        self.all_disks(DiskFile::take, DiskFile::prepare_switchover)
    }

    /// The other side may run the guest from now on.
    pub(crate) fn prepare_disk_switchover(&self) {
        self.disks.iter().for_each(|disk| disk.prepare_switchover());
    }

    /// The guest is not here any more.
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

    /// All that was written to its disks is there for other hosts. It is waited for as long as
    /// `goes_on` says of the time that it has taken: a file system that does not answer holds
    /// whoever calls it for ever.
    ///
    /// # Errors
    /// A disk lost what the guest wrote, of which the guest hears at its next flush
    /// ([`Error::Lost`]); or it takes too long ([`Error::Stuck`]), and goes on its way.
    pub(crate) fn sync_disks(&self, goes_on: impl Fn(Duration) -> bool) -> Result<(), Error> {
        let disks: Vec<_> = self.disks.iter().filter(|disk| !disk.shape().read_only).collect();
        if disks.is_empty() {
            return Ok(());
        }
        let names = disks.iter().map(|disk| disk.path().display().to_string());
        let names = names.collect::<Vec<_>>().join(", ");
        let late = |what: &str| Error::Stuck { what: format!("{names}: {what}") };
        let Some(busy) = Busy::begin(&self.syncing) else {
            return Err(late("an earlier sync has not come back yet"));
        };
        let (tells, told) = mpsc::channel();
        let disks: Vec<_> = disks.into_iter().map(Arc::clone).collect();
        let sync = move || {
            // Each, whatever the others say: an error that is not asked for is not kept.
            let synced: Vec<_> = disks.iter().map(|disk| sync_one(disk)).collect();
            drop(busy);
            // Nobody waits any more.
            let _ = tells.send(synced.into_iter().collect());
        };
        let began = Instant::now();
        let thread = thread::Builder::new().name("sync".into()).stack_size(STACK_BYTES).spawn(sync);
        thread.map_err(Error::host("starting a thread"))?;
        loop {
            match told.recv_timeout(POLL_INTERVAL) {
                Ok(synced) => return synced,
                Err(RecvTimeoutError::Timeout) if goes_on(began.elapsed()) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let ms = began.elapsed().as_millis();
                    return Err(late(&format!("not all is written that was, after {ms} ms")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let source = io::Error::other("a thread panicked");
                    return Err(Error::Host { what: "syncing a disk", source });
                }
            }
        }
    }

    /// The same while the guest runs and writes, until little is left for when it stands still.
    ///
    /// # Errors
    /// As [`sync_disks`](Self::sync_disks).
    pub(crate) fn sync_disks_before_pause(
        &self,
        goes_on: impl Fn(Duration) -> bool,
    ) -> Result<(), Error> {
        for _ in 0..MAX_SYNCS {
            let began = Instant::now();
            self.sync_disks(&goes_on)?;
            if began.elapsed() <= SHORT {
                break;
            }
        }
        Ok(())
    }

    /// What the guest sees of its disks.
    pub(crate) fn disk_shapes(&self) -> Vec<DiskShape> {
        self.disks.iter().map(|disk| disk.shape()).collect()
    }

    /// Reads each disk with its index; see [`each_in_time`].
    fn read_each<T: Send + 'static>(
        &self,
        limits: Limits,
        goes_on: impl Fn() -> bool,
        read: impl Fn(&DiskFile, usize, &dyn Fn() -> io::Result<()>) -> T + Clone + Send + 'static,
    ) -> Result<Vec<Option<T>>, Error> {
        let paths: Vec<_> = self.disks.iter().map(|disk| disk.path()).collect();
        let disks = self.disks.clone();
        let read = move |index: usize, step: &dyn Fn() -> io::Result<()>| {
            disks.get(index).map(|disk| read(disk, index, step))
        };
        let found = each_in_time(&paths, limits, goes_on, read)?;
        Ok(found.into_iter().map(Option::flatten).collect())
    }

    /// Its disks as another host may have to know them again, unless `goes_on` becomes false.
    ///
    /// # Errors
    /// One cannot be read, or not in time.
    pub(crate) fn describe_disks(
        &self,
        goes_on: impl Fn() -> bool,
    ) -> Result<Vec<GuestDisk>, Error> {
        let describe = |disk: &DiskFile, _: usize, step: &dyn Fn() -> io::Result<()>| {
            let wrong = |source| Error::File { path: disk.path().to_path_buf(), source };
            disk.describe(step).map_err(wrong)
        };
        let described = self.read_each(DESCRIBE, goes_on, describe)?;
        let late = |disk: &DiskFile| {
            let (path, s) = (disk.path().display(), DESCRIBE.all.as_secs());
            Error::Stuck {
                what: format!("{path}: not all that tells which disk it is was read in {s} s"),
            }
        };
        let described = self.disks.iter().zip(described);
        described.map(|(disk, found)| found.unwrap_or_else(|| Err(late(disk)))).collect()
    }

    /// Has the disks that a guest had elsewhere, as many as these and of the same shapes, which it
    /// knows by what it was told there. Others are taken where its operator `accepts` them.
    ///
    /// # Errors
    /// One is not the guest's, the operator's fault, who names them; or it does not answer.
    pub(crate) fn adopt_disks(
        &self,
        had: &[GuestDisk],
        accepts: bool,
        waits: Waits,
    ) -> Result<(), Error> {
        let limits = if waits == Waits::Source { COMPARE } else { DESCRIBE };
        let theirs: Arc<[GuestDisk]> = had.into();
        let check = move |disk: &DiskFile, index: usize, step: &dyn Fn() -> io::Result<()>| {
            disk.check(&theirs, index, step)
        };
        let checked = self.read_each(limits, || true, check)?;
        let late = || {
            let why = format!("was not compared in {} s, which it had", limits.all.as_secs());
            Err(NotThis { why, index: None })
        };
        for (number, ((disk, was), checked)) in (1..).zip(self.disks.iter().zip(had).zip(checked)) {
            disk.keep_limits(was.limits);
            let Err(NotThis { why, index }) = checked.unwrap_or_else(late) else { continue };
            let path = shown(&disk.path().to_string_lossy());
            let old = shown(was.identity.path());
            if accepts {
                tracing::warn!(disk = path, had = old, why, "operator: another disk is accepted");
                continue;
            }
            // Which may be what the operator meant.
            let order = index.map_or_else(String::new, |index| {
                let place = index + 1;
                format!(". It is the guest's disk {place}: they were named in another order")
            });
            let what = format!(
                "{path} is not disk {number} of the guest, which had {old}: it {why}{order}. Name the \
                 guest's disks in its order, or say --accept-disks if these are what it is to have"
            );
            return Err(Error::Option { what });
        }
        Ok(())
    }
}
