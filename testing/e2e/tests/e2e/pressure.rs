//! Guests that cannot inflate to the target, and guests that need their memory back.

use std::time::{Duration, Instant};

use bench::Driver;
use lab::Backing;

use crate::fixture::{Host, LIMIT, pages};
use crate::notification_blocker::{EVERY_QUEUE, NotificationBlocker, REQUEST_QUEUE};
use crate::requests::hold;

/// Memory of the guests, in MiB.
const MEMORY_MIB: u64 = 512;

/// Size of a file in the memory of a guest that is then short of memory.
const KEPT_MIB: u64 = 300;

/// A target over the rest of its memory, and less than all.
const TOO_MUCH_MIB: u64 = 400;

/// Memory that it allocates while short of memory.
const SQUEEZED_MIB: u64 = 50;

/// Balloon target before memory pressure.
const INFLATED_MIB: u64 = 350;

/// Allocation of the guest: more than it has free.
const NEEDED_MIB: u64 = 250;

/// Size of a file in guest memory, in MiB.
const BESIDE_MIB: u64 = 40;

/// A guest with a hold, in MiB: its memory, its balloon, what the hold leaves free, and its
/// allocation: more than is free, less than that and the balloon.
const HELD_MEMORY_MIB: u64 = 1024;
const HELD_INFLATED_MIB: u64 = 300;
const HELD_RESERVE_MIB: u64 = 150;
const HELD_NEEDED_MIB: u64 = 250;

/// Timeout for a guest that does not hang to run out of memory, on a busy machine. A guest that
/// waits for the host would hang.
const FOUND_OUT: Duration = LIMIT;

/// How long a deflated balloon must stay so: longer than the driver's pause before a retry.
const ALONE: Duration = Duration::from_millis(1500);

#[test]
fn stock_driver_inflates_later_when_memory_is_freed() {
    inflates_later_when_memory_is_freed("stock-starved", Driver::Stock);
}

#[test]
fn aerostat_driver_inflates_later_when_memory_is_freed() {
    inflates_later_when_memory_is_freed("own-starved", Driver::Own);
}

#[test]
fn stock_driver_deflates_under_memory_pressure() {
    deflates_under_memory_pressure("stock-yields", Driver::Stock);
}

#[test]
fn aerostat_driver_deflates_under_memory_pressure() {
    deflates_under_memory_pressure("own-yields", Driver::Own);
}

fn inflates_later_when_memory_is_freed(name: &str, driver: Driver) {
    let host = Host::start(name, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(driver);
    fixture.load_driver();
    fixture.run(&format!("fill kept {KEPT_MIB} 1"));
    let size = format!("{TOO_MUCH_MIB}MiB");
    let (code, out, err) = host.aerostat(&["balloon", name, &size, "--timeout", "2s"]);
    assert_eq!((code, out.as_str()), (Some(4), ""), "{err}");
    assert!(err.contains(&format!("error: the balloon of {name} holds ")), "{err}");
    assert!(err.contains(&format!(", not {TOO_MUCH_MIB} MiB, after 2s")), "{err}");
    assert!(err.contains("hint: the target stays set"), "{err}");
    let partial = host.status().balloon;
    assert!(partial.actual_pages > 0 && !partial.at_target, "{partial:?}");
    assert!(partial.actual_pages < pages(TOO_MUCH_MIB), "{partial:?}");
    fixture.verify("kept", KEPT_MIB, 1);
    // It deflates for its own needs, and inflates again later.
    let reply = fixture.run(&format!("pressure {SQUEEZED_MIB} 0"));
    assert_eq!(reply, format!("taken_mib={SQUEEZED_MIB} end=complete"));
    fixture.run("drop kept");
    let reached = host.wait_at_target();
    assert_eq!(reached.balloon.actual_pages, pages(TOO_MUCH_MIB));
    host.set_target(0);
    host.wait_at_target();
    fixture.fill_and_verify("kept", KEPT_MIB, 2);
}

fn deflates_under_memory_pressure(name: &str, driver: Driver) {
    let host = Host::start(name, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(driver);
    fixture.load_driver();
    host.set_target(pages(INFLATED_MIB));
    host.wait_at_target();
    let reply = fixture.run(&format!("pressure {NEEDED_MIB} 0"));
    assert_eq!(reply, format!("taken_mib={NEEDED_MIB} end=complete"));
    let yielded = host.status();
    assert!(yielded.balloon.actual_pages < pages(INFLATED_MIB), "{yielded:?}");
    assert!(!yielded.balloon.at_target, "{yielded:?}");
    // The memory is free again, and the balloon does not take it.
    let alone = host.client.wait(yielded.balloon.generation, ALONE).unwrap();
    assert_eq!(alone.actual_pages, yielded.balloon.actual_pages, "{alone:?}");
    fixture.fill_and_verify("data", NEEDED_MIB / 2, 1);
    host.set_target(pages(INFLATED_MIB / 2));
    host.wait_at_target();
    host.set_target(pages(INFLATED_MIB * 3 / 4));
    host.wait_at_target();
    fixture.verify("data", NEEDED_MIB / 2, 1);
}

#[test]
fn an_unresponsive_host_does_not_hang_a_guest_out_of_memory() {
    let host = Host::start("silent", Backing::Small, MEMORY_MIB);
    let blocker = NotificationBlocker::in_front_of(host.backend.socket());
    let mut fixture = host.boot(Driver::Own);
    let free_mib = fixture.free_mib();
    fixture.load_driver();
    fixture.run(&format!("fill kept {BESIDE_MIB} 1"));
    host.set_target(pages(INFLATED_MIB));
    host.wait_at_target();
    blocker.block(EVERY_QUEUE);
    // The balloon cannot deflate, so the process that takes too much is killed. The guest
    // continues.
    let began = Instant::now();
    for _ in 0..2 {
        let reply = fixture.run(&format!("pressure {NEEDED_MIB} 0"));
        assert!(reply.ends_with("end=killed"), "{reply}");
    }
    let took = began.elapsed();
    println!("killed twice in {took:?}");
    assert!(took < FOUND_OUT, "{took:?}");
    assert_eq!(host.status().balloon.actual_pages, pages(INFLATED_MIB));
    fixture.verify("kept", BESIDE_MIB, 1);
    // The deflate completes when the host answers, and the balloon deflates under pressure again.
    blocker.unblock();
    host.until("given back", |status| status.balloon.actual_pages < pages(INFLATED_MIB));
    let reply = fixture.run(&format!("pressure {NEEDED_MIB} 0"));
    assert_eq!(reply, format!("taken_mib={NEEDED_MIB} end=complete"));
    // The module can be removed while the host is unresponsive.
    blocker.block(EVERY_QUEUE);
    let reply = fixture.run(&format!("pressure {MEMORY_MIB} 0"));
    assert!(reply.ends_with("end=killed"), "{reply}");
    let began = Instant::now();
    fixture.unload_driver();
    println!("removed in {:?}", began.elapsed());
    assert!(began.elapsed() < FOUND_OUT, "{:?}", began.elapsed());
    fixture.verify("kept", BESIDE_MIB, 1);
    fixture.run("drop kept");
    fixture.fill_and_verify("all", free_mib - BESIDE_MIB, 2);
}

#[test]
fn a_guest_deflates_when_the_host_does_not_return_a_hold() {
    let host = Host::start("unreturned", Backing::Small, HELD_MEMORY_MIB);
    let blocker = NotificationBlocker::in_front_of(host.backend.socket());
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    host.until("ready for requests", |status| status.requests.possible);
    host.set_target(pages(HELD_INFLATED_MIB));
    host.wait_at_target();
    host.client.request_free_pages(&hold(HELD_RESERVE_MIB)).unwrap();
    let held = fixture.counter("held");
    blocker.block(REQUEST_QUEUE);
    let began = Instant::now();
    let reply = fixture.run(&format!("pressure {HELD_NEEDED_MIB} 0"));
    println!("{reply} in {:?}", began.elapsed());
    assert_eq!(reply, format!("taken_mib={HELD_NEEDED_MIB} end=complete"));
    // It came from the balloon, and the hold is unchanged.
    assert!(host.status().balloon.actual_pages < pages(HELD_INFLATED_MIB));
    assert_eq!((fixture.counter("held"), fixture.counter("holds_lost")), (held, 0));
    blocker.unblock();
    host.until("lost", |status| status.requests.hold.is_none());
    fixture.fill_and_verify("data", HELD_NEEDED_MIB, 1);
    assert_eq!((fixture.counter("held"), fixture.counter("holds_lost")), (0, 1));
}

#[test]
fn a_hold_in_use_by_the_host_is_not_taken_at_shutdown() {
    let host = Host::start("leaving", Backing::Small, HELD_MEMORY_MIB);
    let blocker = NotificationBlocker::in_front_of(host.backend.socket());
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    host.until("ready for requests", |status| status.requests.possible);
    host.client.request_free_pages(&hold(HELD_RESERVE_MIB)).unwrap();
    assert!(fixture.counter("held") > 0);
    blocker.block(REQUEST_QUEUE);
    // The balloon needs the held pages, and the host does not answer. The kernel shuts down during
    // that wait, just after the balloon has reported its size.
    host.set_target(pages(HELD_MEMORY_MIB - HELD_RESERVE_MIB));
    host.until("all that is free is taken", |status| status.balloon.actual_pages > 0);
    let mut guest = fixture.into_guest();
    guest.send("poweroff").unwrap();
    assert!(guest.wait().unwrap().success());
    let log = guest.console_log();
    assert!(log.contains("no more memory to give"), "{log}");
    assert!(!log.contains("took a hold"), "{log}");
}
