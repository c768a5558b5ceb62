//! During a lazy restore (userfaultfd) a guest inflates or reports pages that are still missing:
//! their saved content is never placed.

#![allow(clippy::unwrap_used, reason = "a test fails on any error")]

use std::time::{Duration, Instant};

use balloon_abi::{Features, Pfn, Vq, record};
use balloon_device::{BalloonDevice, MemoryLayout};
use balloon_host::HostReclaim;
use control::api::{PartialHuge, ReleaseMode};
use guest_ring::{Buffer, GuestRing};
use host_memory::{HostMemoryError, MemoryMap, MissingPages, Placed, resident};
use page_set::PageSet;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 4096;
const PAGES: u64 = 0x1000;

/// The driver's pages: a vring, a message, and its status.
const RING: u64 = 0x1000;
const MESSAGE: u64 = 0x4000;
const STATUS: u64 = 0x8000;
const OWN_PAGES: u64 = 16;

/// Pages that the guest inflates or reports; half of them are present.
const RELEASED: std::ops::Range<u64> = 0x200..0x400;
const PRESENT: std::ops::Range<u64> = 0x100..0x300;

const CLASSIC: Features = Features::VERSION_1;
const TELL_HOST: Features = CLASSIC.union(Features::MUST_TELL_HOST);
const BITMAP: Features = TELL_HOST.union(Features::PAGE_BITMAP);

struct Guest {
    memory: GuestMemoryMmap,
    map: MemoryMap,
    missing: MissingPages,
    balloon: BalloonDevice<HostReclaim>,
}

impl Guest {
    /// Returns `None` if this user may not use userfaultfd.
    fn new(negotiated: Features, mode: ReleaseMode) -> Option<Self> {
        let bytes = usize::try_from(PAGES * PAGE).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        let map = MemoryMap::of_guest_memory(&memory).unwrap();
        let mut reclaim = HostReclaim::new(mode, PartialHuge::Split).unwrap();
        reclaim.set_memory(map.clone());
        let missing = match MissingPages::watch(&map) {
            Ok(missing) => missing,
            Err(HostMemoryError::Host { what: "userfaultfd", source }) => {
                eprintln!("SKIPPED: userfaultfd was refused: {source}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        for page in (0..OWN_PAGES).chain(PRESENT) {
            missing.place(page, Some(&[7; 4096])).unwrap();
        }
        let mut balloon = BalloonDevice::new(reclaim);
        balloon.set_layout(MemoryLayout::of(&memory).unwrap());
        balloon.reset(negotiated);
        Some(Self { memory, map, missing, balloon })
    }

    fn send(&mut self, vq: Vq, buffers: &[Buffer]) {
        let mut ring = GuestRing::new(RING, 16);
        ring.reset(&self.memory);
        ring.send(&self.memory, buffers);
        let drained = self.balloon.process_queue(vq, &self.memory, &mut ring.queue()).unwrap();
        assert_eq!(drained.chains, 1);
        assert_eq!(self.balloon.faults().total(), 0);
    }

    fn send_message(&mut self, vq: Vq, message: &[u8]) {
        self.memory.write_slice(message, GuestAddress(MESSAGE)).unwrap();
        let len = u32::try_from(message.len()).unwrap();
        self.send(vq, &[Buffer::readable(MESSAGE, len), Buffer::writable(STATUS, 4)]);
    }

    fn wait_until_released(&self) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.balloon.reclaim().reached_at().is_none() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Places the rest of the memory, like a restore thread.
    fn fill(&self) {
        for page in 0..PAGES {
            let placed = self.missing.place(page, Some(&[8; 4096])).unwrap();
            let present = page < OWN_PAGES || PRESENT.contains(&page);
            let expected = match (RELEASED.contains(&page), present) {
                (true, _) => Placed::Discarded,
                (false, true) => Placed::Before,
                (false, false) => Placed::Now,
            };
            assert_eq!(placed, expected, "page {page:#x}");
        }
        let resident = resident::resident_bytes(&self.map).unwrap() / PAGE;
        assert_eq!(resident, PAGES - (RELEASED.end - RELEASED.start));
    }
}

/// Returns a message that names the released pages.
fn message(features: Features) -> Vec<u8> {
    if features.contains(Features::PAGE_BITMAP) {
        let mut bytes = vec![0; 8];
        record::encode(&mut bytes, Pfn(RELEASED.start), 21, &[]).unwrap().unwrap();
        return bytes;
    }
    RELEASED.flat_map(|page| u32::try_from(page).unwrap().to_le_bytes()).collect()
}

#[test]
fn inflated_pages_are_never_placed() {
    for features in [CLASSIC, TELL_HOST, BITMAP] {
        for mode in [ReleaseMode::Background, ReleaseMode::Immediate, ReleaseMode::PerPage] {
            let Some(mut guest) = Guest::new(features, mode) else { return };
            guest.send_message(Vq::Inflate, &message(features));
            guest.wait_until_released();
            guest.fill();
            // Deflate: the guest reads zeros, which the test must place first.
            guest.send_message(Vq::Deflate, &message(features));
            guest.missing.place_zeros(RELEASED.start).unwrap();
            let word: u64 = guest.memory.read_obj(GuestAddress(RELEASED.start * PAGE)).unwrap();
            assert_eq!(word, 0);
        }
    }
}

#[test]
fn reported_pages_are_never_placed() {
    let features = CLASSIC | Features::REPORTING;
    let Some(mut guest) = Guest::new(features, ReleaseMode::Background) else { return };
    let bytes = u32::try_from((RELEASED.end - RELEASED.start) * PAGE).unwrap();
    guest.send(Vq::Reporting, &[Buffer::writable(RELEASED.start * PAGE, bytes)]);
    guest.fill();
}

/// A VM snapshot of a guest with an inflated balloon: restoring the device state releases its
/// pages.
#[test]
fn pages_in_a_restored_balloon_are_never_placed() {
    let Some(mut guest) = Guest::new(TELL_HOST, ReleaseMode::Background) else { return };
    let mut state = guest.balloon.state();
    state.held =
        RELEASED.map(|page| page_set::PageRange::new(page, 1).unwrap()).collect::<PageSet>();
    guest.balloon.restore(state, Instant::now()).unwrap();
    guest.wait_until_released();
    guest.fill();
}
