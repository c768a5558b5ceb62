//! Memory whose pages are placed when a thread touches them (`userfaultfd`).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use page_set::{PAGE_BYTES, PageRange, PageSet};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::{Backing, HostMemoryError, MemoryMap, ObserveDiscards};

// `include/uapi/linux/userfaultfd.h`, whose structures are below.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Wake {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct ZeroPage {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

/// The missing pages of a guest. A thread that touches one blocks until it was
/// [placed](Self::place). That includes the vCPUs of a KVM guest, so this needs `CAP_SYS_PTRACE` or
/// `vm.unprivileged_userfaultfd = 1`.
///
/// Discarded pages are missing again, and their old contents are void: they are [never
/// placed](Placed::Discarded), and get [zeros](Self::place_zeros) when a thread touches them.
///
/// # Placing and discarding at the same time
/// A discard records its pages under a lock before it begins. A page is placed under the same lock,
/// and only if it was not recorded. So either it is placed before it is recorded, and the discard
/// removes it again; or it is recorded first, and is not placed. Contents are never placed after a
/// discard. Zeros may be placed at any time: the waiting thread reads them, or the discard removes
/// them before that, and the thread blocks again. The lock is held while one page is placed; the
/// only wait under it is the kernel's allocation of a page.
#[derive(Debug)]
pub struct MissingPages {
    uffd: OwnedFd,
    map: MemoryMap,
    discarded: Arc<Discarded>,
}

/// The result of placing a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It was placed.
    Now,
    /// It was present already, and was not changed.
    Before,
    /// It was discarded after watching began, and was not changed.
    Discarded,
}

/// Pages that were discarded after watching began, even if they were used again.
#[derive(Debug, Default)]
struct Discarded(Mutex<PageSet>);

impl Discarded {
    /// The set is consistent at every unlock.
    fn lock(&self) -> MutexGuard<'_, PageSet> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ObserveDiscards for Discarded {
    fn before(&self, pages: &PageSet) {
        self.lock().union_with(pages);
    }
}

impl MissingPages {
    /// Watches all of a guest's memory, which must be anonymous and untouched.
    ///
    /// # Errors
    /// It is backed by a file, the host's pages are not 4 KiB, or the kernel refuses.
    pub fn watch(map: &MemoryMap) -> Result<Self, HostMemoryError> {
        let host = |what| move |errno: Errno| HostMemoryError::Host { what, source: errno.into() };
        if rustix::param::page_size() as u64 != PAGE_BYTES {
            let source = io::Error::from(io::ErrorKind::Unsupported);
            return Err(HostMemoryError::Host {
                what: "missing pages need a host with 4 KiB pages",
                source,
            });
        }
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: the descriptor is only used below, on memory of regions, whose constructors
        // guaranteed that its contents may change at any time.
        let uffd = unsafe { userfaultfd(flags) }.map_err(host("userfaultfd"))?;
        let discarded = Arc::new(Discarded::default());
        let missing = Self { uffd, map: map.clone(), discarded };
        let mut api = Api { api: UFFD_API, ..Api::default() };
        missing.call(UFFDIO_API, &mut api).map_err(host("UFFDIO_API"))?;
        for region in map.regions() {
            let Backing::Anonymous(memory) = region.backing() else {
                return Err(HostMemoryError::NotReleasable { pages: region.pages() });
            };
            let (start, len) = (memory.host_bytes() as u64, region.pages().pages() * PAGE_BYTES);
            let mut register =
                Register { start, len, mode: REGISTER_MODE_MISSING, ..Register::default() };
            missing.call(UFFDIO_REGISTER, &mut register).map_err(host("UFFDIO_REGISTER"))?;
        }
        map.observe(Arc::clone(&missing.discarded) as _);
        Ok(missing)
    }

    /// Waits up to `wait` for a thread that touches a missing page; returns that guest page.
    ///
    /// # Errors
    /// `poll` or `read` fails.
    pub fn next(&self, wait: Duration) -> io::Result<Option<u64>> {
        let time = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.uffd, PollFlags::IN)], Some(&time)) {
            // A signal, not a page fault.
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        // struct uffd_msg: the event, then flags and address of the fault.
        let mut message = [0; 32];
        match rustix::io::read(&self.uffd, &mut message) {
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        let [event, .., a0, a1, a2, a3, a4, a5, a6, a7, _, _, _, _, _, _, _, _] = message;
        if event != EVENT_PAGEFAULT {
            return Ok(None);
        }
        Ok(self.page_of(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])))
    }

    /// Puts contents, or zeros if `None`, into a missing page, and wakes the threads that wait for
    /// it, unless it was discarded. Zeros cost the host no memory until they are written.
    ///
    /// # Errors
    /// The page does not exist, or the kernel refuses.
    pub fn place(&self, page: u64, contents: Option<&[u8; 4096]>) -> io::Result<Placed> {
        self.place_after(page, contents, || {})
    }

    /// Calls `between`, for tests, after the check for a discard and before placing the page.
    fn place_after(
        &self,
        page: u64,
        contents: Option<&[u8; 4096]>,
        between: impl FnOnce(),
    ) -> io::Result<Placed> {
        let to = self.address(page)?;
        // Held over the call: a discard waits for it, and then removes the page.
        let discarded = self.discarded.lock();
        if discarded.contains(page) {
            return Ok(Placed::Discarded);
        }
        between();
        let is_new = match contents {
            Some(contents) => {
                let from = contents.as_ptr() as u64;
                self.put(to, || {
                    let mut copy = Copy { to, from, len: PAGE_BYTES, ..Copy::default() };
                    self.call(UFFDIO_COPY, &mut copy)
                })?
            }
            None => self.put_zeros(to)?,
        };
        drop(discarded);
        Ok(if is_new { Placed::Now } else { Placed::Before })
    }

    /// Puts zeros into a discarded page that a thread waits for.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zeros(&self, page: u64) -> io::Result<()> {
        self.put_zeros(self.address(page)?).map(drop)
    }

    /// True if the page was discarded, so that its contents are not needed.
    #[must_use]
    pub fn was_discarded(&self, page: u64) -> bool {
        self.discarded.lock().contains(page)
    }

    fn put_zeros(&self, start: u64) -> io::Result<bool> {
        self.put(start, || {
            let mut zeros = ZeroPage { start, len: PAGE_BYTES, ..ZeroPage::default() };
            self.call(UFFDIO_ZEROPAGE, &mut zeros)
        })
    }

    fn put(&self, start: u64, mut put: impl FnMut() -> Result<(), Errno>) -> io::Result<bool> {
        loop {
            match put() {
                Ok(()) => return Ok(true),
                // The process's mappings are being changed.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::EXIST) => {
                    let mut wake = Wake { start, len: PAGE_BYTES };
                    self.call(UFFDIO_WAKE, &mut wake)?;
                    return Ok(false);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn address(&self, page: u64) -> io::Result<u64> {
        let piece = self.map.find(page);
        let piece = piece.ok_or_else(|| {
            PageRange::new(page, 1).map_or_else(
                |error| io::Error::new(io::ErrorKind::InvalidInput, error),
                |pages| io::Error::new(io::ErrorKind::InvalidInput, crate::OutsideMemory { pages }),
            )
        })?;
        // All regions are anonymous, so this is an address of this process.
        Ok(piece.start_bytes())
    }

    fn page_of(&self, address: u64) -> Option<u64> {
        self.map.regions().iter().find_map(|region| {
            let Backing::Anonymous(memory) = region.backing() else { return None };
            let offset = address.checked_sub(memory.host_bytes() as u64)? / PAGE_BYTES;
            (offset < region.pages().pages()).then(|| region.pages().start() + offset)
        })
    }

    fn call<T>(&self, request: u64, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: every `request` here has its own structure (the size is a part of the request's
        // number), which lives until the call returns. `UFFDIO_COPY` reads one page at `from`,
        // which `place` borrows meanwhile. Besides the structure, the calls write only missing
        // pages of registered regions: the creator of an `AnonymousMemory` guaranteed that no
        // reference points into it and that nothing depends on its contents; `map` keeps it mapped.
        let result =
            unsafe { libc::ioctl(self.uffd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result == 0 {
            return Ok(());
        }
        let errno = io::Error::last_os_error();
        Err(Errno::from_io_error(&errno).unwrap_or(Errno::IO))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::{Discard, resident::resident_bytes};

    fn page(value: u8) -> [u8; 4096] {
        [value; 4096]
    }

    /// Watches memory; prints a line and returns `None` if that is not permitted.
    fn watch(map: &MemoryMap) -> Option<MissingPages> {
        match MissingPages::watch(map) {
            Ok(missing) => Some(missing),
            // Not root, and not permitted.
            Err(HostMemoryError::Host { what: "userfaultfd", source }) => {
                eprintln!("SKIPPED: userfaultfd was refused: {source}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    extern "C" fn ignore(_: libc::c_int) {}

    #[test]
    fn a_signal_ends_a_wait_without_an_error() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 12)]).unwrap();
        let map = MemoryMap::of_guest_memory(&memory).unwrap();
        let Some(missing) = watch(&map) else { return };
        // SAFETY: the handler does nothing, and no other test of this process uses the signal.
        unsafe { libc::signal(libc::SIGURG, ignore as *const () as libc::sighandler_t) };
        let (send, thread) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                // SAFETY: a call without arguments.
                send.send(unsafe { libc::pthread_self() }).unwrap();
                missing.next(Duration::from_secs(60))
            });
            let thread = thread.recv().unwrap();
            while !waiter.is_finished() {
                // SAFETY: the thread is not joined yet, so its id is valid.
                unsafe { libc::pthread_kill(thread, libc::SIGURG) };
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(waiter.join().unwrap().unwrap(), None);
        });
    }

    #[test]
    fn discarded_pages_read_as_zeros_and_are_never_placed() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 12)]).unwrap();
        let map = MemoryMap::of_guest_memory(&memory).unwrap();
        // The releasing side has a copy of the map, made before.
        let (host, one_by_one) = (map.clone(), map.clone());
        let Some(missing) = watch(&map) else { return };
        let pages = |start, pages| PageSet::from(PageRange::new(start, pages).unwrap());
        missing.place(3, Some(&page(3))).unwrap();
        // One page that is present, and others that are not.
        let _ = host.discard(&pages(3, 10));
        let _ = one_by_one.discard_per_page(&pages(20, 2));
        for at in [3, 4, 12, 20, 21] {
            assert!(missing.was_discarded(at));
            assert_eq!(missing.place(at, Some(&page(9))).unwrap(), Placed::Discarded);
            assert_eq!(missing.place(at, None).unwrap(), Placed::Discarded);
        }
        assert_eq!(missing.place(13, Some(&page(13))).unwrap(), Placed::Now);
        assert_eq!(resident_bytes(&map).unwrap(), PAGE_BYTES);
        thread::scope(|scope| {
            let reader = scope.spawn(|| memory.read_obj::<u8>(GuestAddress(4 << 12)).unwrap());
            while !reader.is_finished() {
                if let Some(at) = missing.next(Duration::from_millis(10)).unwrap() {
                    assert_eq!((at, missing.was_discarded(at)), (4, true));
                    missing.place_zeros(at).unwrap();
                }
            }
            assert_eq!(reader.join().unwrap(), 0);
        });
        // The guest's writes after that stay until the next discard.
        memory.write_obj(7u8, GuestAddress(4 << 12)).unwrap();
        assert_eq!(missing.place(4, Some(&page(9))).unwrap(), Placed::Discarded);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4 << 12)).unwrap(), 7);
    }

    /// A discard while the page is being placed waits, and then removes the page.
    #[test]
    fn a_page_placed_during_its_discard_is_removed() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 12)]).unwrap();
        let map = MemoryMap::of_guest_memory(&memory).unwrap();
        let Some(missing) = watch(&map) else { return };
        let pages = PageSet::from(PageRange::new(5, 1).unwrap());
        let over = AtomicU64::new(0);
        thread::scope(|scope| {
            let placed = missing.place_after(5, Some(&page(1)), || {
                scope.spawn(|| {
                    let _ = map.discard(&pages);
                    over.store(1, Ordering::SeqCst);
                });
                // More than enough for it to end, if it did not wait.
                thread::sleep(Duration::from_millis(100));
            });
            assert_eq!(placed.unwrap(), Placed::Now);
        });
        assert_eq!((over.load(Ordering::SeqCst), resident_bytes(&map).unwrap()), (1, 0));
        assert_eq!(missing.place(5, Some(&page(1))).unwrap(), Placed::Discarded);
    }

    #[test]
    fn a_thread_that_touches_a_page_reads_what_is_placed() {
        let ranges = [(GuestAddress(0x10_0000), 16 << 12), (GuestAddress(0x40_0000), 16 << 12)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let map = MemoryMap::of_guest_memory(&memory).unwrap();
        let Some(missing) = watch(&map) else { return };
        assert_eq!(missing.next(Duration::ZERO).unwrap(), None);
        assert_eq!(missing.place(0x405, Some(&page(9))).unwrap(), Placed::Now);
        assert_eq!(missing.place(0x405, Some(&page(8))).unwrap(), Placed::Before);
        assert!(missing.place(0x50, Some(&page(8))).is_err());
        let served = AtomicU64::new(0);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                [0x10_2008u64, 0x40_5000, 0x40_f008, 0x10_1000]
                    .map(|at| memory.read_obj::<u8>(GuestAddress(at)).unwrap())
            });
            while !reader.is_finished() {
                let Some(at) = missing.next(Duration::from_millis(10)).unwrap() else { continue };
                served.fetch_add(1, Ordering::Relaxed);
                if at == 0x101 {
                    missing.place(at, None).unwrap();
                } else {
                    missing.place(at, Some(&page(at.to_le_bytes()[0]))).unwrap();
                }
            }
            assert_eq!(reader.join().unwrap(), [2, 9, 0xf, 0]);
        });
        assert_eq!(served.load(Ordering::Relaxed), 3);
    }
}
