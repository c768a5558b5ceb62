//! What a status costs: the operator who asks, and the guest who is served meanwhile.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "criterion's macros make items without")]
#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::time::Duration;

use balloon_device::MemoryLayout;
use balloon_host::{HostReclaim, Shared};
use control::BalloonControl as _;
use control::api::{PartialHuge, ReleaseMode};
use criterion::{Criterion, criterion_group, criterion_main};
use host_memory::MemoryMap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const GIB: usize = 1 << 30;

/// A guest of private memory that it has not touched: its page table is gone through all the
/// same.
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
    // The guest's memory is measured after the device's lock was given back, which a test sees
    // to; so without memory to measure, this is how long the guest may have to wait.
    shared.device().reclaim_mut().forget_memory();
    group.bench_function("under the lock", |bench| bench.iter(|| shared.status()));
    group.finish();
}

criterion_group!(benches, status);
criterion_main!(benches);
