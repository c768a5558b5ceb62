//! How the device's cost scales: page-bitmap messages that inflate three quarters
//! of a guest of 64 GiB, 1 TiB and 16 TiB, through the queue, the decoder and the
//! set of held pages, to a [`Reclaim`] that only counts.
//!
//! Nothing is sampled or skipped: the pass over 16 TiB at 4 KiB granules decodes
//! all of its 50 million bitmap words. Only the vring and one message exist in
//! memory; the rest of the guest is only an address range in the layout.
//!
//! Prints a table of one pass each, with memory use, and then criterion's results. Takes
//! half a minute.
#![allow(missing_docs, reason = "criterion's macros make items without")]

use std::time::{Duration, Instant};

use balloon_abi::limits::{MAX_RECORD_BLOCKS, MAX_RECORD_WORDS};
use balloon_abi::record::{self, WORD_BYTES};
use balloon_abi::{Features, Pfn, Vq};
use balloon_device::{BalloonDevice, MemoryLayout, Reclaim};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group};
use guest_ring::{Buffer, GuestRing};
use page_set::PageSet;
use peak_alloc::PeakAlloc;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

const GIB: u64 = 1 << 30;
const SIZES_GIB: [u64; 3] = [64, 1024, 16 * 1024];
const RECORD_BYTES: usize = (1 + MAX_RECORD_WORDS) * WORD_BYTES;
const RECORDS_PER_MESSAGE: usize = 128;
const RING: u64 = 0x1000;
const MESSAGE: u64 = 0x10000;

/// The pages of each record that are inflated.
#[derive(Clone, Copy)]
struct Pattern {
    name: &'static str,
    granule_shift: u32,
    word: u64,
}

/// Whole memory, and the worst case for a set: no block next to another.
const PATTERNS: [Pattern; 4] = [
    Pattern { name: "4KiB_every_page", granule_shift: 12, word: u64::MAX },
    Pattern { name: "4KiB_every_second_page", granule_shift: 12, word: 0x5555_5555_5555_5555 },
    Pattern { name: "2MiB_every_block", granule_shift: 21, word: u64::MAX },
    Pattern { name: "2MiB_every_second_block", granule_shift: 21, word: 0x5555_5555_5555_5555 },
];

impl Pattern {
    /// Balloon pages that a record spans.
    const fn record_pages(self) -> u64 {
        MAX_RECORD_BLOCKS << (self.granule_shift - 12)
    }

    /// Whole records in three quarters of a guest.
    const fn records(self, gib: u64) -> u64 {
        gib * GIB / 4096 / 4 * 3 / self.record_pages()
    }
}

#[derive(Default)]
struct Count {
    pages: u64,
    calls: u64,
}

impl Reclaim for Count {
    fn release(&mut self, pages: &PageSet) {
        self.pages += pages.len();
        self.calls += 1;
    }

    fn release_now(&mut self, pages: &PageSet) {
        self.release(pages);
    }

    fn release_free(&mut self, pages: &PageSet) {
        self.release(pages);
    }

    fn cancel(&mut self, _pages: &PageSet) {}
    fn retain(&mut self, _pages: &PageSet) {}

    fn flush(&mut self) {}
}

struct Guest {
    memory: GuestMemoryMmap,
    balloon: BalloonDevice<Count>,
    ring: GuestRing,
    queue: Queue,
}

impl Guest {
    fn new(gib: u64) -> Self {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]);
        let mut balloon = BalloonDevice::new(Count::default());
        balloon.set_layout(MemoryLayout::new([(0, gib * GIB)]).expect("page-aligned"));
        balloon.reset(Features::VERSION_1 | Features::MUST_TELL_HOST | Features::PAGE_BITMAP);
        let ring = GuestRing::new(RING, 16);
        let queue = ring.queue();
        Self { memory: memory.expect("1 MiB"), balloon, ring, queue }
    }

    /// Inflates three quarters of the guest. Returns the time spent in the device.
    fn inflate(&mut self, gib: u64, pattern: Pattern) -> Duration {
        let bitmap = [pattern.word; MAX_RECORD_WORDS];
        let mut message = vec![0; RECORDS_PER_MESSAGE * RECORD_BYTES];
        let mut device = Duration::ZERO;
        let records = pattern.records(gib);
        let mut next = 0;
        while next < records {
            let mut len = 0;
            for bytes in message.chunks_exact_mut(RECORD_BYTES) {
                if next == records {
                    break;
                }
                let start = Pfn(next * pattern.record_pages());
                let encoded = record::encode(bytes, start, pattern.granule_shift, &bitmap);
                assert_eq!(encoded, Ok(Some(RECORD_BYTES)));
                len += RECORD_BYTES;
                next += 1;
            }
            self.memory
                .write_slice(&message[..len], GuestAddress(MESSAGE))
                .expect("inside of guest memory");
            let len = u32::try_from(len).expect("64 KiB");
            self.ring.send(&self.memory, &[Buffer::readable(MESSAGE, len)]);
            let started = Instant::now();
            let drained = self.balloon.process_queue(Vq::Inflate, &self.memory, &mut self.queue);
            device += started.elapsed();
            assert_eq!(drained.expect("a valid vring").chains, 1);
        }
        let ones = u64::from(pattern.word.count_ones()) * MAX_RECORD_WORDS as u64;
        let pages = (records * ones) << (pattern.granule_shift - 12);
        assert_eq!(self.balloon.held().len(), pages);
        assert_eq!(self.balloon.reclaim().pages, pages);
        device
    }
}

/// Prints one pass of each case: time per record, and memory use.
fn table() {
    println!(
        "{:<24} {:>7} {:>8} {:>9} {:>10} {:>10} {:>12} {:>12}",
        "", "GiB", "messages", "records", "total ms", "ns/record", "held bytes", "peak bytes"
    );
    for pattern in PATTERNS {
        for gib in SIZES_GIB {
            let mut guest = Guest::new(gib);
            let before = ALLOCATED.current_usage();
            ALLOCATED.reset_peak_usage();
            let device = guest.inflate(gib, pattern);
            let held = ALLOCATED.current_usage().saturating_sub(before);
            let peak = ALLOCATED.peak_usage().saturating_sub(before);
            let records = pattern.records(gib);
            println!(
                "{:<24} {gib:>7} {:>8} {records:>9} {:>10.3} {:>10.0} {held:>12} {peak:>12}",
                pattern.name,
                guest.balloon.reclaim().calls,
                device.as_secs_f64() * 1e3,
                device.as_secs_f64() * 1e9 / records as f64,
            );
            assert!(peak as u64 <= memory_bound(gib), "{peak} bytes for {gib} GiB");
        }
    }
}

/// One bit for each page of the guest and some bytes for each GiB, as in
/// `docs/protocol.md`, plus a message and the set decoded from it.
const fn memory_bound(gib: u64) -> u64 {
    gib * (GIB / 4096 / 8 + 400) + (1 << 19)
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("inflate_three_quarters");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));
    for pattern in PATTERNS {
        for gib in SIZES_GIB {
            group.throughput(Throughput::Elements(pattern.records(gib)));
            let id = BenchmarkId::new(pattern.name, format!("{gib}GiB"));
            group.bench_with_input(id, &gib, |b, &gib| {
                b.iter_custom(|passes| {
                    (0..passes).map(|_| Guest::new(gib).inflate(gib, pattern)).sum()
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, decode);

fn main() {
    // Without `--bench` criterion only checks that everything runs.
    if std::env::args().any(|arg| arg == "--bench") {
        table();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
