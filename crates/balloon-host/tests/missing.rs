//! A guest whose memory is still coming (userfaultfd) gives pages by either protocol, or reports
//! them: what they were to have never comes any more.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

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

/// The driver's own: a ring, a message, and the answer to it.
const RING: u64 = 0x1000;
const MESSAGE: u64 = 0x4000;
const STATUS: u64 = 0x8000;
const OWN_PAGES: u64 = 16;

/// What is given; a half of it is there already.
const GIVEN: std::ops::Range<u64> = 0x200..0x400;
const THERE: std::ops::Range<u64> = 0x100..0x300;

const CLASSIC: Features = Features::VERSION_1;
const TELLS: Features = CLASSIC.union(Features::MUST_TELL_HOST);
const BITMAP: Features = TELLS.union(Features::PAGE_BITMAP);

struct Guest {
    memory: GuestMemoryMmap,
    map: MemoryMap,
    missing: MissingPages,
    balloon: BalloonDevice<HostReclaim>,
}

impl Guest {
    /// `None` where this user may not.
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
        for page in (0..OWN_PAGES).chain(THERE) {
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

    fn settle(&self) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.balloon.reclaim().reached_at().is_none() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The rest of the memory comes, as a filling thread has it come.
    fn fill(&self) {
        for page in 0..PAGES {
            let placed = self.missing.place(page, Some(&[8; 4096])).unwrap();
            let there = page < OWN_PAGES || THERE.contains(&page);
            let expected = match (GIVEN.contains(&page), there) {
                (true, _) => Placed::Discarded,
                (false, true) => Placed::Before,
                (false, false) => Placed::Now,
            };
            assert_eq!(placed, expected, "page {page:#x}");
        }
        let resident = resident::resident_bytes(&self.map).unwrap() / PAGE;
        assert_eq!(resident, PAGES - (GIVEN.end - GIVEN.start));
    }
}

/// A message that names the given pages.
fn message(features: Features) -> Vec<u8> {
    if features.contains(Features::PAGE_BITMAP) {
        let mut bytes = vec![0; 8];
        record::encode(&mut bytes, Pfn(GIVEN.start), 21, &[]).unwrap().unwrap();
        return bytes;
    }
    GIVEN.flat_map(|page| u32::try_from(page).unwrap().to_le_bytes()).collect()
}

#[test]
fn what_is_given_by_either_protocol_never_comes() {
    for features in [CLASSIC, TELLS, BITMAP] {
        for mode in [ReleaseMode::Background, ReleaseMode::Immediate, ReleaseMode::PerPage] {
            let Some(mut guest) = Guest::new(features, mode) else { return };
            guest.send_message(Vq::Inflate, &message(features));
            guest.settle();
            guest.fill();
            // And back: the guest finds zeros there, which nobody has placed yet.
            guest.send_message(Vq::Deflate, &message(features));
            guest.missing.place_zeros(GIVEN.start).unwrap();
            let word: u64 = guest.memory.read_obj(GuestAddress(GIVEN.start * PAGE)).unwrap();
            assert_eq!(word, 0);
        }
    }
}

#[test]
fn what_is_reported_never_comes() {
    let features = CLASSIC | Features::REPORTING;
    let Some(mut guest) = Guest::new(features, ReleaseMode::Background) else { return };
    let bytes = u32::try_from((GIVEN.end - GIVEN.start) * PAGE).unwrap();
    guest.send(Vq::Reporting, &[Buffer::writable(GIVEN.start * PAGE, bytes)]);
    guest.fill();
}

/// A guest that was snapshotted with a balloon: its pages are released as soon as its state is there.
#[test]
fn what_is_in_the_balloon_already_never_comes() {
    let Some(mut guest) = Guest::new(TELLS, ReleaseMode::Background) else { return };
    let mut state = guest.balloon.state();
    state.held = GIVEN.map(|page| page_set::PageRange::new(page, 1).unwrap()).collect::<PageSet>();
    guest.balloon.restore(state, Instant::now()).unwrap();
    guest.settle();
    guest.fill();
}
