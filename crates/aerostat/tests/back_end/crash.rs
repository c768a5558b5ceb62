//! The back end is killed at random moments and restarted. The front end reconnects, and the guest
//! must not notice.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use balloon_abi::Features;
use control::ReleaseStatus;
use rustix::process::{Pid, Signal, kill_process};

use crate::PROGRAM;
use crate::support::TEST_TIMEOUT;
use crate::support::driver::{BITMAP, CLASSIC, WITH_REQUESTS};
use crate::support::guest::data_pages;
use crate::support::process::Program;
use crate::traffic::{Random, Traffic};

/// Kills per test, unless the variable is set.
const KILLS: usize = 100;
const KILLS_VARIABLE: &str = "AEROSTAT_KILLS";

/// Target of the balloon in pages.
const TARGET: u32 = 400;

/// Longest time from connection to kill, in microseconds.
const LIFE_US: u64 = 6000;

fn kills() -> usize {
    std::env::var(KILLS_VARIABLE).map_or(KILLS, |text| text.parse().unwrap())
}

#[test]
fn the_stock_driver_with_inflight_tracking() {
    survives_kills(CLASSIC, true, 1);
}

#[test]
fn the_stock_driver_without_inflight_tracking() {
    survives_kills(CLASSIC | Features::RING_EVENT_IDX, false, 2);
}

#[test]
fn aerostats_driver_with_inflight_tracking() {
    survives_kills(WITH_REQUESTS, true, 3);
}

#[test]
fn aerostats_driver_without_inflight_tracking() {
    survives_kills(BITMAP, false, 4);
}

fn survives_kills(features: Features, tracks: bool, seed: u64) {
    let mut program = Program::one_guest(PROGRAM, &[]);
    program.start();
    let client = program.client("vm");
    client.set_balloon(u64::from(TARGET) * 4096, Duration::ZERO).unwrap();
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let front = program.connect("vm.vhost");
    let mut traffic = Traffic::boot(front, features, tracks, random.next());
    for kill in 0..kills() {
        let life = Duration::from_micros(random.below(LIFE_US));
        let pid = Pid::from_raw(program.pid().cast_signed()).unwrap();
        let (dead, is_dead) = mpsc::channel();
        let killer = thread::spawn(move || {
            thread::sleep(life);
            kill_process(pid, Signal::KILL).unwrap();
            dead.send(()).unwrap();
        });
        while is_dead.try_recv().is_err() {
            traffic.step();
        }
        killer.join().unwrap();
        program.kill();
        // The guest continues while no back end serves it.
        for _ in 0..random.below(4) {
            traffic.step();
        }
        program.start();
        traffic.reconnect(program.connect("vm.vhost"));
        let status = program.client("vm").status().unwrap();
        assert_eq!(status.balloon.target_pages, TARGET, "after kill {kill}");
        // Writes without a reply may have been lost with the process.
        let (actual, reported) = (status.balloon.actual_pages, &traffic.reported);
        assert!(reported.contains(&actual), "{actual}, not one of {reported:?} after kill {kill}");
        traffic.reported = BTreeSet::from([actual]);
        traffic.verify();
    }
    finish(&mut program, &mut traffic);
}

/// Checks that all buffers have been returned, that the sizes are right, and that newly inflated
/// pages are released.
fn finish(program: &mut Program, traffic: &mut Traffic) {
    traffic.wait_returned();
    traffic.verify();
    let client = program.client("vm");
    let held = traffic.balloon.clone();
    traffic.vm.front.write_actual(held.len() as u32);
    traffic.vm.front.barrier();
    let status = client.status().unwrap();
    assert_eq!(status.balloon.actual_pages, held.len() as u32);
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    assert!(status.guest.connected);
    let resume = |traffic: &mut Traffic, queue, pages: &BTreeSet<u64>| {
        traffic.send(queue, pages.clone());
        traffic.wait_returned();
    };
    // Deflates all pages from before and after the kills, then inflates them again.
    traffic.balloon.clear();
    resume(traffic, 1, &held);
    traffic.verify();
    let all: BTreeSet<u64> = data_pages().take(TARGET as usize).collect();
    for part in all.iter().copied().collect::<Vec<_>>().chunks(200) {
        resume(traffic, 0, &part.iter().copied().collect());
    }
    traffic.vm.front.write_actual(all.len() as u32);
    traffic.vm.front.barrier();
    assert_eq!(client.balloon().unwrap().actual_pages, all.len() as u32);
    // The target was set before a restart, so no client waits for the release.
    let end = Instant::now() + TEST_TIMEOUT;
    let is_over = |release: ReleaseStatus| release.pending_bytes + release.in_flight_bytes == 0;
    while !is_over(client.status().unwrap().release) {
        assert!(Instant::now() < end, "the pages are not released");
        thread::sleep(Duration::from_millis(1));
    }
    let status = client.status().unwrap();
    traffic.vm.guest.assert_gone(&all);
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    traffic.stop();
    println!("{} messages", traffic.messages);
}
