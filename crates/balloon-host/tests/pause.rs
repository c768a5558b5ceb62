//! A pause changes neither the balloon nor the host memory behind it.

#![allow(clippy::unwrap_used, reason = "a test fails on any error")]

use std::fs;
use std::sync::Arc;

use balloon_abi::{Features, Pfn, Vq, record};
use balloon_device::{BalloonDevice, MemoryLayout};
use balloon_host::HostReclaim;
use control::api::{PartialHuge, ReleaseMode};
use guest_ring::{Buffer, GuestRing};
use host_memory::{HostPages, Huge, MemoryMap, Region, advise_huge, reserve_file};
use lab::huge_pool::{HUGE_PAGE_BYTES, HugePool};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

const CHUNKS: u64 = 8;
const FEATURES: Features =
    Features::VERSION_1.union(Features::MUST_TELL_HOST).union(Features::PAGE_BITMAP);

/// The driver's vring and buffers, in the first chunk.
const RING: u64 = 0x1000;
const MESSAGE: u64 = 0x4000;
const STATUS: u64 = 0x8000;

struct Guest {
    memory: GuestMemoryMmap,
    balloon: BalloonDevice<HostReclaim>,
}

impl Guest {
    fn new(memory: GuestMemoryMmap, map: MemoryMap) -> Self {
        let mut reclaim = HostReclaim::new(ReleaseMode::Immediate, PartialHuge::Split).unwrap();
        reclaim.set_memory(map);
        let mut balloon = BalloonDevice::new(reclaim);
        balloon.set_layout(MemoryLayout::of(&memory).unwrap());
        balloon.reset(FEATURES);
        Self { memory, balloon }
    }

    /// Sends a message that names two chunks.
    fn send(&mut self, vq: Vq, chunk: u64) {
        let mut message = vec![0; 16];
        record::encode(&mut message, Pfn(chunk * 512), 21, &[0b11]).unwrap().unwrap();
        self.memory.write_slice(&message, GuestAddress(MESSAGE)).unwrap();
        let len = u32::try_from(message.len()).unwrap();
        let mut ring = GuestRing::new(RING, 16);
        ring.reset(&self.memory);
        ring.send(&self.memory, &[Buffer::readable(MESSAGE, len), Buffer::writable(STATUS, 4)]);
        self.balloon.process_queue(vq, &self.memory, &mut ring.queue()).unwrap();
        assert_eq!(self.balloon.faults().total(), 0);
    }

    /// Inflates two chunks that it has written: only present memory returns to a pool.
    fn inflate_used(&mut self, chunk: u64) {
        for chunk in [chunk, chunk + 1] {
            self.memory.write_obj(1u64, GuestAddress(chunk * HUGE_PAGE_BYTES)).unwrap();
        }
        self.send(Vq::Inflate, chunk);
    }

    /// Returns the KiB of guest memory that may not have huge pages.
    fn small_kib(&self) -> u64 {
        let region = self.memory.iter().next().unwrap();
        let start = region.as_ptr() as u64;
        let end = start + region.len();
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let mut mapping = 0..0;
        let mut sum = 0;
        for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            let bounds = line.split(' ').next().and_then(|bounds| bounds.split_once('-'));
            if let Some((Some(from), Some(to))) = bounds.map(|(a, b)| (number(a), number(b))) {
                mapping = from.max(start)..to.min(end);
            } else if line.starts_with("VmFlags:") && line.contains(" nh") {
                sum += mapping.end.saturating_sub(mapping.start) >> 10;
            }
        }
        sum
    }
}

/// For example SIGUSR1, a VM snapshot, or a migration that fails.
#[test]
fn a_pause_allows_no_huge_pages_in_the_balloon() {
    let bytes = usize::try_from(CHUNKS * HUGE_PAGE_BYTES).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
    let region = memory.iter().next().unwrap();
    if advise_huge(region, Huge::May).is_err() {
        eprintln!("SKIPPED: this kernel has no transparent huge pages");
        return;
    }
    let region = Region::of_mapping(region).unwrap().with_host_pages(HostPages::Transparent);
    let map = MemoryMap::new(vec![region]).unwrap();
    let mut guest = Guest::new(memory, map);
    assert_eq!(guest.small_kib(), 0);
    guest.inflate_used(2);
    let small = guest.small_kib();
    assert!(small >= (2 * HUGE_PAGE_BYTES) >> 10, "{small}");

    guest.balloon.suspend();
    assert_eq!(guest.small_kib(), small, "a pause allowed huge pages in the balloon");
    // The guest resumes and deflates.
    guest.send(Vq::Deflate, 2);
    assert_eq!(guest.small_kib(), 0);
    // After a reset the balloon is empty.
    guest.inflate_used(2);
    guest.balloon.suspend();
    guest.balloon.reset(FEATURES);
    assert_eq!(guest.small_kib(), 0);
}

#[test]
fn a_pause_reserves_no_pool_pages_for_the_balloon() {
    let pool = match HugePool::new(CHUNKS) {
        Ok(pool) => pool,
        Err(error) => {
            eprintln!("SKIPPED: {error:?}");
            return;
        }
    };
    let file = Arc::new(pool.file("guest", CHUNKS).unwrap());
    let bytes = CHUNKS * HUGE_PAGE_BYTES;
    reserve_file(&file, bytes).unwrap();
    let range =
        (GuestAddress(0), usize::try_from(bytes).unwrap(), Some(FileOffset::from_arc(file, 0)));
    let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    let map = MemoryMap::of_guest_memory(&memory).unwrap();
    let mut guest = Guest::new(memory, map);
    assert_eq!(pool.reserved().unwrap(), CHUNKS);
    guest.inflate_used(2);
    assert_eq!(pool.reserved().unwrap(), CHUNKS - 2);

    guest.balloon.suspend();
    assert_eq!(pool.reserved().unwrap(), CHUNKS - 2, "a pause took the pool's pages back");
    guest.send(Vq::Deflate, 2);
    assert_eq!(pool.reserved().unwrap(), CHUNKS);
    // After a reset the guest may use all pages.
    guest.inflate_used(2);
    guest.balloon.suspend();
    guest.balloon.reset(FEATURES);
    assert_eq!(pool.reserved().unwrap(), CHUNKS);
}
