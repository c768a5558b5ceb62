//! Memory shared by a peer, which the host may fail to back when it is touched.
//!
//! A file can be mapped whether or not the host has memory for it: pages of hugetlbfs whose
//! pool is empty, of a tmpfs that is full, of shared memory beyond the commit limit, or
//! beyond the end of a file that was truncated since. Touching such a page raises SIGBUS,
//! which ends the process and all other guests in it. No check beforehand helps: a process
//! that has the file can take the memory away later.
//!
//! So this module handles SIGBUS. If the address lies in [watched](BackedMemory) memory, the
//! handler maps a page of its own there and marks this memory as lost. The access completes
//! with meaningless bytes, and every later access fails. This costs nothing until then. Any
//! other SIGBUS has its previous effect.
//!
//! # What the handler may do
//! It runs between any two instructions of the thread that touched the page, so it takes no
//! lock and allocates nothing: it reads atomics and calls `mmap`. It needs no host memory
//! either, which may be exhausted: its page exists from the beginning, and a shared mapping
//! of a file does not count against the commit limit.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, Permissions,
};

use crate::{HostMemoryError, HostPages};

/// Bytes that are replaced at a time.
const PAGE: usize = 4096;

/// Limit of regions of one guest: twice the limit of a vhost-user front end.
const MAX_REGIONS: usize = 64;

/// Shared memory of a guest, all of it a peer's. All accesses fail once a page was touched that
/// the host could not back.
///
/// The access that raised SIGBUS succeeds. A caller must check
/// [`check_range`](GuestMemory::check_range) before it acts on what it read; it is false for lost
/// memory.
#[derive(Debug)]
pub struct BackedMemory {
    memory: GuestMemoryMmap,
    watch: &'static Watch,
}

impl BackedMemory {
    /// Watches `memory`, which must have no other owner.
    ///
    /// # Errors
    /// It has too many regions, or the host refuses a system call.
    pub fn new(memory: GuestMemoryMmap) -> Result<Self, HostMemoryError> {
        install()?;
        let regions = memory.iter().map(|region| {
            let start = region.as_ptr() as usize;
            let len = usize::try_from(region.len()).unwrap_or(usize::MAX);
            let host_pages = region.file_offset().map(|place| HostPages::of_file(place.file()));
            let host_page = match host_pages.transpose()? {
                Some(HostPages::Hugetlb { host_page_pages }) => {
                    usize::try_from(host_page_pages).unwrap_or(1) * PAGE
                }
                _ => PAGE,
            };
            Ok((start, start.saturating_add(len), host_page))
        });
        let regions = regions.collect::<Result<Vec<_>, HostMemoryError>>()?;
        let watch = Watch::begin(&regions).ok_or_else(|| HostMemoryError::Host {
            what: "watching memory: more regions than a front end can have",
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        Ok(Self { memory, watch })
    }

    /// The first address that the host could not back; `None` if there was none.
    pub fn lost_at(&self) -> Option<GuestAddress> {
        let at = self.watch.lost.load(Ordering::Acquire);
        let place = self.memory.iter().find_map(|region| {
            let offset = at.checked_sub(region.as_ptr() as usize)? as u64;
            (offset < region.len()).then(|| region.start_addr().unchecked_add(offset))
        });
        // Only addresses of watched regions are recorded.
        if at == 0 { None } else { Some(place.unwrap_or(GuestAddress(0))) }
    }

    fn is_lost(&self) -> bool {
        self.watch.lost.load(Ordering::Acquire) != 0
    }
}

impl Drop for BackedMemory {
    fn drop(&mut self) {
        // Before the memory is unmapped and its addresses are reused.
        self.watch.end();
    }
}

impl GuestMemory for BackedMemory {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        !self.is_lost() && GuestMemory::check_range(&self.memory, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        if self.is_lost() {
            let lost = io::Error::other("the guest's memory is not backed by the host");
            return Err(GuestMemoryError::IOError(lost));
        }
        GuestMemory::get_slices(&self.memory, addr, count, access)
    }
}

/// The handler's record of one guest's memory. Watches are reused and never freed, so that the
/// handler can walk their list at any time.
#[derive(Debug)]
struct Watch {
    next: *const Watch,
    used: AtomicBool,
    /// The first address that was not backed; 0 if there was none.
    lost: AtomicUsize,
    regions: [Region; MAX_REGIONS],
}

// SAFETY: `next` is set before other threads can reach the watch, never changes, and points to a
// watch that is never freed; all other fields are atomics.
unsafe impl Sync for Watch {}

#[derive(Debug, Default)]
struct Region {
    /// First address; 0 if unused.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Bytes of a host page.
    host_page: AtomicUsize,
}

/// The newest watch.
static WATCHES: AtomicPtr<Watch> = AtomicPtr::new(ptr::null_mut());

/// Held while a watch is taken from the list or added to it.
static TAKING: Mutex<()> = Mutex::new(());

/// The file of one page that replaces pages without memory.
static STAND_IN: AtomicI32 = AtomicI32::new(-1);

/// The previous action of SIGBUS.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

impl Watch {
    /// Watches `regions`: first address, end, bytes of a host page. `None` if there are too many.
    fn begin(regions: &[(usize, usize, usize)]) -> Option<&'static Self> {
        if regions.len() > MAX_REGIONS {
            return None;
        }
        let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        let free = watches().find(|watch| !watch.used.load(Ordering::Acquire));
        let watch = free.unwrap_or_else(|| {
            let new: &'static Self = Box::leak(Box::new(Self {
                next: WATCHES.load(Ordering::Acquire),
                used: AtomicBool::new(false),
                lost: AtomicUsize::new(0),
                regions: std::array::from_fn(|_| Region::default()),
            }));
            WATCHES.store(ptr::from_ref(new).cast_mut(), Ordering::Release);
            new
        });
        watch.used.store(true, Ordering::Release);
        watch.lost.store(0, Ordering::Release);
        for (region, (start, end, host_page)) in watch.regions.iter().zip(regions) {
            region.end.store(*end, Ordering::Release);
            region.host_page.store(*host_page, Ordering::Release);
            region.start.store(*start, Ordering::Release);
        }
        Some(watch)
    }

    fn end(&self) {
        for region in &self.regions {
            region.start.store(0, Ordering::Release);
            region.end.store(0, Ordering::Release);
        }
        self.used.store(false, Ordering::Release);
    }
}

/// All watches, used or not.
fn watches() -> impl Iterator<Item = &'static Watch> {
    // SAFETY: the pointers are null or point to leaked watches, as documented at `Watch`.
    let first = unsafe { WATCHES.load(Ordering::Acquire).as_ref() };
    // SAFETY: likewise.
    std::iter::successors(first, |watch| unsafe { watch.next.as_ref() })
}

/// Installs the SIGBUS handler, once for the process.
fn install() -> Result<(), HostMemoryError> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    let host = |what| move |source: io::Error| HostMemoryError::Host { what, source };
    let file = memfd_create("stand-in", MemfdFlags::CLOEXEC)
        .map_err(|error| host("memfd_create")(error.into()))?;
    let file = File::from(file);
    // Write it, so that its memory is allocated now.
    file.write_all_at(&[0; PAGE], 0).map_err(host("writing a page of shared memory"))?;
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: reads the signal's action into a structure of the right type, for which zeros are
    // a valid value.
    let before = unsafe {
        libc::sigaction(libc::SIGBUS, ptr::null(), before.as_mut_ptr());
        before.assume_init()
    };
    BEFORE.get_or_init(|| before);
    STAND_IN.store(file.as_raw_fd(), Ordering::Release);
    // The handler uses it until the process ends.
    std::mem::forget(file);
    let flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    if !set_action(on_bus_error as *const () as libc::sighandler_t, flags) {
        return Err(host("installing the SIGBUS handler")(io::Error::last_os_error()));
    }
    *installed = true;
    Ok(())
}

fn set_action(handler: libc::sighandler_t, flags: libc::c_int) -> bool {
    // SAFETY: zeros are a valid value: no flags, an empty mask.
    let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `handler` is the default, or `on_bus_error` with the flag that passes its three
    // arguments; it makes only calls that a handler may make.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) == 0 }
}

/// The SIGBUS handler.
extern "C" fn on_bus_error(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a handler with SA_SIGINFO a valid `info`, which has an address if
    // the code is that of a failed access.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // The second is a hardware memory error; the page is lost as well.
    let is_access = matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR);
    // SAFETY: this thread's errno, which the interrupted code may still need.
    let errno = unsafe { *libc::__errno_location() };
    if is_access && replace(address) {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        return;
    }
    pass_on(signal, info, context, code);
}

/// Maps the stand-in at `address`, if that is watched.
fn replace(address: usize) -> bool {
    for watch in watches() {
        for region in &watch.regions {
            let start = region.start.load(Ordering::Acquire);
            let end = region.end.load(Ordering::Acquire);
            let host_page = region.host_page.load(Ordering::Acquire).max(PAGE);
            // Read twice: another thread may be starting or ending this watch.
            let is_whole = start != 0 && region.start.load(Ordering::Acquire) == start;
            if is_whole && (start..end).contains(&address) {
                let _ =
                    watch.lost.compare_exchange(0, address, Ordering::AcqRel, Ordering::Acquire);
                return put_stand_in(address, host_page);
            }
        }
    }
    false
}

/// Part of a hugetlbfs page cannot be replaced. So the whole page is replaced by a mapping beyond
/// the end of the stand-in's file, where each touched 4 KiB page raises SIGBUS again.
fn put_stand_in(address: usize, host_page: usize) -> bool {
    let page = address & !(PAGE - 1);
    if map_stand_in(page, PAGE, 0) {
        return true;
    }
    host_page > PAGE
        && map_stand_in(address & !(host_page - 1), host_page, PAGE)
        && map_stand_in(page, PAGE, 0)
}

fn map_stand_in(at: usize, len: usize, offset: usize) -> bool {
    let fd = STAND_IN.load(Ordering::Acquire);
    let Ok(offset) = libc::off_t::try_from(offset) else { return false };
    // SAFETY: the range lies in memory of a `BackedMemory`, since hugetlbfs maps whole, aligned
    // pages. That memory exists as long as the range is watched, and is unmapped as a whole with
    // everything mapped into it. No reference points there; vm-memory uses volatile accesses and
    // expects it to change at any time.
    let mapped = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(at),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
            fd,
            offset,
        )
    };
    mapped != libc::MAP_FAILED
}

/// Runs the previous action of SIGBUS.
fn pass_on(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    code: libc::c_int,
) {
    let before = BEFORE.get().map_or((libc::SIG_DFL, 0), |old| (old.sa_sigaction, old.sa_flags));
    match before {
        (libc::SIG_DFL | libc::SIG_IGN, _) => {
            // When this returns, the access is repeated and ends the process.
            set_action(libc::SIG_DFL, 0);
            if code <= 0 {
                // Another process sent the signal, so no access is repeated.
                // SAFETY: a call without pointers; the signal is delivered when this returns.
                unsafe { libc::raise(signal) };
            }
        }
        (handler, flags) if flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: a handler registered with this flag has these three arguments.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        (handler, _) => {
            // SAFETY: a handler registered without that flag has this one argument.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use vm_memory::{Bytes, FileOffset, GuestRegionMmap};

    use super::*;

    const HUGE: usize = 2 << 20;
    const BASE: u64 = 0x10_0000;

    fn map(file: &File, bytes: usize) -> GuestMemoryMmap {
        let place = FileOffset::new(file.try_clone().unwrap(), 0);
        let region = GuestRegionMmap::from_range(GuestAddress(BASE), bytes, Some(place)).unwrap();
        GuestMemoryMmap::from_regions(vec![region]).unwrap()
    }

    fn memfd(flags: MemfdFlags, bytes: usize) -> Option<File> {
        let file = File::from(memfd_create("guest", flags | MemfdFlags::CLOEXEC).ok()?);
        file.set_len(bytes as u64).ok()?;
        Some(file)
    }

    /// Checks the errors of `memory` after an access that the host could not back.
    fn assert_lost(memory: &BackedMemory, at: u64) {
        assert_eq!(memory.lost_at(), Some(GuestAddress(at)));
        assert!(!memory.check_range(GuestAddress(BASE), 1, Permissions::Read));
        let error = memory.read_obj::<u64>(GuestAddress(BASE)).unwrap_err();
        assert!(error.to_string().contains("not backed by the host"), "{error}");
        memory.write_obj(1u8, GuestAddress(BASE)).unwrap_err();
    }

    #[test]
    fn only_a_truncated_file_is_lost() {
        let file = memfd(MemfdFlags::empty(), 16 * PAGE).unwrap();
        let other = memfd(MemfdFlags::empty(), 16 * PAGE).unwrap();
        // Watches are reused.
        for _ in 0..3 {
            file.set_len(16 * PAGE as u64).unwrap();
            let memory = BackedMemory::new(map(&file, 16 * PAGE)).unwrap();
            let well = BackedMemory::new(map(&other, 16 * PAGE)).unwrap();
            memory.write_obj(7u64, GuestAddress(BASE + 0x8000)).unwrap();
            well.write_obj(9u64, GuestAddress(BASE + 0x8000)).unwrap();
            file.set_len(4 * PAGE as u64).unwrap();
            assert_eq!(memory.lost_at(), None, "not touched yet");
            // One access across the whole truncated part.
            let mut bytes = [0xff; 8 * PAGE];
            memory.read_slice(&mut bytes, GuestAddress(BASE + 0x2000)).unwrap();
            assert_lost(&memory, BASE + 0x4000);
            assert_eq!(well.read_obj::<u64>(GuestAddress(BASE + 0x8000)).unwrap(), 9);
            assert_eq!(well.lost_at(), None);
        }
    }

    /// A write across two pages, neither of which is backed.
    #[test]
    fn an_unbacked_write_is_lost_too() {
        let file = memfd(MemfdFlags::empty(), 4 * PAGE).unwrap();
        let memory = BackedMemory::new(map(&file, 4 * PAGE)).unwrap();
        file.set_len(PAGE as u64).unwrap();
        memory.write_slice(&[1; 16], GuestAddress(BASE + 0x1ff8)).unwrap();
        assert_lost(&memory, BASE + 0x1ff8);
        assert_eq!(file.metadata().unwrap().len(), PAGE as u64);
    }

    #[test]
    fn huge_pages_of_an_empty_pool_are_lost() {
        let free = || {
            let at = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
            std::fs::read_to_string(at).ok()?.trim().parse::<usize>().ok()
        };
        let Some(free) = free() else { return eprintln!("SKIPPED: no huge pages here") };
        let bytes = (free + 2) * HUGE;
        let Some(file) = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, bytes) else {
            return eprintln!("SKIPPED: no memfd of huge pages");
        };
        let memory = BackedMemory::new(map(&file, bytes)).unwrap();
        for at in (0..bytes).step_by(HUGE) {
            // Across two of the small pages in it.
            let at = GuestAddress(BASE + at as u64 + 0x2ffc);
            if memory.write_slice(&[1; 8], at).is_err() || memory.lost_at().is_some() {
                break;
            }
        }
        assert_lost(&memory, memory.lost_at().expect("more than the pool has").0);
    }

    /// The next test runs this in another process.
    #[test]
    #[ignore = "it ends the process"]
    fn touches_unwatched_memory() {
        let file = memfd(MemfdFlags::empty(), PAGE).unwrap();
        let _watched = BackedMemory::new(map(&file, PAGE)).unwrap();
        let other = memfd(MemfdFlags::empty(), PAGE).unwrap();
        let memory = map(&other, PAGE);
        other.set_len(0).unwrap();
        memory.write_obj(1u8, GuestAddress(BASE)).unwrap();
    }

    #[test]
    fn a_bus_error_in_unwatched_memory_ends_the_process() {
        let name = "backed::tests::touches_unwatched_memory";
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--ignored", "--nocapture"])
            .output()
            .unwrap();
        assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{ended:?}");
    }
}
