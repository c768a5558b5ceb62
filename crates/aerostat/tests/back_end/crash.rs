//! The back end is killed in the middle of what it does, and started again. The
//! monitor connects anew and the guest notices nothing.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use balloon_abi::Features;
use control::ReleaseStatus;
use rustix::process::{Pid, Signal, kill_process};

use crate::PROGRAM;
use crate::support::TEST_TIMEOUT;
use crate::support::driver::{ASKABLE, BITMAP, CLASSIC};
use crate::support::guest::data_pages;
use crate::support::process::Program;
use crate::traffic::{Random, Traffic};

/// How often the back end is killed in each test, unless the variable says so.
const KILLS: usize = 100;
const KILLS_VARIABLE: &str = "AEROSTAT_KILLS";

/// Target of the balloon, in pages.
const TARGET: u32 = 400;

/// Longest time from a connection to the kill, in microseconds.
const LIFE_US: u64 = 6000;

fn kills() -> usize {
    std::env::var(KILLS_VARIABLE).map_or(KILLS, |text| text.parse().unwrap())
}

#[test]
fn the_classic_driver_with_tracking() {
    killed(CLASSIC, true, 1);
}

#[test]
fn the_classic_driver_without_tracking() {
    killed(CLASSIC | Features::RING_EVENT_IDX, false, 2);
}

#[test]
fn our_driver_with_tracking() {
    killed(ASKABLE, true, 3);
}

#[test]
fn our_driver_without_tracking() {
    killed(BITMAP, false, 4);
}

fn killed(features: Features, tracks: bool, seed: u64) {
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
        // What a guest still does while nobody serves it.
        for _ in 0..random.below(4) {
            traffic.step();
        }
        program.start();
        traffic.reconnect(program.connect("vm.vhost"));
        let status = program.client("vm").status().unwrap();
        assert_eq!(status.balloon.target_pages, TARGET, "after kill {kill}");
        // Writes that nobody answered may have been lost with the process.
        let (actual, said) = (status.balloon.actual_pages, &traffic.said);
        assert!(said.contains(&actual), "{actual}, not one of {said:?} after kill {kill}");
        traffic.said = BTreeSet::from([actual]);
        traffic.verify();
    }
    finish(&mut program, &mut traffic);
}

/// Everything has come back, the sizes are right, and what is inflated anew is
/// released.
fn finish(program: &mut Program, traffic: &mut Traffic) {
    traffic.settle();
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
        traffic.settle();
    };
    // Pages from before and after the kills go back, and all of them come anew.
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
    // The target was set in another life, so nobody waits for this one's release.
    let end = Instant::now() + TEST_TIMEOUT;
    let is_over = |release: ReleaseStatus| release.pending_bytes + release.in_flight_bytes == 0;
    while !is_over(client.status().unwrap().release) {
        assert!(Instant::now() < end, "it is not released");
        thread::sleep(Duration::from_millis(1));
    }
    let status = client.status().unwrap();
    traffic.vm.guest.assert_gone(&all);
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    traffic.stop();
    println!("{} messages", traffic.messages);
}
