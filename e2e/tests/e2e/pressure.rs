//! Guests that cannot give what is asked, and guests that need their memory
//! themselves.

use std::time::{Duration, Instant};

use bench::Driver;
use lab::Backing;

use crate::fixture::{Host, LIMIT, pages};
use crate::requests::hold;
use crate::silence::{EVERY_QUEUE, REQUEST_QUEUE, Silencer};

/// Memory of the guests, in MiB.
const MEMORY_MIB: u64 = 512;

/// What a file of the starving guest holds.
const KEPT_MIB: u64 = 300;

/// More than the rest of it, but less than all.
const TOO_MUCH_MIB: u64 = 400;

/// What it needs itself while it starves.
const SQUEEZED_MIB: u64 = 50;

/// What the guest is asked for before it comes under pressure.
const INFLATED_MIB: u64 = 350;

/// What it then needs: more than it has left.
const NEEDED_MIB: u64 = 250;

/// What a file holds beside, in MiB.
const BESIDE_MIB: u64 = 40;

/// The guest with a hold, in MiB: its memory, what its balloon takes, what the hold leaves, and
/// what it then needs: more than it has left, less than that and the balloon.
const HELD_MEMORY_MIB: u64 = 1024;
const HELD_INFLATED_MIB: u64 = 300;
const HELD_RESERVE_MIB: u64 = 150;
const HELD_NEEDED_MIB: u64 = 250;

/// How long a guest that does not stand still may take to find out that there is no memory, on a
/// machine with a lot of other work. One that waits for the host would wait for ever.
const FOUND_OUT: Duration = LIMIT;

/// How long a balloon must stay alone: longer than the driver's own pause
/// before it tries again.
const ALONE: Duration = Duration::from_millis(1500);

#[test]
fn stock_driver_gives_later_what_it_cannot_give_now() {
    gives_later_what_it_cannot_give_now("stock-starved", Driver::Stock);
}

#[test]
fn own_driver_gives_later_what_it_cannot_give_now() {
    gives_later_what_it_cannot_give_now("own-starved", Driver::Own);
}

#[test]
fn stock_driver_yields_to_pressure() {
    yields_to_pressure("stock-yields", Driver::Stock);
}

#[test]
fn own_driver_yields_to_pressure() {
    yields_to_pressure("own-yields", Driver::Own);
}

fn gives_later_what_it_cannot_give_now(name: &str, driver: Driver) {
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
    // What it needs itself it takes back, and that is not its last word.
    let told = fixture.run(&format!("pressure {SQUEEZED_MIB} 0"));
    assert_eq!(told, format!("taken_mib={SQUEEZED_MIB} end=complete"));
    fixture.run("drop kept");
    let reached = host.wait_at_target();
    assert_eq!(reached.balloon.actual_pages, pages(TOO_MUCH_MIB));
    host.set_target(0);
    host.wait_at_target();
    fixture.fill_and_verify("kept", KEPT_MIB, 2);
}

fn yields_to_pressure(name: &str, driver: Driver) {
    let host = Host::start(name, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(driver);
    fixture.load_driver();
    host.set_target(pages(INFLATED_MIB));
    host.wait_at_target();
    let told = fixture.run(&format!("pressure {NEEDED_MIB} 0"));
    assert_eq!(told, format!("taken_mib={NEEDED_MIB} end=complete"));
    let yielded = host.status();
    assert!(yielded.balloon.actual_pages < pages(INFLATED_MIB), "{yielded:?}");
    assert!(!yielded.balloon.at_target, "{yielded:?}");
    // The memory is free again, and the balloon leaves it to the guest.
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
fn a_silent_host_does_not_stop_a_guest_that_needs_memory() {
    let host = Host::start("silent", Backing::Small, MEMORY_MIB);
    let silencer = Silencer::before(host.backend.socket());
    let mut fixture = host.boot(Driver::Own);
    let free_mib = fixture.free_mib();
    fixture.load_driver();
    fixture.run(&format!("fill kept {BESIDE_MIB} 1"));
    host.set_target(pages(INFLATED_MIB));
    host.wait_at_target();
    silencer.silence(EVERY_QUEUE);
    // The balloon cannot come back, so what takes too much is killed; the guest goes on.
    let began = Instant::now();
    for _ in 0..2 {
        let told = fixture.run(&format!("pressure {NEEDED_MIB} 0"));
        assert!(told.ends_with("end=killed"), "{told}");
    }
    let took = began.elapsed();
    println!("killed twice in {took:?}");
    assert!(took < FOUND_OUT, "{took:?}");
    assert_eq!(host.status().balloon.actual_pages, pages(INFLATED_MIB));
    fixture.verify("kept", BESIDE_MIB, 1);
    // What was asked for comes when the host answers, and the balloon yields as ever.
    silencer.end();
    host.until("given back", |status| status.balloon.actual_pages < pages(INFLATED_MIB));
    let told = fixture.run(&format!("pressure {NEEDED_MIB} 0"));
    assert_eq!(told, format!("taken_mib={NEEDED_MIB} end=complete"));
    // A module can be removed while its host is silent.
    silencer.silence(EVERY_QUEUE);
    let told = fixture.run(&format!("pressure {MEMORY_MIB} 0"));
    assert!(told.ends_with("end=killed"), "{told}");
    let began = Instant::now();
    fixture.unload_driver();
    println!("removed in {:?}", began.elapsed());
    assert!(began.elapsed() < FOUND_OUT, "{:?}", began.elapsed());
    fixture.verify("kept", BESIDE_MIB, 1);
    fixture.run("drop kept");
    fixture.fill_and_verify("all", free_mib - BESIDE_MIB, 2);
}

#[test]
fn a_hold_that_is_not_returned_leaves_the_balloon_to_the_guest() {
    let host = Host::start("unreturned", Backing::Small, HELD_MEMORY_MIB);
    let silencer = Silencer::before(host.backend.socket());
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    host.until("ready for requests", |status| status.requests.possible);
    host.set_target(pages(HELD_INFLATED_MIB));
    host.wait_at_target();
    host.client.ask_free_pages(&hold(HELD_RESERVE_MIB)).unwrap();
    let held = fixture.counter("held");
    silencer.silence(REQUEST_QUEUE);
    let began = Instant::now();
    let told = fixture.run(&format!("pressure {HELD_NEEDED_MIB} 0"));
    println!("{told} in {:?}", began.elapsed());
    assert_eq!(told, format!("taken_mib={HELD_NEEDED_MIB} end=complete"));
    // It was the balloon's, and the hold is as it was.
    assert!(host.status().balloon.actual_pages < pages(HELD_INFLATED_MIB));
    assert_eq!((fixture.counter("held"), fixture.counter("holds_lost")), (held, 0));
    silencer.end();
    host.until("lost", |status| status.requests.hold.is_none());
    fixture.fill_and_verify("data", HELD_NEEDED_MIB, 1);
    assert_eq!((fixture.counter("held"), fixture.counter("holds_lost")), (0, 1));
}

#[test]
fn a_hold_that_the_host_has_is_not_used_by_a_kernel_that_ends() {
    let host = Host::start("leaving", Backing::Small, HELD_MEMORY_MIB);
    let silencer = Silencer::before(host.backend.socket());
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    host.until("ready for requests", |status| status.requests.possible);
    host.client.ask_free_pages(&hold(HELD_RESERVE_MIB)).unwrap();
    assert!(fixture.counter("held") > 0);
    silencer.silence(REQUEST_QUEUE);
    // The balloon wants what is held, and the host does not answer. The kernel ends while that is
    // waited for: the balloon's size is said just before.
    host.set_target(pages(HELD_MEMORY_MIB - HELD_RESERVE_MIB));
    host.until("all that is free is taken", |status| status.balloon.actual_pages > 0);
    let mut guest = fixture.into_guest();
    guest.ask("poweroff").unwrap();
    assert!(guest.wait().unwrap().success());
    let log = guest.console_log();
    assert!(log.contains("no more memory to give"), "{log}");
    assert!(!log.contains("took a hold"), "{log}");
}
