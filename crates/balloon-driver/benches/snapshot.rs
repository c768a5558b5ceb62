//! How the cost of a free-page report scales: scans of guests of 4 GiB, 64 GiB and
//! 1 TiB with a computed kernel, so that the time is that of the driver:
//! slices, records and answers. A real kernel adds an access to each page
//! that a slice visits.
#![allow(missing_docs, reason = "criterion's macros make items without")]

use std::time::{Duration, Instant};

use balloon_abi::{Caches, Command, Pfn};
use balloon_driver::{
    CachePages, Errno, Geometry, HeldBlocks, Hold, ReceivedRequest, RequestHandler, RequestKernel,
    RequestQueue, Slice, Stop, Zone,
};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group};

const GIB_PAGES: u64 = 1 << 18;
const SIZES_GIB: [u64; 3] = [4, 64, 1024];
const MAX_ORDER: u32 = 10;
const ANSWER_BYTES: usize = 4096;

/// Which pages are free.
#[derive(Clone, Copy)]
enum Pattern {
    /// All pages, in the largest blocks.
    Idle,
    /// All but one page in the middle of every 4 MiB.
    Holes,
    /// Every second page.
    EverySecond,
}

impl Pattern {
    const ALL: [(&str, Self); 3] =
        [("idle", Self::Idle), ("holes", Self::Holes), ("every_second_page", Self::EverySecond)];

    /// Returns the order of the free block that starts at `page`.
    fn order_at(self, page: u64) -> Option<u32> {
        let in_block = page % (1 << MAX_ORDER);
        match self {
            Self::Idle => (in_block == 0).then_some(MAX_ORDER),
            Self::Holes if in_block < 1 << (MAX_ORDER - 1) => {
                (in_block == 0).then_some(MAX_ORDER - 1)
            }
            // The page in use is the first one of the second half.
            Self::Holes => {
                let upper = in_block - (1 << (MAX_ORDER - 1));
                upper.is_power_of_two().then(|| upper.trailing_zeros())
            }
            Self::EverySecond => (page % 2 == 1).then_some(0),
        }
    }
}

struct Kernel {
    pages: u64,
    pattern: Pattern,
    visits: u64,
}

struct NoBlocks;

impl HeldBlocks for NoBlocks {
    fn take(&mut self, _: u32) -> bool {
        false
    }
    fn name(&mut self, _: u32) -> Option<Pfn> {
        None
    }
    fn free_all(&mut self) {}
}

impl RequestKernel for Kernel {
    type Blocks = NoBlocks;

    fn cache_pages(&mut self) -> CachePages {
        CachePages::default()
    }
    fn drop_caches(&mut self, _: Caches) -> Result<(), Errno> {
        Ok(())
    }
    fn free_pages(&mut self) -> u64 {
        self.pages
    }
    fn total_pages(&mut self) -> u64 {
        self.pages
    }
    fn reserved_pages(&mut self) -> u64 {
        0
    }
    fn zone(&mut self, number: u32) -> Option<Zone> {
        (number == 0).then_some(Zone { start: Pfn(0), end: Pfn(self.pages) })
    }
    fn has_free(&mut self, order: u32) -> bool {
        (0..1 << MAX_ORDER).any(|page| self.pattern.order_at(page) == Some(order))
    }
    fn scan(&mut self, _: u32, from: Pfn, order: u32, visits: u32, found: &mut [Pfn]) -> Slice {
        let mut page = from.0.next_multiple_of(1 << order);
        let mut count = 0;
        for _ in 0..visits {
            if page >= self.pages || count == found.len() {
                break;
            }
            self.visits += 1;
            let free = self.pattern.order_at(page);
            if free == Some(order) {
                found[count] = Pfn(page);
                count += 1;
            }
            page += 1 << free.unwrap_or(order).max(order);
        }
        Slice { next: Pfn(page), found: count, lock_ns: 1000 }
    }
    fn with_hold<R>(&mut self, act: impl FnOnce(&mut Hold, &mut NoBlocks) -> R) -> R {
        act(&mut Hold::new(), &mut NoBlocks)
    }
}

struct Queue {
    request: Option<ReceivedRequest>,
    buffer: [u8; ANSWER_BYTES],
    answers: u64,
    bytes: u64,
}

impl RequestQueue for Queue {
    fn begin_next(&mut self) -> Option<ReceivedRequest> {
        self.request.take()
    }
    fn stopped(&mut self) -> Result<(), Stop> {
        Ok(())
    }
    fn buffer(&mut self, _: bool) -> Result<&mut [u8], Stop> {
        Ok(&mut self.buffer)
    }
    fn post(&mut self, _: u32, len: usize) -> Result<(), Stop> {
        self.answers += 1;
        self.bytes += len as u64;
        Ok(())
    }
    fn finish(&mut self) -> Result<(), Stop> {
        Ok(())
    }
    fn now_ns(&mut self) -> u64 {
        0
    }
}

/// Runs one report. Returns visited pages, answers, and bytes of the answers.
fn snapshot(gib: u64, pattern: Pattern) -> (u64, u64, u64) {
    let command = Ok(Command::ReportFree { min_granule_shift: 12 });
    let mut kernel = Kernel { pages: gib * GIB_PAGES, pattern, visits: 0 };
    let request = Some(ReceivedRequest { id: 1, command });
    let mut queue = Queue { request, buffer: [0; ANSWER_BYTES], answers: 0, bytes: 0 };
    let mut requests = RequestHandler::new(Geometry { page_shift: 12, max_order: MAX_ORDER });
    assert_eq!(requests.run(&mut kernel, &mut queue), 1);
    (kernel.visits, queue.answers, queue.bytes)
}

fn table() {
    println!(
        "{:<18} {:>9} {:>12} {:>9} {:>12} {:>9}",
        "", "GiB", "visits", "answers", "bytes", "ms"
    );
    for (name, pattern) in Pattern::ALL {
        for gib in SIZES_GIB {
            let began = Instant::now();
            let (visits, answers, bytes) = snapshot(gib, pattern);
            let ms = began.elapsed().as_secs_f64() * 1000.0;
            println!("{name:<18} {gib:>9} {visits:>12} {answers:>9} {bytes:>12} {ms:>9.1}");
            // Linear, even if the times are noisy.
            assert!(visits <= 2 * gib * GIB_PAGES + 11, "{visits}");
        }
    }
}

fn walk(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("snapshot");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(2));
    for (name, pattern) in Pattern::ALL {
        for gib in &SIZES_GIB[..2] {
            group.throughput(Throughput::Elements(gib * GIB_PAGES));
            group.bench_with_input(BenchmarkId::new(name, gib), gib, |bencher, gib| {
                bencher.iter(|| snapshot(*gib, pattern));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, walk);

fn main() {
    // Without `--bench` criterion only checks that everything runs.
    if std::env::args().any(|arg| arg == "--bench") {
        table();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
