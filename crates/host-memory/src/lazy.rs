//! Memory whose pages come when somebody touches them (`userfaultfd`).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use page_set::{PAGE_BYTES, PageRange};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::{Backing, HostMemoryError, MemoryMap};

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
/// Pages that are discarded later are missing anew.
#[derive(Debug)]
pub struct MissingPages {
    uffd: OwnedFd,
    map: MemoryMap,
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
        let missing = Self { uffd, map: map.clone() };
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

    /// Puts contents into a missing page, and lets those go on who wait for it; false where it
    /// was there already, and is as it was.
    ///
    /// # Errors
    /// There is no such page, or the kernel refuses.
    pub fn place(&self, page: u64, contents: &[u8; 4096]) -> io::Result<bool> {
        let to = self.address(page)?;
        let from = contents.as_ptr() as u64;
        self.put(to, || {
            let mut copy = Copy { to, from, len: PAGE_BYTES, ..Copy::default() };
            self.call(UFFDIO_COPY, &mut copy)
        })
    }

    /// The same with zeros, which cost the host nothing until they are written.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zeros(&self, page: u64) -> io::Result<bool> {
        let start = self.address(page)?;
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

    fn page(value: u8) -> [u8; 4096] {
        [value; 4096]
    }

    /// Memory that can be watched; `None`, and a word about it, where that is not allowed.
    fn watched(memory: &GuestMemoryMmap<()>) -> Option<MissingPages> {
        match MissingPages::watch(&MemoryMap::of_guest_memory(memory).unwrap()) {
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
        let Some(missing) = watched(&memory) else { return };
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
    fn who_touches_a_page_gets_what_is_placed() {
        let ranges = [(GuestAddress(0x10_0000), 16 << 12), (GuestAddress(0x40_0000), 16 << 12)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let Some(missing) = watched(&memory) else { return };
        assert_eq!(missing.next(Duration::ZERO).unwrap(), None);
        assert!(missing.place(0x405, &page(9)).unwrap());
        assert!(!missing.place(0x405, &page(8)).unwrap());
        assert!(missing.place(0x50, &page(8)).is_err());
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
                    missing.place_zeros(at).unwrap();
                } else {
                    missing.place(at, &page(at.to_le_bytes()[0])).unwrap();
                }
            }
            assert_eq!(reader.join().unwrap(), [2, 9, 0xf, 0]);
        });
        assert_eq!(served.load(Ordering::Relaxed), 3);
    }
}
