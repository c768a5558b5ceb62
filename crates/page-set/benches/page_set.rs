//! Scaling of page sets: bitmaps in wire format, for guests of 64 GiB, 1 TiB and 16 TiB, at
//! granules of 4 KiB and 2 MiB.
#![allow(missing_docs, reason = "criterion's macros generate undocumented items")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use page_set::{CHUNK_PAGES, PAGE_BYTES, PageRange, PageSet};

const GIB: u64 = 1 << 30;
const SIZES_GIB: [u64; 3] = [64, 1024, 16 * 1024];
const EVERY: u64 = u64::MAX;
const EVERY_SECOND: u64 = 0x5555_5555_5555_5555;

fn words(gib: u64, granule_pages: u64) -> usize {
    usize::try_from(gib * GIB / PAGE_BYTES / granule_pages / 64).expect("fits")
}

fn filled(gib: u64, granule_pages: u64, word: u64) -> PageSet {
    let mut set = PageSet::new();
    let words = std::iter::repeat_n(black_box(word), words(gib, granule_pages));
    set.insert_bitmap(0, granule_pages, words).expect("below 2^52");
    set
}

fn insert_bitmap(c: &mut Criterion) {
    let mut group = c.benchmark_group("insert_bitmap");
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    for (name, granule_pages, word, up_to_gib) in [
        ("4KiB_every_page", 1, EVERY, u64::MAX),
        ("4KiB_every_second_page", 1, EVERY_SECOND, 1024),
        ("2MiB_every_block", CHUNK_PAGES, EVERY, u64::MAX),
        ("2MiB_every_second_block", CHUNK_PAGES, EVERY_SECOND, u64::MAX),
        ("4MiB_every_block", 2 * CHUNK_PAGES, EVERY, u64::MAX),
    ] {
        for gib in SIZES_GIB.into_iter().filter(|&gib| gib <= up_to_gib) {
            group.throughput(Throughput::Elements(words(gib, granule_pages) as u64));
            group.bench_with_input(BenchmarkId::new(name, format!("{gib}GiB")), &gib, |b, &gib| {
                b.iter(|| filled(gib, granule_pages, word));
            });
        }
    }
    group.finish();
}

fn iterate(c: &mut Criterion) {
    let mut group = c.benchmark_group("ranges");
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    for (name, granule_pages, word, gib) in [
        ("4KiB_every_second_page", 1, EVERY_SECOND, 64),
        ("2MiB_every_second_block", CHUNK_PAGES, EVERY_SECOND, 16 * 1024),
        ("full", CHUNK_PAGES, EVERY, 16 * 1024),
    ] {
        let set = filled(gib, granule_pages, word);
        group.throughput(Throughput::Elements(set.ranges().count() as u64));
        group.bench_function(BenchmarkId::new(name, format!("{gib}GiB")), |b| {
            b.iter(|| set.ranges().map(PageRange::pages).sum::<u64>());
        });
    }
    group.finish();
}

/// A stock driver's requests: 256 pages each, from high addresses to low.
fn small_requests(c: &mut Criterion) {
    let mut group = c.benchmark_group("requests_of_256_pages");
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    for (name, stride) in [("dense", 1), ("every_second_page", 2)] {
        group.throughput(Throughput::Elements(3072));
        group.bench_function(BenchmarkId::new(name, "3GiB"), |b| {
            b.iter(|| {
                let mut pending = PageSet::new();
                for request in (0..3072).rev() {
                    let mut pages = PageSet::new();
                    let numbers = (0..256).rev().map(|page| (request * 256 + page) * stride);
                    pages.insert_pages(numbers).expect("small");
                    pending.union_with(&pages);
                }
                pending
            });
        });
    }
    group.finish();
}

criterion_group!(benches, insert_bitmap, iterate, small_requests);
criterion_main!(benches);
