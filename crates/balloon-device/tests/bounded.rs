//! Memory that a message can make the device allocate. Runs in its own process.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails on any error")]

use balloon_abi::limits::MAX_MESSAGE_BYTES;
use balloon_abi::{Features, Vq};
use balloon_device::{BalloonDevice, MemoryLayout, Reclaim};
use guest_ring::{Buffer, GuestRing};
use page_set::PageSet;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Memory that the test process may allocate for other reasons.
const SLACK_KIB: u64 = 16 << 10;

struct Nothing;

impl Reclaim for Nothing {
    fn release(&mut self, _: &PageSet) {}
    fn release_now(&mut self, _: &PageSet) {}
    fn release_free(&mut self, _: &PageSet) {}
    fn cancel(&mut self, _: &PageSet) {}
    fn retain(&mut self, _: &PageSet) {}
    fn flush(&mut self) {}
}

/// Returns the peak resident memory of this process, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Guest memory lies at both ends of a petabyte, and the guest names 512 MiB blocks in
/// between: a quarter of a million, in a message of the usual size.
#[test]
fn blocks_in_a_gap_are_refused_without_allocation() {
    const BYTES: u64 = 4 << 20;
    const WORDS: u64 = 63;
    const RECORD_BYTES: usize = 8 + 8 * 63;
    // A complete GiB would take less memory.
    const EVERY_OTHER: u64 = 0x5555_5555_5555_5555;
    const BLOCK_SHIFT: u64 = 29;
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), usize::try_from(BYTES).unwrap())])
            .unwrap();
    let mut device = BalloonDevice::new(Nothing);
    device.set_layout(MemoryLayout::new([(0, BYTES), (1 << 50, BYTES)]).unwrap());
    device.reset(Features::VERSION_1 | Features::PAGE_BITMAP | Features::MUST_TELL_HOST);
    let block_pages = 1u64 << (BLOCK_SHIFT - 12);
    let mut message = Vec::new();
    let mut start = block_pages;
    while message.len() + RECORD_BYTES <= MAX_MESSAGE_BYTES {
        let header = start | BLOCK_SHIFT << 52 | WORDS << 58;
        message.extend(header.to_le_bytes());
        (0..WORDS).for_each(|_| message.extend(EVERY_OTHER.to_le_bytes()));
        start += 64 * WORDS * block_pages;
    }
    assert!(start < (1 << 50) / 4096, "all blocks are in the gap");
    memory.write_slice(&message, GuestAddress(0x10_0000)).unwrap();
    let mut ring = GuestRing::new(0x1000, 16);
    let mut queue = ring.queue();
    let len = u32::try_from(message.len()).unwrap();
    ring.send(&memory, &[Buffer::readable(0x10_0000, len), Buffer::writable(0x8000, 4)]);

    let before = peak_kib();
    device.process_queue(Vq::Inflate, &memory, &mut queue).unwrap();
    let grown = peak_kib() - before;
    assert!(ring.take_used(&memory).is_some());
    assert_eq!(device.faults().total(), 1);
    assert!(device.held().is_empty());
    assert!(grown < SLACK_KIB, "one message allocated {grown} KiB");
}
