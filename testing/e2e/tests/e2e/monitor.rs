//! Our back end with QEMU's generic vhost-user device and an unmodified Debian guest.

use std::time::{Duration, Instant};

use bench::{Device, Driver, QemuFixture, QemuFixtureOptions};
use control::{BALLOON_PAGE_BYTES, Client, Status};
use lab::Guest;
use lab::debian::{self, Release};

use crate::fixture::PAGES_PER_MIB;
use crate::program::program;

/// Memory of the guests, in MiB: emulation is slow.
const MEMORY_MIB: u64 = 512;

/// Size of a file in guest memory.
const KEPT_MIB: u64 = 60;

/// Memory that the guest touches before the balloon takes it.
const TOUCHED_MIB: u64 = 250;

/// Balloon target.
const INFLATED_MIB: u64 = 200;

/// Timeout of a balloon change in emulation.
const SETTLE: Duration = Duration::from_secs(20);

#[test]
fn qemu_with_the_stock_driver() {
    balloons("qemu-stock", Driver::Stock);
}

#[test]
fn qemu_with_our_driver() {
    balloons("qemu-own", Driver::Own);
}

fn balloons(name: &str, driver: Driver) {
    let qemu = match lab::qemu::vhost_user().unwrap() {
        Ok(qemu) => qemu,
        Err(why) => {
            println!("not run, {why}");
            return;
        }
    };
    let options = QemuFixtureOptions {
        program: program().to_owned(),
        qemu,
        kernel: debian::kernel(Release::Cloud6_12).unwrap(),
        memory_mib: MEMORY_MIB,
        kernel_arguments: Vec::new(),
        disk: None,
    };
    let mut fixture = QemuFixture::start(name, Device::VhostUser, driver, &options).unwrap();
    let module = fixture.driver.clone();
    let client = fixture.backend().unwrap().client().unwrap();
    let (guest, driver) = (&mut fixture.guest, driver.module_name());
    let devices = guest.run(&format!("ls /sys/bus/virtio/drivers/{driver}")).unwrap().lines;
    assert!(devices.contains(&"virtio0".to_owned()), "{devices:?}\n{}", guest.console_log());

    guest.run(&format!("fill kept {KEPT_MIB} 1")).unwrap();
    guest.run(&format!("touch {TOUCHED_MIB}")).unwrap();
    let before = client.status().unwrap();
    assert!(before.guest.connected, "{before:?}");
    assert_eq!(before.guest.memory_bytes, MEMORY_MIB << 20, "{before:?}");
    let inflated = settle(&client, INFLATED_MIB);
    let fell = before.resident_bytes.unwrap() - inflated.resident_bytes.unwrap();
    assert!(fell >= (INFLATED_MIB << 20) * 3 / 4, "{} MiB, {inflated:?}", fell >> 20);
    verify(guest, "kept", KEPT_MIB, 1);
    settle(&client, 0);
    guest.run(&format!("fill more {INFLATED_MIB} 2")).unwrap();
    verify(guest, "more", INFLATED_MIB, 2);
    verify(guest, "kept", KEPT_MIB, 1);
    guest.run("drop more").unwrap();

    // The driver unloads with a balloon, and loads again.
    settle(&client, INFLATED_MIB / 2);
    guest.run(&format!("rmmod {driver}")).unwrap();
    guest.run(&format!("fill all {INFLATED_MIB} 3")).unwrap();
    verify(guest, "all", INFLATED_MIB, 3);
    guest.run("drop all").unwrap();
    guest.load(&[module]).unwrap();
    settle(&client, INFLATED_MIB);
    verify(guest, "kept", KEPT_MIB, 1);
    let status = client.status().unwrap();
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    println!("{driver}: {:?}", inflated.balloon.last_change);
    assert!(fixture.end().unwrap().success());
}

/// Sets the target and waits until the balloon has reached it and the host has released all.
fn settle(client: &Client, mib: u64) -> Status {
    let set = client.set_balloon(mib << 20, SETTLE).unwrap();
    let end = Instant::now() + SETTLE;
    let mut balloon = set;
    while !balloon.at_target {
        assert!(Instant::now() < end, "{balloon:?}");
        balloon = client.wait(balloon.generation, SETTLE).unwrap();
    }
    assert_eq!(u64::from(balloon.actual_pages), mib * u64::from(PAGES_PER_MIB));
    let status = client.status().unwrap();
    assert_eq!(u64::from(status.balloon.actual_pages) * BALLOON_PAGE_BYTES, mib << 20);
    status
}

fn verify(guest: &mut Guest, file: &str, mib: u64, seed: u64) {
    let reply = guest.run(&format!("verify {file} {mib} {seed}")).unwrap();
    let text = if reply.text.is_empty() { reply.lines.join("") } else { reply.text };
    assert_eq!(text, "0", "wrong pages in {file}");
}
