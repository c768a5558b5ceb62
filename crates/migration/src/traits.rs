//! The interface between a migration and a VMM.
//!
//! A VMM implements [`SourceMachine`] for a guest that runs and [`DestinationMachine`] for one that
//! arrives. Several threads access memory at once, so it is separate from the machine, as
//! [`ReadPages`] and [`WritePages`].
//!
//! A page is 4 KiB, whatever the host's page is, and a page number is a guest physical address
//! divided by 4096.

use std::sync::Arc;
use std::time::Duration;

use page_set::{PageRange, PageSet};

use crate::cpu::CpuFeatures;
use crate::dirty::DirtyBitmap;
use crate::layout::GuestLayout;

/// An error of a VMM. Its text should begin with whose fault it is.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// Memory of a running guest, read by several threads.
pub trait ReadPages: Send + Sync {
    /// Copies `pages`, which lie in one region, to `out`, which has 4096 bytes for each.
    ///
    /// The guest may write meanwhile, so a copy may be torn. That does no harm: the write is in the
    /// dirty log, and the page is read again.
    ///
    /// Reading should cost the host no memory. Anonymous memory that was never written reads as the
    /// kernel's zero page. A hole of a mapped file does not, so read files by system calls.
    ///
    /// # Errors
    /// The memory cannot be read.
    fn read_pages(&self, pages: PageRange, out: &mut [u8]) -> Result<(), MachineError>;
}

/// Memory of a guest that does not run yet, written by several threads.
pub trait WritePages: Send + Sync {
    /// Copies `bytes` to `pages`, which lie in one region; 4096 bytes for each.
    ///
    /// # Errors
    /// The memory cannot be written.
    fn write_pages(&self, pages: PageRange, bytes: &[u8]) -> Result<(), MachineError>;

    /// Makes `pages`, which lie in one region, read as zeros. Pages that were never written read as
    /// zeros already, and should still cost the host no memory afterwards. Releasing the memory
    /// (`host-memory`'s discard) is as good as writing zeros.
    ///
    /// # Errors
    /// The memory cannot be written.
    fn zero_pages(&self, pages: PageRange) -> Result<(), MachineError>;
}

/// Memory of a guest whose pages are missing until they are placed (`host-memory`'s
/// `MissingPages`). A thread that touches a missing page blocks until it is placed.
pub trait PlacePages: Send + Sync {
    /// Waits up to `wait` for a thread that touches a missing page; returns that page.
    ///
    /// # Errors
    /// The kernel does not report missing pages.
    fn next_missing(&self, wait: Duration) -> Result<Option<u64>, MachineError>;

    /// Puts `contents`, or zeros if `None`, into a missing page. Does not change a page that is
    /// present. Returns false, and places nothing, if the page was discarded (balloon, reports)
    /// since the memory was created, even if the discard happens during this call.
    ///
    /// # Errors
    /// The page does not exist, or cannot be placed.
    fn place_page(&self, page: u64, contents: Option<&[u8; 4096]>) -> Result<bool, MachineError>;

    /// Puts zeros into a discarded page that a thread waits for.
    ///
    /// # Errors
    /// As [`place_page`](Self::place_page).
    fn place_zeros(&self, page: u64) -> Result<(), MachineError>;

    /// True if the page was discarded, so that its contents need not be read.
    fn was_discarded(&self, page: u64) -> bool;
}

/// What a destination needs before it can create the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The guest's memory regions.
    pub layout: GuestLayout,
    /// The features that the guest's vCPUs expose.
    pub cpu: CpuFeatures,
    /// The machine's name, which must be the one that the destination expects. At most
    /// [`MAX_NAME_BYTES`](crate::limits::MAX_NAME_BYTES) bytes of printable ASCII.
    pub machine: String,
    /// The rest that the VMM needs (vCPUs, devices, kind of memory), in its own format. At most
    /// [`MAX_CONFIG_BYTES`](crate::limits::MAX_CONFIG_BYTES). The destination's VMM receives it
    /// unchanged from the source's, and must treat it as hostile.
    pub config: Vec<u8>,
}

/// A part of a machine's state, in the VMM's own format: one device, one vCPU, the clock, the
/// balloon. The receiving VMM must treat it as hostile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSection {
    /// Such as `cpu0` or `balloon`. At most [`MAX_NAME_BYTES`](crate::limits::MAX_NAME_BYTES) bytes
    /// of printable ASCII.
    pub name: String,
    /// Version of the format.
    pub version: u32,
    /// At most [`MAX_STATE_BYTES`](crate::limits::MAX_STATE_BYTES) in all sections together.
    pub bytes: Vec<u8>,
}

/// Pages that a guest reports as unused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreePages {
    /// Each page in it was free at some moment after the query.
    pub pages: PageSet,
    /// What the guest expects in such a page if nothing has written to it since, as a pattern of
    /// four bytes, little-endian: the driver's `poison_val` for pages that stay in the guest's free
    /// lists (free-page reports of the request queue) if it negotiated `PAGE_POISON`; else 0. Also
    /// 0 for pages that the guest allocated in order to name them (free page hints, holds), since
    /// it writes the pattern when it frees them.
    pub pattern: u32,
}

/// A running guest that may be moved. While a migration is in progress, the VMM neither pauses nor
/// resumes the vCPUs by itself, except to end the guest.
///
/// One thread makes the calls, in this order:
///
/// ```text
/// describe, drop_caches, before_connect, memory, start_dirty_log, take_dirty, ballooned_pages, free_pages,
/// (take_dirty, set_throttle)*, before_pause, pause, take_dirty, save_state, prepare_switchover,
/// then relinquish; or, after any failure before the commit, or if the destination refuses:
/// resume (if it was paused), set_throttle(0), stop_dirty_log, free_pages_done
/// ```
pub trait SourceMachine {
    /// Describes the guest for a destination. Called before anything else, so a guest that cannot
    /// be moved is refused here: for anything that [`save_state`](Self::save_state) would refuse
    /// now. May pause the guest; it runs again when this returns.
    ///
    /// # Errors
    /// The guest cannot be moved.
    fn describe(&self) -> Result<Description, MachineError>;

    /// The guest's memory.
    fn memory(&self) -> Arc<dyn ReadPages>;

    /// Starts the dirty log for every writer of guest memory: vCPUs (KVM:
    /// `KVM_MEM_LOG_DIRTY_PAGES`), devices of this process, back ends of other processes
    /// (vhost-user: `VHOST_F_LOG_ALL`). Every write is logged when this returns.
    ///
    /// # Errors
    /// The writes of one writer cannot be logged, so the guest cannot be moved while it runs.
    fn start_dirty_log(&mut self) -> Result<(), MachineError>;

    /// Adds every page that was written since the last call, or since the log was started, and
    /// clears the log. With KVM: [`DirtyBitmap::merge`] for each slot with the result of
    /// `KVM_GET_DIRTY_LOG`, and once more with the bitmap of the devices.
    ///
    /// A write that ends before this call is added. A concurrent write is in this result or in the
    /// next one. After [`pause`](Self::pause) the result is complete.
    ///
    /// # Errors
    /// The log is lost, so the migration fails.
    fn take_dirty(&mut self, into: &mut DirtyBitmap) -> Result<(), MachineError>;

    /// Stops the dirty log.
    fn stop_dirty_log(&mut self);

    /// Requests the guest to drop its caches, if the operator configured it. Waits at most `wait`.
    ///
    /// # Errors
    /// There is no driver for the request, or it did not answer. The migration continues.
    fn drop_caches(&mut self, wait: Duration) -> Result<(), MachineError>;

    /// Queries which pages the guest does not use: over the request queue if there is one, else by
    /// free page hints. This call must send the query; an earlier answer is not allowed. Returns
    /// `None` if no driver can be queried, or if it does not answer within `wait`. The caller
    /// ignores memory that the guest names twice, or that does not exist.
    ///
    /// # Errors
    /// The guest cannot be queried. The migration continues without the answer.
    fn free_pages(&mut self, wait: Duration) -> Result<Option<FreePages>, MachineError>;

    /// The answer of [`free_pages`](Self::free_pages) is no longer needed: a guest that keeps the
    /// hinted pages may use them again. Not called after [`relinquish`](Self::relinquish): the
    /// device at the destination notifies the guest.
    fn free_pages_done(&mut self);

    /// The ballooned pages of a driver that negotiated `MUST_TELL_HOST`: the guest may not use them
    /// before the device has returned its deflate message. **No page of any other driver**: before
    /// the dirty log was read, it may have written to a page whose deflate the device has not seen
    /// yet. [`save_state`](Self::save_state) must include the balloon's state.
    ///
    /// # Errors
    /// The device cannot be queried. The migration sends these pages.
    fn ballooned_pages(&mut self) -> Result<PageSet, MachineError>;

    /// Throttles the vCPUs by `percent`, 0 to 99, so that the guest writes less. 0 ends throttling.
    fn set_throttle(&mut self, percent: u8);

    /// Syncs the guest's disks before the source connects: the guest runs, and no peer waits for a
    /// keepalive. This may take a while. The VMM sets the limit.
    ///
    /// # Errors
    /// The guest must not be moved, or the sync takes too long.
    fn before_connect(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Prepares for the pause while the guest still runs, such as by syncing its disks. Not part of
    /// the downtime. Must be shorter than the destination's stall timeout.
    ///
    /// # Errors
    /// The guest must not be moved: the destination would not have what it wrote here.
    fn before_pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Stops the vCPUs and all device activity. When it returns, nothing writes to guest memory
    /// until [`resume`](Self::resume).
    ///
    /// # Errors
    /// The guest still runs.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Saves the state of vCPUs, devices, clock and balloon of a paused guest. Writes nothing to
    /// guest memory.
    ///
    /// # Errors
    /// The state cannot be saved. The migration resumes the guest.
    fn save_state(&mut self) -> Result<Vec<StateSection>, MachineError>;

    /// Called just before the commit: the other side may run the guest from here on. Releases what
    /// only one side can have, such as locks on disks; [`resume`](Self::resume) takes it back.
    ///
    /// # Errors
    /// The migration resumes the guest.
    fn prepare_switchover(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Resumes the guest. Called only if it cannot run anywhere else.
    ///
    /// # Errors
    /// The guest stays paused. The failure is reported, and this may be called again.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Relinquishes the guest: it runs elsewhere and must never run here again. The VMM may exit at
    /// any time.
    fn relinquish(&mut self);
}

/// A VMM that creates a guest from what a source sends.
///
/// ```text
/// cpu_features, create, load_state, then resume; or destroy, after any failure before that
/// ```
///
/// The guest is paused from [`create`](Self::create) on.
pub trait DestinationMachine {
    /// The CPU features that this host and VMM can expose to a guest.
    fn cpu_features(&self) -> CpuFeatures;

    /// Creates a guest whose memory reads as zeros, and does not run it. The memory limit was
    /// checked; `description.config` was not.
    ///
    /// # Errors
    /// This VMM cannot create such a guest. It leaves nothing behind.
    fn create(&mut self, description: &Description) -> Result<Arc<dyn WritePages>, MachineError>;

    /// The same with memory whose pages are missing.
    ///
    /// # Errors
    /// This VMM cannot create such a guest, or has no missing pages. It leaves nothing behind.
    fn create_missing(
        &mut self,
        description: &Description,
    ) -> Result<Arc<dyn PlacePages>, MachineError> {
        let _ = description;
        Err("this VMM does not support missing pages".into())
    }

    /// Loads the state of vCPUs, devices, clock and balloon. All memory has arrived, and only the
    /// machine writes to it from here on. After this, [`resume`](Self::resume) should not be able
    /// to fail.
    ///
    /// # Errors
    /// The state does not fit this machine.
    fn load_state(&mut self, state: Vec<StateSection>) -> Result<(), MachineError>;

    /// Runs the guest.
    ///
    /// # Errors
    /// **The guest has not executed a single instruction**; the source resumes it then. A guest
    /// that ran at all and then failed counts as one that ran.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Destroys the guest. Also called if [`create`](Self::create) was not.
    fn destroy(&mut self);
}
