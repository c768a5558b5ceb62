//! Releases private anonymous memory: one call for each range, or one for many if
//! the kernel lets a process advise its own memory with a vector.

use std::ptr;
use std::sync::OnceLock;

use rustix::io::{Errno, retry_on_intr};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::{AnonymousMemory, Backing, Piece};

/// Ranges in one call: the kernel's `UIO_MAXIOV`.
const VECTOR_RANGES: usize = 1024;

/// This process, without a descriptor (`include/uapi/linux/pidfd.h`, Linux
/// 6.14). After a fork a real pidfd would refer to the parent; this does not.
const PIDFD_SELF: libc::c_int = -10000;

/// Releases `pieces`, in order; calls `done` for each with its result. Returns the
/// number of system calls. All pieces must be anonymous (others fail with EINVAL).
/// `vectors` is the result of [`vectors_work`].
pub(crate) fn advise(
    pieces: &[Piece<'_>],
    vectors: bool,
    mut done: impl FnMut(&Piece<'_>, Result<(), Errno>),
) -> u64 {
    let mut calls = 0;
    let mut at = 0;
    while let Some(rest) = pieces.get(at..).filter(|rest| !rest.is_empty()) {
        if vectors && rest.len() > 1 {
            let vector = rest.get(..VECTOR_RANGES).unwrap_or(rest);
            calls += 1;
            let whole = advise_vector(vector);
            vector.iter().take(whole).for_each(|piece| done(piece, Ok(())));
            at += whole;
            if whole == vector.len() {
                continue;
            }
        }
        // A single piece, or the one at which a vector stopped: get its errno.
        if let Some(piece) = pieces.get(at) {
            calls += 1;
            done(piece, advise_one(piece));
            at += 1;
        }
    }
    calls
}

fn advise_one(piece: &Piece<'_>) -> Result<(), Errno> {
    let Backing::Anonymous(memory) = piece.region.backing() else { return Err(Errno::INVAL) };
    let range = io_slice(memory, piece)?;
    // SAFETY: `io_slice` returns addresses inside the region of `piece`. The creator
    // of its `AnonymousMemory` guaranteed that this is a mapping of the guest which
    // may read as zeros at any time and into which no reference points.
    let advise = || unsafe { madvise(range.iov_base, range.iov_len, Advice::LinuxDontNeed) };
    // Releasing twice is harmless.
    retry_on_intr(advise)
}

/// Number of pieces, from the first on, that one vectored call released.
fn advise_vector(pieces: &[Piece<'_>]) -> usize {
    let vector: Result<Vec<_>, _> = pieces
        .iter()
        .map(|piece| match piece.region.backing() {
            Backing::Anonymous(memory) => io_slice(memory, piece),
            Backing::Shared { .. } => Err(Errno::INVAL),
        })
        .collect();
    let Ok(vector) = vector else { return 0 };
    // SAFETY: as in `advise_one`, for each element; the vector itself lives
    // until the call returns, and its length is that of the slice.
    let advised = unsafe { process_madvise_self(&vector) };
    let Ok(mut bytes) = advised else { return 0 };
    // A call that stops early returns the bytes it advised: whole ranges.
    let done = |range: &&libc::iovec| {
        let whole = range.iov_len <= bytes;
        bytes = bytes.saturating_sub(range.iov_len);
        whole
    };
    vector.iter().take_while(done).count()
}

/// The part of `memory` that `piece` covers.
fn io_slice(memory: &AnonymousMemory, piece: &Piece<'_>) -> Result<libc::iovec, Errno> {
    debug_assert!(piece.start_bytes() >= memory.host_bytes() as u64);
    let address = usize::try_from(piece.start_bytes()).map_err(|_| Errno::OVERFLOW)?;
    let iov_len = usize::try_from(piece.len_bytes()).map_err(|_| Errno::OVERFLOW)?;
    Ok(libc::iovec { iov_base: ptr::with_exposed_provenance_mut(address), iov_len })
}

/// `process_madvise(2)` on this process with MADV_DONTNEED; returns the bytes
/// advised.
///
/// # Safety
/// Every range must be memory that may read as zeros from now on, as for
/// `madvise`.
unsafe fn process_madvise_self(vector: &[libc::iovec]) -> Result<usize, Errno> {
    // SAFETY: the kernel reads `vector.len()` elements of the slice and no other
    // memory of this process; the caller vouches for the effect on the ranges.
    let result = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            PIDFD_SELF,
            vector.as_ptr(),
            vector.len(),
            libc::MADV_DONTNEED,
            0,
        )
    };
    usize::try_from(result).map_err(|_| {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Errno::from_raw_os_error(errno)
    })
}

/// True if a process may release its own memory with a vector (Linux 6.13 and
/// above, unless a filter forbids it). Tried once, on two real pages.
pub(crate) fn vectors_work() -> bool {
    static WORK: OnceLock<bool> = OnceLock::new();
    *WORK.get_or_init(|| probe().unwrap_or(false))
}

/// Writes to two fresh pages, releases them with a vector of two, and checks that they are zeros.
fn probe() -> Result<bool, Errno> {
    const PAGE: usize = 4096;
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let base = unsafe { mmap_anonymous(ptr::null_mut(), 2 * PAGE, prot, flags)? };
    let second = base.wrapping_byte_add(PAGE);
    // SAFETY: both addresses lie in the fresh mapping, which only this function
    // uses; it is written and read by raw pointers, and unmapped once, after its
    // last use.
    unsafe {
        base.cast::<u8>().write_volatile(1);
        second.cast::<u8>().write_volatile(1);
        let vector = [base, second].map(|iov_base| libc::iovec { iov_base, iov_len: PAGE });
        let advised = process_madvise_self(&vector);
        let emptied =
            base.cast::<u8>().read_volatile() == 0 && second.cast::<u8>().read_volatile() == 0;
        munmap(base, 2 * PAGE)?;
        Ok(advised == Ok(2 * PAGE) && emptied)
    }
}

#[cfg(test)]
mod tests {
    use page_set::{PAGE_BYTES, PageRange};
    use rustix::mm::mlock;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::{MemoryMap, resident::resident_bytes};

    #[test]
    fn the_probe_succeeds_and_its_result_is_cached() {
        let answer = probe().expect("two pages");
        eprintln!(
            "releasing memory with vectors: {}",
            if answer { "works" } else { "not supported" }
        );
        assert_eq!(answer, vectors_work());
    }

    /// Every second page of 6000, one of them locked: with vectors and without,
    /// all except that one are released, and its error is reported.
    #[test]
    fn one_bad_range_does_not_stop_the_others() {
        const PAGES: u64 = 6000;
        const LOCKED: u64 = 2500;
        for vectors in [false, vectors_work()] {
            let len = usize::try_from(PAGES * PAGE_BYTES).unwrap();
            let memory: GuestMemoryMmap =
                GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap();
            let map = MemoryMap::of_guest_memory(&memory).unwrap();
            for page in 0..PAGES {
                memory.write_obj(page + 1, GuestAddress(page * PAGE_BYTES)).unwrap();
            }
            let pieces: Vec<_> =
                (0..PAGES).step_by(2).map(|page| map.find(page).unwrap()).collect();
            let locked = map.find(LOCKED).unwrap().start_bytes();
            // SAFETY: a page of the mapping that `memory` owns; locking it moves
            // and changes nothing.
            unsafe {
                mlock(ptr::with_exposed_provenance_mut(usize::try_from(locked).unwrap()), 4096)
            }
            .expect("one page may be locked");

            let mut failed = Vec::new();
            let calls = advise(&pieces, vectors, |piece, result| {
                if let Err(errno) = result {
                    failed.push((piece.pages, errno));
                }
            });
            assert_eq!(failed, [(PageRange::new(LOCKED, 1).unwrap(), Errno::INVAL)]);
            let expected = if vectors { 3..=6 } else { PAGES / 2..=PAGES / 2 };
            assert!(expected.contains(&calls), "{calls} calls, vectors: {vectors}");
            for page in 0..PAGES {
                let value: u64 = memory.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap();
                let kept = page % 2 == 1 || page == LOCKED;
                assert_eq!(value, if kept { page + 1 } else { 0 }, "page {page}");
            }
            drop(pieces);
            assert!(resident_bytes(&map).unwrap() >= PAGES / 2 * PAGE_BYTES);
        }
    }
}
