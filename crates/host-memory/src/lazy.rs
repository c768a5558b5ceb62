//! Memory whose pages come when somebody touches them (`userfaultfd`).

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

/// The pages of a guest that are not there yet. Whoever touches one waits until it was
/// [placed](Self::place); the processors of a KVM guest too, which is why making this needs
/// `CAP_SYS_PTRACE` or `vm.unprivileged_userfaultfd = 1`.
///
/// Pages that are discarded are missing, and what they were to have is nothing any more: they are
/// [never placed](Placed::Discarded), and [zeros](Self::place_zeros) when somebody touches them.
///
/// # Placing and discarding at the same time
/// A discard notes its pages under a lock before it begins; a page is placed under the same lock,
/// and only if it was not noted. So it is placed before the note, and the discard takes it away
/// again; or the note is there, and it is not placed. Contents are never placed behind a discard.
/// Zeros may be, at any time: whoever waits for the page then finds them, or it is taken away before
/// that, and they wait for it anew. The lock is held for one page, without any wait but that of
/// the kernel for a page of its own.
#[derive(Debug)]
pub struct MissingPages {
    uffd: OwnedFd,
    map: MemoryMap,
    discarded: Arc<Discarded>,
}

/// What became of a page that was to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It is there.
    Now,
    /// It was there already, and is as it was.
    Before,
    /// It was discarded since memory is watched, and is left as it is.
    Discarded,
}

/// Pages that were discarded since memory is watched, whatever became of them since.
#[derive(Debug, Default)]
struct Discarded(Mutex<PageSet>);

impl Discarded {
    /// Whole at every unlock.
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
    /// Watches all of a guest's memory, which must be anonymous memory that nobody has touched.
    ///
    /// # Errors
    /// It is backed by a file, the host's pages are not of 4 KiB, or the kernel refuses.
    pub fn watch(map: &MemoryMap) -> Result<Self, HostMemoryError> {
        let host = |what| move |errno: Errno| HostMemoryError::Host { what, source: errno.into() };
        if rustix::param::page_size() as u64 != PAGE_BYTES {
            let source = io::Error::from(io::ErrorKind::Unsupported);
            return Err(HostMemoryError::Host { what: "pages of another size", source });
        }
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: what the descriptor can do is done below, on memory of regions only, whose
        // constructors vouched that its contents may change at any time.
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

    /// The guest page that somebody waits for; `None` if nobody does for `wait`.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn next(&self, wait: Duration) -> io::Result<Option<u64>> {
        let time = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.uffd, PollFlags::IN)], Some(&time)) {
            // A signal is nobody's page.
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

    /// Puts contents into a missing page, zeros where there are none, and lets those go on who wait
    /// for it; unless it was discarded. Zeros cost the host nothing until they are written.
    ///
    /// # Errors
    /// There is no such page, or the kernel refuses.
    pub fn place(&self, page: u64, contents: Option<&[u8; 4096]>) -> io::Result<Placed> {
        self.place_after(page, contents, || {})
    }

    /// With `look`, for tests, between looking whether it was discarded and placing it.
    fn place_after(
        &self,
        page: u64,
        contents: Option<&[u8; 4096]>,
        look: impl FnOnce(),
    ) -> io::Result<Placed> {
        let to = self.address(page)?;
        // Over the call: whoever discards waits for it, and takes the page away then.
        let discarded = self.discarded.lock();
        if discarded.contains(page) {
            return Ok(Placed::Discarded);
        }
        look();
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

    /// Puts zeros into a page that somebody waits for, and that was discarded.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zeros(&self, page: u64) -> io::Result<()> {
        self.put_zeros(self.address(page)?).map(drop)
    }

    /// Whether the page was discarded, and what it was to have need not be known.
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
                // Mappings of the process are just being changed.
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
        // SAFETY: every `request` here comes with the structure of its own (the size is a part of
        // the request's number), which lives until the call returns. `UFFDIO_COPY` reads one page
        // at `from`, which `place` borrows meanwhile. What calls write besides the structure is
        // memory of regions that were registered, and a missing page of those only: whoever made
        // an `AnonymousMemory` vouched that no reference points into it and that nobody relies on
        // its contents; `map` keeps it mapped.
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

    /// Memory that can be watched; `None`, and a word about it, where that is not allowed.
    fn watch(map: &MemoryMap) -> Option<MissingPages> {
        match MissingPages::watch(map) {
            Ok(missing) => Some(missing),
            // Not root, and not allowed.
            Err(HostMemoryError::Host { what: "userfaultfd", source }) => {
                eprintln!("SKIPPED: userfaultfd was refused: {source}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    extern "C" fn ignore(_: libc::c_int) {}

    #[test]
    fn a_signal_ends_a_wait_and_is_no_error() {
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
                // SAFETY: the thread is not joined yet, so its name is valid.
                unsafe { libc::pthread_kill(thread, libc::SIGURG) };
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(waiter.join().unwrap().unwrap(), None);
        });
    }

    #[test]
    fn what_was_discarded_is_zeros_and_never_placed() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 12)]).unwrap();
        let map = MemoryMap::of_guest_memory(&memory).unwrap();
        // Whoever releases has a copy, made before.
        let (host, one_by_one) = (map.clone(), map.clone());
        let Some(missing) = watch(&map) else { return };
        let pages = |start, pages| PageSet::from(PageRange::new(start, pages).unwrap());
        missing.place(3, Some(&page(3))).unwrap();
        // One that was there, and more that were not.
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
        // What is written then is the guest's, and goes when it is discarded again.
        memory.write_obj(7u8, GuestAddress(4 << 12)).unwrap();
        assert_eq!(missing.place(4, Some(&page(9))).unwrap(), Placed::Discarded);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4 << 12)).unwrap(), 7);
    }

    /// A discard that comes just when the page is placed: it waits, and takes the page away.
    #[test]
    fn a_page_that_is_placed_while_it_is_discarded_does_not_stay() {
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
                // More than enough for it to end, if it could.
                thread::sleep(Duration::from_millis(100));
            });
            assert_eq!(placed.unwrap(), Placed::Now);
        });
        assert_eq!((over.load(Ordering::SeqCst), resident_bytes(&map).unwrap()), (1, 0));
        assert_eq!(missing.place(5, Some(&page(1))).unwrap(), Placed::Discarded);
    }

    #[test]
    fn who_touches_a_page_gets_what_is_placed() {
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
