//! Implements the migration's machine traits, source and destination, for [`Machine`].

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use balloon_abi::Features;
use control::api::Caches;
use control::{BalloonControl as _, GuestRequest};
use host_memory::{Discard, MemoryMap, MissingPages, Placed};
use migration::cpu::CpuFeatures;
use migration::dirty::DirtyBitmap;
use migration::guest_memory::MappedMemory;
use migration::limits::STALL;
use migration::traits::{
    Description, DestinationMachine, FreePages, MachineError, PlacePages, ReadPages, SourceMachine,
    StateSection, WritePages,
};
use page_set::{PAGE_BYTES, PageRange, PageSet};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use super::MigrationController;
use crate::description::{MachineShape, cpu_features, describe};
use crate::disks::Waiter;
use crate::error::Error;
use crate::generation;
use crate::machine::Machine;
use crate::memory::{MachineMemory, Ram};
use crate::options::{HostOptions, RunOptions};
use crate::output::standard_output;
use crate::state::Section;

/// Smallest block in a free-page report.
const MIN_BLOCK_BYTES: u64 = PAGE_BYTES;

/// Bytes per copy. For larger copies the C library uses `rep movsb`, which is ten times slower on
/// an emulated CPU and no faster on a real one.
const COPY_BYTES: usize = 4096;

/// Time to wait for a request's answer beyond the request's own timeout.
const ANSWER_MARGIN: Duration = Duration::from_millis(500);

/// A handle to guest memory that other threads can use.
pub(crate) struct Pages {
    guest: Ram,
    map: MemoryMap,
}

impl Pages {
    fn of(memory: &MachineMemory) -> Self {
        Self { guest: memory.guest.clone(), map: memory.map.clone() }
    }
}

impl ReadPages for Pages {
    /// Reads file-backed memory with `pread`: reading a hole through the mapping would allocate it.
    fn read_pages(&self, pages: PageRange, out: &mut [u8]) -> Result<(), MachineError> {
        // Cannot overflow: page numbers are below 2^52.
        let at = GuestAddress(pages.start() * PAGE_BYTES);
        let region = self.guest.find_region(at).ok_or("no guest memory at this address")?;
        let offset = at.unchecked_offset_from(region.start_addr());
        let Some(place) = region.file_offset() else {
            for (out, offset) in out.chunks_mut(COPY_BYTES).zip((offset..).step_by(COPY_BYTES)) {
                region.read_slice(out, MemoryRegionAddress(offset))?;
            }
            return Ok(());
        };
        let mut offset = place.start() + offset;
        let mut rest = out;
        while !rest.is_empty() {
            let read =
                rustix::io::retry_on_intr(|| rustix::io::pread(place.file(), &mut *rest, offset))?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            offset += read as u64;
            rest = rest.get_mut(read..).unwrap_or_default();
        }
        Ok(())
    }
}

impl WritePages for Pages {
    fn write_pages(&self, pages: PageRange, bytes: &[u8]) -> Result<(), MachineError> {
        let at = GuestAddress(pages.start() * PAGE_BYTES);
        let region = self.guest.find_region(at).ok_or("no guest memory at this address")?;
        let offset = at.unchecked_offset_from(region.start_addr());
        for (bytes, offset) in bytes.chunks(COPY_BYTES).zip((offset..).step_by(COPY_BYTES)) {
            region.write_slice(bytes, MemoryRegionAddress(offset))?;
        }
        Ok(())
    }

    fn zero_pages(&self, pages: PageRange) -> Result<(), MachineError> {
        // Part of a huge page cannot be discarded, or only by splitting it.
        if self.map.largest_host_page() == 1 {
            let report = self.map.discard(&PageSet::from(pages));
            if report.failed_pages == 0 && report.outside_pages == 0 {
                return Ok(());
            }
        }
        MappedMemory(self.guest.clone()).zero_pages(pages)
    }
}

/// Memory whose pages are missing until they are placed.
struct Missing(MissingPages);

impl PlacePages for Missing {
    fn next_missing(&self, wait: Duration) -> Result<Option<u64>, MachineError> {
        Ok(self.0.next(wait)?)
    }

    fn place_page(&self, page: u64, contents: Option<&[u8; 4096]>) -> Result<bool, MachineError> {
        Ok(self.0.place(page, contents)? != Placed::Discarded)
    }

    fn place_zeros(&self, page: u64) -> Result<(), MachineError> {
        Ok(self.0.place_zeros(page)?)
    }

    fn was_discarded(&self, page: u64) -> bool {
        self.0.was_discarded(page)
    }
}

/// A guest at the source of a migration or snapshot.
#[derive(Clone)]
pub(crate) struct MigrationSource {
    machine: Arc<Machine>,
    /// The hint request whose pages the guest holds until the request ends.
    hints: Option<u32>,
    /// The destination may have taken the disks.
    committed: bool,
    /// The migration is cancelled.
    cancel: Arc<AtomicBool>,
    controller: Arc<MigrationController>,
}

/// How long the first sync of a guest's disks may take. Linux lets dirty pages grow to a fifth of
/// the host's memory; in this time a slow disk writes some 30 GB, at 100 MB/s. A sync that takes
/// longer would make saving the guest's state fail as well.
const FIRST_SYNC_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a later sync may take while the guest runs: less than the destination waits for a
/// keepalive.
const SYNC_TIMEOUT: Duration = Duration::from_secs(15);
const _: () = assert!(SYNC_TIMEOUT.as_secs() < STALL.as_secs());

impl MigrationSource {
    pub(crate) fn new(
        machine: Arc<Machine>,
        cancel: Arc<AtomicBool>,
        controller: &Arc<MigrationController>,
    ) -> Self {
        let controller = Arc::clone(controller);
        Self { machine, hints: None, committed: false, cancel, controller }
    }

    fn sync_disks(&self, limit: Duration) -> Result<(), Error> {
        let keep_waiting = |taken| taken < limit && !self.cancel.load(Ordering::Relaxed);
        self.machine.sync_disks_before_pause(keep_waiting)
    }

    /// Requests a free-page report on the request queue.
    fn report_free_pages(&self, wait: Duration) -> Result<Option<FreePages>, MachineError> {
        let balloon = &self.machine.balloon;
        let Some(pages) = balloon.free_snapshot(MIN_BLOCK_BYTES, wait)? else { return Ok(None) };
        // The pages stay in the guest's free lists, where page poisoning fills them.
        let device = balloon.device();
        let poisons = device.negotiated().contains(Features::PAGE_POISON);
        let pattern = if poisons { device.config().poison_val } else { 0 };
        Ok(Some(FreePages { pages, pattern }))
    }

    /// Collects free page hints.
    fn hint_free_pages(&mut self, wait: Duration) -> Result<Option<FreePages>, MachineError> {
        let balloon = &self.machine.balloon;
        let id = balloon.start_hints()?;
        self.hints = Some(id);
        // The guest has allocated them, and writes its poison pattern when it frees them.
        let hinted = balloon.hinted_within(id, wait);
        Ok(hinted.map(|pages| FreePages { pages, pattern: 0 }))
    }
}

impl SourceMachine for MigrationSource {
    fn describe(&self) -> Result<Description, MachineError> {
        describe(&self.machine, || !self.cancel.load(Ordering::Relaxed))
    }

    fn memory(&self) -> Arc<dyn ReadPages> {
        Arc::new(Pages::of(&self.machine.memory))
    }

    fn start_dirty_log(&mut self) -> Result<(), MachineError> {
        Ok(self.machine.start_dirty_log()?)
    }

    fn take_dirty(&mut self, into: &mut DirtyBitmap) -> Result<(), MachineError> {
        Ok(self.machine.take_dirty(|region, words| into.merge(region, words))?)
    }

    fn stop_dirty_log(&mut self) {
        if let Err(error) = self.machine.stop_dirty_log() {
            tracing::warn!(%error, "cannot stop the dirty log; the guest runs slower");
        }
    }

    fn drop_caches(&mut self, wait: Duration) -> Result<(), MachineError> {
        let balloon = &self.machine.balloon;
        let id = balloon.submit(GuestRequest::DropCaches(Caches::All), wait)?;
        match balloon.wait_request(id, wait + ANSWER_MARGIN) {
            Some(outcome) => Ok(outcome.map(drop)?),
            None => Err("guest: it did not answer in time".into()),
        }
    }

    fn free_pages(&mut self, wait: Duration) -> Result<Option<FreePages>, MachineError> {
        let negotiated = self.machine.balloon.device().negotiated();
        if negotiated.contains(Features::REQUEST_VQ) {
            self.report_free_pages(wait)
        } else if negotiated.contains(Features::FREE_PAGE_HINT) {
            self.hint_free_pages(wait)
        } else {
            Ok(None)
        }
    }

    fn free_pages_done(&mut self) {
        if let Some(id) = self.hints.take()
            && let Err(error) = self.machine.balloon.end_hints(id)
        {
            tracing::warn!(%error, "the guest cannot free the pages that it hinted");
        }
    }

    fn ballooned_pages(&mut self) -> Result<PageSet, MachineError> {
        Ok(self.machine.ballooned_pages())
    }

    fn set_throttle(&mut self, percent: u8) {
        self.machine.set_throttle(percent);
    }

    fn before_connect(&mut self) -> Result<(), MachineError> {
        Ok(self.sync_disks(FIRST_SYNC_TIMEOUT)?)
    }

    fn before_pause(&mut self) -> Result<(), MachineError> {
        match self.sync_disks(SYNC_TIMEOUT) {
            // The sync may still end in time; saving the paused guest waits for it.
            Err(Error::Stuck { .. }) => Ok(()),
            synced => Ok(synced?),
        }
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        if self.machine.has_ended() {
            return Err("guest: it has ended".into());
        }
        Ok(self.machine.pause()?)
    }

    fn save_state(&mut self) -> Result<Vec<StateSection>, MachineError> {
        let sections = self.machine.save()?.into_iter();
        let section = |Section { name, version, bytes }| StateSection { name, version, bytes };
        Ok(sections.map(section).collect())
    }

    fn prepare_switchover(&mut self) -> Result<(), MachineError> {
        self.controller.commit()?;
        self.committed = true;
        self.machine.prepare_disk_switchover();
        Ok(())
    }

    /// Fails if another process has taken a disk meanwhile. The guest then stays paused, and the
    /// operator can retry (`Unresolved::Stuck`).
    fn resume(&mut self) -> Result<(), MachineError> {
        if self.committed {
            self.machine.take_disks()?;
            self.committed = false;
        }
        self.machine.resume();
        Ok(())
    }

    /// The guest stays paused until this process ends.
    fn relinquish(&mut self) {
        self.machine.release_disks();
    }
}

const NO_MACHINE: &str = "no machine was created";

/// A guest at the destination of a migration or a restore.
pub(crate) struct MigrationTarget {
    /// The options that this host chooses; the peer's description has the rest.
    options: HostOptions,
    max_cpus: u8,
    cpu_features: CpuFeatures,
    /// The guest is restored from a file, from which more copies may be restored.
    is_copy: bool,
    machine: Option<Arc<Machine>>,
    controller: Arc<MigrationController>,
    /// While set, an access to a missing page waits until the page is placed.
    missing: Option<Arc<Missing>>,
}

impl MigrationTarget {
    /// # Errors
    /// KVM is not available.
    pub(crate) fn new(
        options: HostOptions,
        max_cpus: u8,
        controller: &Arc<MigrationController>,
    ) -> Result<Self, Error> {
        let controller = Arc::clone(controller);
        let cpu_features = cpu_features(crate::cpuid::CpuFeatures::of_host()?);
        let is_copy = false;
        Ok(Self {
            options,
            max_cpus,
            cpu_features,
            is_copy,
            machine: None,
            controller,
            missing: None,
        })
    }

    /// Marks the guest as a copy: it is notified by a new VM generation ID.
    pub(crate) fn copy(self) -> Self {
        Self { is_copy: true, ..self }
    }

    /// The guest's machine, once it was created.
    pub(crate) fn machine(&self) -> Option<&Arc<Machine>> {
        self.machine.as_ref()
    }

    /// Stops handling missing pages: they read as zeros from now on. The guest must not run any
    /// more.
    pub(crate) fn drop_missing(&mut self) {
        self.missing = None;
    }

    /// Creates the described machine, with empty memory.
    fn make(&mut self, description: &Description) -> Result<Arc<Machine>, MachineError> {
        let shape = MachineShape::of(description, self.max_cpus)?;
        let MachineShape { cpus, memory_bytes, without, .. } = shape;
        let options = RunOptions {
            host: self.options.clone(),
            memory_bytes,
            cpus,
            without,
            // The CPUID leaves are part of the state.
            nested: false,
            // Nothing is booted: the kernel is in the migrated memory.
            kernel: PathBuf::new(),
            initrd: None,
            command_line: String::new(),
        };
        let machine = Arc::new(Machine::new(&options, standard_output()?)?);
        shape.check_disks(&machine.disk_shapes())?;
        let waiter = if self.is_copy { Waiter::Operator } else { Waiter::Source };
        machine.adopt_disks(&shape.disks, self.options.accept_disks, waiter)?;
        machine.check_supported(&shape.sample)?;
        machine.expect_disks()?;
        self.machine = Some(Arc::clone(&machine));
        Ok(machine)
    }

    /// Takes the disks of a guest that may run here now, without running it.
    pub(crate) fn take_disks(&self) -> Result<(), MachineError> {
        Ok(self.created()?.take_disks()?)
    }

    fn created(&self) -> Result<&Machine, MachineError> {
        Ok(self.machine.as_deref().ok_or(NO_MACHINE)?)
    }
}

impl DestinationMachine for MigrationTarget {
    fn cpu_features(&self) -> CpuFeatures {
        self.cpu_features.clone()
    }

    fn create(&mut self, description: &Description) -> Result<Arc<dyn WritePages>, MachineError> {
        let machine = self.make(description)?;
        Ok(Arc::new(Pages::of(&machine.memory)))
    }

    fn create_missing(
        &mut self,
        description: &Description,
    ) -> Result<Arc<dyn PlacePages>, MachineError> {
        if self.options.memory.shared {
            return Err("operator: --shared memory cannot be restored lazily".into());
        }
        let machine = self.make(description)?;
        let missing = Arc::new(Missing(MissingPages::watch(&machine.memory.map)?));
        self.missing = Some(Arc::clone(&missing));
        Ok(missing)
    }

    fn load_state(&mut self, state: Vec<StateSection>) -> Result<(), MachineError> {
        let section = |StateSection { name, version, bytes }| Section { name, version, bytes };
        let sections: Vec<_> = state.into_iter().map(section).collect();
        let machine = self.created()?;
        machine.load(&sections)?;
        if self.is_copy {
            // Last: loading the interrupt controllers would lose the interrupt.
            generation::renew(&machine.memory.guest, &machine.event)?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.take_disks()?;
        let machine = self.machine.as_ref().ok_or(NO_MACHINE)?;
        Ok(self.controller.start_guest(machine)?)
    }

    fn destroy(&mut self) {
        // Before the source is notified. Other threads may keep the machine a moment longer.
        if let Some(machine) = &self.machine {
            machine.release_disks();
        }
        // A vCPU that waits for a missing page could not stop.
        self.missing = None;
        self.machine = None;
        self.controller.discarded();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryKind;

    #[test]
    fn pages_are_read_written_and_zeroed_in_each_kind_of_memory() {
        for (shared, huge) in [(false, false), (false, true), (true, false)] {
            // Large enough for memory on both sides of the PCI hole.
            let memory = MachineMemory::new(4 << 30, MemoryKind { shared, huge }).unwrap();
            let pages = Pages::of(&memory);
            let range = PageRange::new((4 << 30) / PAGE_BYTES + 5, 40).unwrap();
            let bytes: Vec<u8> = (0..40 * 4096u32).map(|i| (i % 251) as u8).collect();
            let mut out = vec![1; bytes.len()];
            pages.read_pages(range, &mut out).unwrap();
            assert!(out.iter().all(|byte| *byte == 0));
            pages.write_pages(range, &bytes).unwrap();
            pages.read_pages(range, &mut out).unwrap();
            assert_eq!(out, bytes);
            pages.zero_pages(PageRange::new(range.start() + 1, 38).unwrap()).unwrap();
            pages.read_pages(range, &mut out).unwrap();
            assert_eq!(out[..4096], bytes[..4096]);
            assert!(out[4096..39 * 4096].iter().all(|byte| *byte == 0));
            assert_eq!(out[39 * 4096..], bytes[39 * 4096..]);
            let outside = PageRange::new((3 << 30) / PAGE_BYTES, 40).unwrap();
            assert!(pages.read_pages(outside, &mut out).is_err());
            assert!(pages.write_pages(outside, &bytes).is_err());
        }
    }

    /// Reading pages that the guest never wrote must not allocate host memory; zeroing pages must
    /// free it.
    #[test]
    fn reading_a_hole_allocates_nothing_and_zeroing_frees() {
        let memory =
            MachineMemory::new(64 << 20, MemoryKind { shared: true, huge: false }).unwrap();
        let pages = Pages::of(&memory);
        let range = PageRange::new(16, 64).unwrap();
        let mut bytes = vec![0; 64 * 4096];
        pages.read_pages(range, &mut bytes).unwrap();
        assert_eq!(memory.map.resident_pages(), Some(0));
        pages.write_pages(range, &bytes).unwrap();
        assert_eq!(memory.map.resident_pages(), Some(64));
        pages.zero_pages(range).unwrap();
        assert_eq!(memory.map.resident_pages(), Some(0));
    }
}
