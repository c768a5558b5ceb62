//! A dead disk under the state file blocks neither the guest nor the operator.

#![allow(clippy::unwrap_used, reason = "a test fails on any error")]

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use balloon_abi::Features;
use balloon_host::{HostReclaim, Shared};
use control::BalloonControl as _;
use control::api::{PartialHuge, ReleaseMode};
use lab::fuse::{self, Fuse};

/// Only a failing test waits this long.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

fn balloon(state_file: &Path) -> Arc<Shared> {
    let reclaim = HostReclaim::new(ReleaseMode::Background, PartialHuge::Split).unwrap();
    let shared = Shared::new("vm1".into(), reclaim).unwrap();
    shared.open_state_file(state_file).unwrap();
    Arc::new(shared)
}

/// Returns the target that a restarted back end loads.
fn saved_target(state_file: &Path) -> u32 {
    balloon(state_file).device().config().num_pages
}

fn disk() -> Option<Fuse> {
    Fuse::mount(fuse::Features::ALL).inspect_err(|error| eprintln!("SKIPPED: {error:?}")).ok()
}

/// Runs `work` in a new thread and waits until it ends.
fn in_time<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, end) = channel();
    thread::spawn(move || done.send(work()));
    end.recv_timeout(TEST_TIMEOUT).unwrap_or_else(|_| panic!("{what} waits for the disk"))
}

#[test]
fn a_dead_disk_blocks_neither_the_guest_nor_the_operator() {
    let Some(disk) = disk() else { return };
    let path = disk.path().join("vm1.state");
    let shared = balloon(&path);
    shared.set_target(5).unwrap();
    // The target is saved when `set_target` returns.
    assert_eq!(saved_target(&path), 5);

    disk.die();
    let operator = Arc::clone(&shared);
    in_time("a target", move || operator.set_target(7)).unwrap();
    assert_eq!(shared.device().config().num_pages, 7);
    let guest = Arc::clone(&shared);
    in_time("the guest", move || {
        guest.reset(Features::VERSION_1 | Features::MUST_TELL_HOST);
        guest.save_poison(8, &[0; 4]);
        guest.device().write_config(4, &3u32.to_le_bytes(), Instant::now()).unwrap();
        guest.save_actual();
    });
    let operator = Arc::clone(&shared);
    in_time("a newer target", move || operator.set_target(9)).unwrap();

    disk.revive();
    shared.finish_saving();
    let end = Instant::now() + TEST_TIMEOUT;
    while saved_target(&path) != 9 {
        assert!(Instant::now() < end, "the newest target is lost");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_dead_disk_does_not_block_shutdown() {
    let Some(disk) = disk() else { return };
    let shared = balloon(&disk.path().join("vm1.state"));
    disk.die();
    in_time("the end", move || {
        shared.save_actual();
        shared.finish_saving();
        drop(shared);
    });
}
