//! The files of a machine's disks: what is in them, and whose they are.
//!
//! A guest that runs here has them. One that changes sides has them on neither for a moment, and
//! nobody else can begin with them meanwhile; see docs/migration.md, "Disks".

use std::time::{Duration, Instant};

use crate::block::{DiskFile, DiskShape};
use crate::error::Error;
use crate::machine::Machine;

/// How often, at most, what was written to the disks is brought there while the guest still runs.
const MAX_SYNCS: usize = 4;

/// A sync as short as the guest may wait for.
const SHORT: Duration = Duration::from_millis(20);

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
        self.all_disks(DiskFile::take, DiskFile::offer)
    }

    /// The other side may run the guest from now on.
    pub(crate) fn offer_disks(&self) {
        self.disks.iter().for_each(|disk| disk.offer());
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

    /// All that was written to its disks is there for other hosts.
    pub(crate) fn sync_disks(&self) -> Result<(), Error> {
        let failed = Error::host("syncing a disk");
        self.disks.iter().try_for_each(|disk| disk.sync().map_err(&failed))
    }

    /// The same while the guest runs and writes, until little is left for when it stands still.
    pub(crate) fn sync_disks_before_pause(&self) {
        for _ in 0..MAX_SYNCS {
            let began = Instant::now();
            // Failing is told when it counts.
            if self.sync_disks().is_err() || began.elapsed() <= SHORT {
                return;
            }
        }
    }

    /// What the guest sees of its disks.
    pub(crate) fn disk_shapes(&self) -> Vec<DiskShape> {
        self.disks.iter().map(|disk| disk.shape()).collect()
    }
}
