//! Memory that a peer shares, and that may have nothing behind it when it is touched.
//!
//! A file can be mapped whether or not the host has memory for it: pages of hugetlbfs whose
//! pool is empty, of a tmpfs that is full, of shared memory beyond the commit limit, or
//! beyond the end of a file that was shortened since. Who touches such a page gets SIGBUS,
//! which ends the process, and with it what others keep in it. That cannot be found out
//! beforehand: what is there now can be taken away by whoever has the file.
//!
//! So SIGBUS is taken. Where the address lies in memory that is [watched](BackedMemory), the
//! handler puts a page of its own there and notes that this memory is lost; the access goes
//! on, with bytes that nobody shall believe, and every later one fails. This costs nothing
//! as long as all is well. Any other SIGBUS does what it did before.
//!
//! # What the handler may do
//! It runs between any two instructions of the thread that touched the page, so it takes no
//! lock and allocates nothing: it reads atomics and calls `mmap`. It needs no memory of the
//! host either, which may have none left: the page is there from the beginning, and a shared
//! mapping of a file counts against no limit of commitments.

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

/// Bytes of a page: what is replaced at a time.
const PAGE: usize = 4096;

/// Regions of one guest: twice what a vhost-user front end can name.
const MAX_REGIONS: usize = 64;

/// Shared memory of a guest, all of it a peer's. Its accesses fail from the moment on at
/// which some of it was touched and was not there.
///
/// An access that meets the loss itself ends with success. Whoever acts on what was read asks
/// [`check_range`](GuestMemory::check_range) first, which is false of memory that is lost.
#[derive(Debug)]
pub struct BackedMemory {
    memory: GuestMemoryMmap,
    watch: &'static Watch,
}

impl BackedMemory {
    /// Watches `memory`, which nobody else may have.
    ///
    /// # Errors
    /// It has too many regions, or the host refuses what the watch needs.
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
            what: "watching memory of more regions than any front end can name",
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        Ok(Self { memory, watch })
    }

    /// Where memory was touched first that was not there; `None` while all is well.
    pub fn lost_at(&self) -> Option<GuestAddress> {
        let at = self.watch.lost.load(Ordering::Acquire);
        let place = self.memory.iter().find_map(|region| {
            let offset = at.checked_sub(region.as_ptr() as usize)? as u64;
            (offset < region.len()).then(|| region.start_addr().unchecked_add(offset))
        });
        // An address of the process that is none of the guest's was never noted.
        if at == 0 { None } else { Some(place.unwrap_or(GuestAddress(0))) }
    }

    fn is_lost(&self) -> bool {
        self.watch.lost.load(Ordering::Acquire) != 0
    }
}

impl Drop for BackedMemory {
    fn drop(&mut self) {
        // Before the memory is unmapped, whose addresses may be another's then.
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
            let lost = io::Error::other("the guest's memory has no memory of the host behind it");
            return Err(GuestMemoryError::IOError(lost));
        }
        GuestMemory::get_slices(&self.memory, addr, count, access)
    }
}

/// What the handler knows of one guest's memory. Watches are used again and never freed, so
/// that the handler can walk their list at any time.
#[derive(Debug)]
struct Watch {
    next: *const Watch,
    used: AtomicBool,
    /// The first address that was not there; 0 if there was none.
    lost: AtomicUsize,
    regions: [Region; MAX_REGIONS],
}

// SAFETY: `next` is set before the watch can be reached by others, never changes, and points
// to a watch that is never freed; all else are atomics.
unsafe impl Sync for Watch {}

#[derive(Debug, Default)]
struct Region {
    /// First address, 0 where there is no region.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Bytes of the host's pages.
    host_page: AtomicUsize,
}

/// The newest watch.
static WATCHES: AtomicPtr<Watch> = AtomicPtr::new(ptr::null_mut());

/// Held by who takes a watch out of the list, or adds one.
static TAKING: Mutex<()> = Mutex::new(());

/// The file of one page that stands for what is not there.
static STAND_IN: AtomicI32 = AtomicI32::new(-1);

/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

impl Watch {
    /// Watches `regions`: first address, end, bytes of a host page. `None`: too many.
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
    // SAFETY: the pointers are null or of watches that were leaked, as `Watch` says.
    let first = unsafe { WATCHES.load(Ordering::Acquire).as_ref() };
    // SAFETY: likewise.
    std::iter::successors(first, |watch| unsafe { watch.next.as_ref() })
}

/// Takes SIGBUS from now on, once for the process.
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
    // Written, so that it has its memory now.
    file.write_all_at(&[0; PAGE], 0).map_err(host("writing a page of shared memory"))?;
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asks what the signal does, and writes that to a structure of the right type,
    // for which zeros are a value too.
    let before = unsafe {
        libc::sigaction(libc::SIGBUS, ptr::null(), before.as_mut_ptr());
        before.assume_init()
    };
    BEFORE.get_or_init(|| before);
    STAND_IN.store(file.as_raw_fd(), Ordering::Release);
    // It is the handler's for ever.
    std::mem::forget(file);
    let flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    if !take_signal(on_bus_error as *const () as libc::sighandler_t, flags) {
        return Err(host("taking SIGBUS")(io::Error::last_os_error()));
    }
    *installed = true;
    Ok(())
}

fn take_signal(handler: libc::sighandler_t, flags: libc::c_int) -> bool {
    // SAFETY: zeros are a value of the structure: no flags, an empty mask.
    let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `handler` is the default, or `on_bus_error` with the flag that gives it the three
    // arguments that it has; it does nothing that a handler may not do.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) == 0 }
}

/// The handler.
extern "C" fn on_bus_error(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid `info`, which has an address
    // where the code says that an access failed.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // The last is memory of the host that went bad; who reads it has lost it as well.
    let is_access = matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR);
    // SAFETY: this thread's, and what is left of the call in which the signal came.
    let errno = unsafe { *libc::__errno_location() };
    if is_access && replace(address) {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        return;
    }
    pass_on(signal, info, context, code);
}

/// Puts the stand-in where `address` is, if that is watched.
fn replace(address: usize) -> bool {
    for watch in watches() {
        for region in &watch.regions {
            let start = region.start.load(Ordering::Acquire);
            let end = region.end.load(Ordering::Acquire);
            let host_page = region.host_page.load(Ordering::Acquire).max(PAGE);
            // Asked twice: another thread may just begin or end with this watch.
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

/// Part of a page of hugetlbfs cannot be replaced. So the whole is, by the stand-in's file
/// beyond its end, where each 4 KiB page that is touched brings us here once more.
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
    // SAFETY: the range lies in memory of a `BackedMemory`, since hugetlbfs maps whole pages at
    // borders of such: it exists as long as the range is watched, and it is unmapped as a whole
    // with all that was put into it. No reference points there; vm-memory touches it by
    // volatile accesses and takes it to change at any time.
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

/// Does what SIGBUS did before.
fn pass_on(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    code: libc::c_int,
) {
    let before = BEFORE.get().map_or((libc::SIG_DFL, 0), |old| (old.sa_sigaction, old.sa_flags));
    match before {
        (libc::SIG_DFL | libc::SIG_IGN, _) => {
            // The access is made once more when this returns, and ends the process.
            take_signal(libc::SIG_DFL, 0);
            if code <= 0 {
                // Somebody sent it, so nothing is made once more.
                // SAFETY: a call without pointers; the signal comes when this returns.
                unsafe { libc::raise(signal) };
            }
        }
        (handler, flags) if flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: what was registered with this flag has these three arguments.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        (handler, _) => {
            // SAFETY: what was registered without that flag has this one argument.
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

    /// What `memory` says once it was touched where nothing is behind it.
    fn assert_lost(memory: &BackedMemory, at: u64) {
        assert_eq!(memory.lost_at(), Some(GuestAddress(at)));
        assert!(!memory.check_range(GuestAddress(BASE), 1, Permissions::Read));
        let error = memory.read_obj::<u64>(GuestAddress(BASE)).unwrap_err();
        assert!(error.to_string().contains("no memory of the host"), "{error}");
        memory.write_obj(1u8, GuestAddress(BASE)).unwrap_err();
    }

    #[test]
    fn a_file_that_was_shortened_is_lost_and_no_other() {
        let file = memfd(MemfdFlags::empty(), 16 * PAGE).unwrap();
        let other = memfd(MemfdFlags::empty(), 16 * PAGE).unwrap();
        // Watches are used again.
        for _ in 0..3 {
            file.set_len(16 * PAGE as u64).unwrap();
            let memory = BackedMemory::new(map(&file, 16 * PAGE)).unwrap();
            let well = BackedMemory::new(map(&other, 16 * PAGE)).unwrap();
            memory.write_obj(7u64, GuestAddress(BASE + 0x8000)).unwrap();
            well.write_obj(9u64, GuestAddress(BASE + 0x8000)).unwrap();
            file.set_len(4 * PAGE as u64).unwrap();
            assert_eq!(memory.lost_at(), None, "nobody has touched it");
            // Across all that is gone, in one access.
            let mut bytes = [0xff; 8 * PAGE];
            memory.read_slice(&mut bytes, GuestAddress(BASE + 0x2000)).unwrap();
            assert_lost(&memory, BASE + 0x4000);
            assert_eq!(well.read_obj::<u64>(GuestAddress(BASE + 0x8000)).unwrap(), 9);
            assert_eq!(well.lost_at(), None);
        }
    }

    /// A write that reaches from one page into the next: neither is there.
    #[test]
    fn a_write_is_lost_too() {
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

    /// Run by the next test in a process of its own.
    #[test]
    #[ignore = "it ends the process"]
    fn touches_memory_that_nobody_watches() {
        let file = memfd(MemfdFlags::empty(), PAGE).unwrap();
        let _watched = BackedMemory::new(map(&file, PAGE)).unwrap();
        let other = memfd(MemfdFlags::empty(), PAGE).unwrap();
        let memory = map(&other, PAGE);
        other.set_len(0).unwrap();
        memory.write_obj(1u8, GuestAddress(BASE)).unwrap();
    }

    #[test]
    fn what_nobody_watches_ends_the_process_as_before() {
        let name = "backed::tests::touches_memory_that_nobody_watches";
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--ignored", "--nocapture"])
            .output()
            .unwrap();
        assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{ended:?}");
    }
}
