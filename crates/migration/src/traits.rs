//! What a migration needs of a monitor, and all that it knows of one.
//!
//! A monitor implements [`SourceMachine`] for a guest that runs and
//! [`DestinationMachine`] for one that is to be. Memory is read and written by several threads
//! at once, so it is handed out apart from the machine, as [`ReadPages`] and [`WritePages`].
//!
//!
//! A page is 4 KiB, whatever the host's page is, and a page number is a guest physical address
//! divided by 4096.

use std::sync::Arc;
use std::time::Duration;

use page_set::{PageRange, PageSet};

use crate::cpu::CpuFeatures;
use crate::dirty::DirtyBitmap;
use crate::layout::GuestLayout;

/// Why a monitor could not do what it was asked. It should say whose fault that is.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// Memory of a guest, to be read by many threads while the guest writes to it.
pub trait ReadPages: Send + Sync {
    /// Copies `pages`, which lie in one region, to `out`, which has 4096 bytes for each.
    ///
    /// The guest may write meanwhile, so a copy may be torn. That is no harm: the write is in
    /// the dirty log, and the page is read again.
    ///
    /// Reading should cost the host no memory. Anonymous memory that was never written reads as the
    /// kernel's page of zeros; a hole of a file that is mapped does not, so files are read by calls.
    ///
    /// # Errors
    /// The memory cannot be read.
    fn read_pages(&self, pages: PageRange, out: &mut [u8]) -> Result<(), MachineError>;
}

/// Memory of a guest that does not run yet, to be written by many threads.
pub trait WritePages: Send + Sync {
    /// Copies `bytes` to `pages`, which lie in one region; 4096 bytes for each.
    ///
    /// # Errors
    /// The memory cannot be written.
    fn write_pages(&self, pages: PageRange, bytes: &[u8]) -> Result<(), MachineError>;

    /// Makes `pages`, which lie in one region, read as zeros. Pages that were never written read
    /// as zeros already, and should cost the host nothing afterwards either; giving the memory
    /// back (`host-memory`'s discard) is as good as writing.
    ///
    /// # Errors
    /// The memory cannot be written.
    fn zero_pages(&self, pages: PageRange) -> Result<(), MachineError>;
}

/// Memory of a guest whose pages are missing until they are placed (`host-memory`'s `MissingPages`).
/// Whoever touches one waits for it.
pub trait PlacePages: Send + Sync {
    /// The page that somebody waits for; `None` if nobody does for `wait`.
    ///
    /// # Errors
    /// It cannot be found out.
    fn next_missing(&self, wait: Duration) -> Result<Option<u64>, MachineError>;

    /// Puts `contents` into a page that is missing, or zeros where there are none. A page that
    /// is there stays as it is. False where the page was discarded (balloon, reports) since memory
    /// was made: it is left as it is then, also where the discard comes while this is called.
    ///
    /// # Errors
    /// There is no such page, or it cannot be placed.
    fn place_page(&self, page: u64, contents: Option<&[u8; 4096]>) -> Result<bool, MachineError>;

    /// Puts zeros into a page that somebody waits for, and that was discarded.
    ///
    /// # Errors
    /// As [`place_page`](Self::place_page).
    fn place_zeros(&self, page: u64) -> Result<(), MachineError>;

    /// Whether the page was discarded, so that its contents need not be read.
    fn was_discarded(&self, page: u64) -> bool;
}

/// What a destination must know before it can make the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Where the guest has memory.
    pub layout: GuestLayout,
    /// What the guest was told that its processors can do.
    pub cpu: CpuFeatures,
    /// Which machine it is: both sides must have the same name. At most
    /// [`MAX_NAME_BYTES`](crate::limits::MAX_NAME_BYTES) bytes of printable ASCII.
    pub machine: String,
    /// What else the monitor needs to make it (processors, devices, kind of memory), in its own
    /// form. At most [`MAX_CONFIG_BYTES`](crate::limits::MAX_CONFIG_BYTES). The destination's
    /// monitor gets it as the source's wrote it, and must treat it as hostile.
    pub config: Vec<u8>,
}

/// A part of a machine's state, in the monitor's own form: one device, one processor, the clock,
/// the balloon. The receiving monitor must treat it as hostile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSection {
    /// What it is the state of, as `cpu0` or `balloon`. At most
    /// [`MAX_NAME_BYTES`](crate::limits::MAX_NAME_BYTES) bytes of printable ASCII.
    pub name: String,
    /// Version of the form.
    pub version: u32,
    /// At most [`MAX_STATE_BYTES`](crate::limits::MAX_STATE_BYTES) in all sections together.
    pub bytes: Vec<u8>,
}

/// What a guest says that it does not use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreePages {
    /// Each page in it was free at some moment after the guest was asked.
    pub pages: PageSet,
    /// What the guest expects to find in such a page if nobody wrote to it since, as a pattern of
    /// four bytes, little-endian: the `poison_val` of the driver where pages stay in the guest's
    /// free lists (snapshots of the request queue) and it negotiated `PAGE_POISON`; else 0. Also
    /// 0 for pages that the guest allocated in order to name them (free page hints, holds), since
    /// it writes the pattern anew when it frees them.
    pub pattern: u32,
}

/// A guest that runs, and may be moved. Its monitor calls nothing of its own on the guest's
/// processors while a migration is under way, except to end the guest.
///
/// The calls come in this order, from one thread:
///
/// ```text
/// describe, drop_caches, before_connect, memory, start_dirty_log, take_dirty, ballooned_pages, free_pages,
/// (take_dirty, set_throttle)*, before_pause, pause, take_dirty, save_state, offer,
/// then relinquish; or, whenever something fails before the switchover is offered:
/// resume (if it was paused), set_throttle(0), stop_dirty_log, free_pages_done
/// ```
pub trait SourceMachine {
    /// What a destination must know. Asked before anything else, so this is where a guest is refused
    /// that could not be moved: for whatever [`save_state`](Self::save_state) would refuse as it is
    /// now. The guest may stand still for that, and runs again when this returns.
    ///
    /// # Errors
    /// The guest cannot be moved.
    fn describe(&self) -> Result<Description, MachineError>;

    /// The guest's memory.
    fn memory(&self) -> Arc<dyn ReadPages>;

    /// Has every write to the guest's memory noted from now on, whoever writes: its processors
    /// (KVM: `KVM_MEM_LOG_DIRTY_PAGES`), devices of this process, back ends of other processes
    /// (vhost-user: `VHOST_F_LOG_ALL`). All are noted when this returns.
    ///
    /// # Errors
    /// A writer cannot be watched; then nothing may be moved while the guest runs.
    fn start_dirty_log(&mut self) -> Result<(), MachineError>;

    /// Adds every page that was written since the last call, or since the log was started, and
    /// begins to note anew. With KVM: [`DirtyBitmap::merge`] for each slot with what
    /// `KVM_GET_DIRTY_LOG` said, and once more with the bitmap of the devices.
    ///
    /// A write that ends before this is called is added. One that goes on meanwhile is in this
    /// answer or in the next. After [`pause`](Self::pause) the answer is complete.
    ///
    /// # Errors
    /// The log is lost, so the migration ends.
    fn take_dirty(&mut self, into: &mut DirtyBitmap) -> Result<(), MachineError>;

    /// Ends the log.
    fn stop_dirty_log(&mut self);

    /// Asks the guest to drop what it caches, before anything else, where the operator wants it.
    /// Waits at most `wait`.
    ///
    /// # Errors
    /// It could not be asked, or did not answer. The migration goes on.
    fn drop_caches(&mut self, wait: Duration) -> Result<(), MachineError>;

    /// Asks the guest which pages it does not use: over the request queue where there is one, else
    /// by free page hints. The guest must be asked by this call, not before it. `None` where there
    /// is no driver that could be asked, or where it does not answer within `wait`. Memory that
    /// the guest names twice, or that does not exist, is left out by whoever calls.
    ///
    /// # Errors
    /// It could not be asked. The migration goes on without.
    fn free_pages(&mut self, wait: Duration) -> Result<Option<FreePages>, MachineError>;

    /// Nobody counts on what [`free_pages`](Self::free_pages) answered any more: a guest that
    /// keeps what it named to itself (hints) may use it again. Not called when the guest was
    /// [given away](Self::relinquish): the device tells it where it goes on.
    fn free_pages_done(&mut self);

    /// Pages that the guest gave and may not use before it was told that it has them back: those
    /// in the balloon, of a driver that negotiated `MUST_TELL_HOST`. **No page of any other
    /// driver**: it may have written to a page, before the dirty log was asked, whose deflate the
    /// device has yet to see. The balloon's state must come with [`save_state`](Self::save_state).
    ///
    /// # Errors
    /// The device cannot be asked. The migration goes on without.
    fn ballooned_pages(&mut self) -> Result<PageSet, MachineError>;

    /// Leaves the guest's processors only `100 - percent` per cent of their time, so that it
    /// writes less; 0 to 99, 0 for all of it.
    fn set_throttle(&mut self, percent: u8);

    /// Before the other side is spoken to: the guest runs, and nobody waits for a sign of life. What
    /// it wrote long ago is brought to its disks, which may take a while; a limit is the monitor's.
    ///
    /// # Errors
    /// The guest must not be moved, or what it wrote does not get there in time.
    fn before_connect(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// The guest is about to be paused, and runs still: what can be done before is done now, such as
    /// to bring to disk what it wrote. No part of the time for which it stands still. Shorter than
    /// the destination waits for a sign of life.
    ///
    /// # Errors
    /// The guest must not be moved: it would not find there what it has here.
    fn before_pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Stops the guest's processors and whatever its devices have under way. When it returns
    /// nobody writes to the guest's memory until [`resume`](Self::resume).
    ///
    /// # Errors
    /// The guest still runs.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// The state of processors, devices, clock and balloon, of a guest that is paused. Saving it
    /// writes nothing to the guest's memory.
    ///
    /// # Errors
    /// It cannot be had; the guest is resumed.
    fn save_state(&mut self) -> Result<Vec<StateSection>, MachineError>;

    /// The other side may run the guest from here on. Lets go what only one side can have, such as
    /// locks on its disks; [`resume`](Self::resume) takes it again.
    fn prepare_switchover(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Lets the guest go on here. Called only where it cannot run anywhere else.
    ///
    /// # Errors
    /// It stays paused; its operator is told, and it may be called again.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// The guest runs somewhere else, for good: it must never run here again. The monitor may end
    /// when it likes.
    fn relinquish(&mut self);
}

/// A monitor that makes a guest out of what a source sends.
///
/// ```text
/// check, create, load_state, then resume; or destroy, whenever something fails before that
/// ```
///
/// The guest is paused from [`create`](Self::create) on.
pub trait DestinationMachine {
    /// What the host's processors and this monitor can give a guest.
    fn cpu_features(&self) -> CpuFeatures;

    /// Makes a guest with memory that reads as zeros, and does not run it. Limits of memory were
    /// checked; `description.config` was not.
    ///
    /// # Errors
    /// This monitor cannot make such a guest. It leaves nothing behind.
    fn create(&mut self, description: &Description) -> Result<Arc<dyn WritePages>, MachineError>;

    /// The same with memory whose pages are missing.
    ///
    /// # Errors
    /// This monitor cannot make such a guest, or not in this way. It leaves nothing behind.
    fn create_missing(
        &mut self,
        description: &Description,
    ) -> Result<Arc<dyn PlacePages>, MachineError> {
        let _ = description;
        Err("this monitor takes memory only all at once".into())
    }

    /// Takes the state of processors, devices, clock and balloon. All of memory is there, and
    /// nobody writes to it any more but the machine. When it returns, [`resume`](Self::resume)
    /// should not be able to fail.
    ///
    /// # Errors
    /// The state is not one of this machine's.
    fn load_state(&mut self, state: Vec<StateSection>) -> Result<(), MachineError>;

    /// Runs the guest.
    ///
    /// # Errors
    /// **Not one instruction of it was run**; the source goes on with it then. A guest that ran
    /// at all and then failed is a guest that ran.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Leaves nothing of the guest. Also called where [`create`](Self::create) was not.
    fn destroy(&mut self);
}
