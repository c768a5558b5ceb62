//! The cost of a status request, for the operator and for the guest.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "criterion's macros make items without")]
#![allow(clippy::unwrap_used, reason = "a bench fails on any error")]

use std::time::Duration;

use balloon_device::MemoryLayout;
use balloon_host::{HostReclaim, Shared};
use control::BalloonControl as _;
use control::api::{PartialHuge, ReleaseMode};
use criterion::{Criterion, criterion_group, criterion_main};
use host_memory::MemoryMap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const GIB: usize = 1 << 30;

/// Creates a guest with private memory that it has not touched. Its page table is walked
/// nevertheless.
fn guest(bytes: usize) -> Shared {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
    let mut reclaim = HostReclaim::new(ReleaseMode::Background, PartialHuge::Split).unwrap();
    reclaim.set_memory(MemoryMap::of_guest_memory(&memory).unwrap());
    let shared = Shared::new("vm1".into(), reclaim).unwrap();
    shared.device().set_layout(MemoryLayout::of(&memory).unwrap());
    shared
}

fn status(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("status of 64 GiB");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    let shared = guest(64 * GIB);
    group.bench_function("all of it", |bench| bench.iter(|| shared.status()));
    // Memory is measured without the device's lock, which a test checks. So without memory to
    // measure, this is how long the guest may have to wait for the lock.
    shared.device().reclaim_mut().forget_memory();
    group.bench_function("under the lock", |bench| bench.iter(|| shared.status()));
    group.finish();
}

criterion_group!(benches, status);
criterion_main!(benches);
