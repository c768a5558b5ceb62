//! Guests that cannot give what is asked, and guests that need their memory
//! themselves.

use std::time::Duration;

use bench::Driver;
use lab::Backing;

use crate::bed::{Host, pages};

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
    let mut bed = host.boot(driver);
    bed.load_driver();
    bed.run(&format!("fill kept {KEPT_MIB} 1"));
    let size = format!("{TOO_MUCH_MIB}MiB");
    let (code, out, err) = host.aerostat(&["balloon", name, &size, "--timeout", "2s"]);
    assert_eq!((code, out.as_str()), (Some(4), ""), "{err}");
    assert!(err.contains(&format!("error: the balloon of {name} holds ")), "{err}");
    assert!(err.contains(&format!(", not {TOO_MUCH_MIB} MiB, after 2s")), "{err}");
    assert!(err.contains("hint: the target stays set"), "{err}");
    let partial = host.status().balloon;
    assert!(partial.actual_pages > 0 && !partial.settled, "{partial:?}");
    assert!(partial.actual_pages < pages(TOO_MUCH_MIB), "{partial:?}");
    bed.verify("kept", KEPT_MIB, 1);
    // What it needs itself it takes back, and that is not its last word.
    let told = bed.run(&format!("pressure {SQUEEZED_MIB} 0"));
    assert_eq!(told, format!("taken_mib={SQUEEZED_MIB} end=complete"));
    bed.run("drop kept");
    let reached = host.settle();
    assert_eq!(reached.balloon.actual_pages, pages(TOO_MUCH_MIB));
    host.set_target(0);
    host.settle();
    bed.fill_and_verify("kept", KEPT_MIB, 2);
}

fn yields_to_pressure(name: &str, driver: Driver) {
    let host = Host::start(name, Backing::Small, MEMORY_MIB);
    let mut bed = host.boot(driver);
    bed.load_driver();
    host.set_target(pages(INFLATED_MIB));
    host.settle();
    let told = bed.run(&format!("pressure {NEEDED_MIB} 0"));
    assert_eq!(told, format!("taken_mib={NEEDED_MIB} end=complete"));
    let yielded = host.status();
    assert!(yielded.balloon.actual_pages < pages(INFLATED_MIB), "{yielded:?}");
    assert!(!yielded.balloon.settled, "{yielded:?}");
    // The memory is free again, and the balloon leaves it to the guest.
    let alone = host.client.wait(yielded.balloon.generation, ALONE).unwrap();
    assert_eq!(alone.actual_pages, yielded.balloon.actual_pages, "{alone:?}");
    bed.fill_and_verify("data", NEEDED_MIB / 2, 1);
    host.set_target(pages(INFLATED_MIB / 2));
    host.settle();
    host.set_target(pages(INFLATED_MIB * 3 / 4));
    host.settle();
    bed.verify("data", NEEDED_MIB / 2, 1);
}
