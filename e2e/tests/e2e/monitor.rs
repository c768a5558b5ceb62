//! Our back end under QEMU's generic vhost-user device, with an unmodified Debian
//! kernel in the guest.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bench::Backend;
use control::{BALLOON_PAGE_BYTES, Client, Status};
use lab::debian::{self, Release};
use lab::{Guest, guest_build};

use crate::bed::PAGES_PER_MIB;
use crate::program::{program, root};

/// Memory of the guests, in MiB: emulation is slow.
const MEMORY_MIB: u64 = 512;

/// What a file keeps outside of the balloon.
const KEPT_MIB: u64 = 60;

/// What the guest has touched before the balloon takes it.
const TOUCHED_MIB: u64 = 250;

/// What the balloon takes.
const INFLATED_MIB: u64 = 200;

/// How long a change of the balloon may take in emulation.
const SETTLE: Duration = Duration::from_secs(20);

/// The script's exit code where this machine cannot fetch a QEMU.
const NOT_HERE: i32 = 3;

/// A QEMU with the device, where it can be had.
fn qemu() -> Option<PathBuf> {
    let mut script = Command::new(root().join("scripts/qemu-vhost-user"));
    let output = script.stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Some(String::from_utf8(output.stdout).unwrap().trim().into()),
        Some(NOT_HERE) => {
            println!("not run, {error}");
            None
        }
        code => panic!("{code:?}: {error}"),
    }
}

/// The device by its name in this QEMU: since 10.1 it is called one for tests.
fn device(qemu: &Path) -> String {
    let known = |name: &&str| {
        let help = format!("{name},help");
        let mut ask = Command::new(qemu);
        ask.args(["-device", &help]).output().unwrap().status.success()
    };
    let names = ["vhost-user-device-pci", "vhost-user-test-device-pci"];
    let name = names.into_iter().find(known).expect("a QEMU with a generic vhost-user device");
    format!("{name},chardev=balloon,virtio-id=5,num_vqs=6,config_size=16")
}

#[test]
fn qemu_with_the_stock_driver() {
    balloons("qemu-stock", "virtio_balloon");
}

#[test]
fn qemu_with_our_driver() {
    balloons("qemu-own", "aerostat_balloon");
}

fn balloons(name: &str, driver: &str) {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::Builder::new().prefix("aerostat-e2e-").tempdir().unwrap();
    let backend = Backend::start_with(program(), name, directory.path(), WITHOUT).unwrap();
    let client = backend.client().unwrap();
    let kernel = debian::kernel(Release::Cloud6_12).unwrap();
    let mut modules = kernel.modules(&["virtio_pci"]).unwrap();
    modules.push(if driver == "virtio_balloon" {
        kernel.modules(&[driver]).unwrap().pop().unwrap()
    } else {
        guest_build::balloon_module(&kernel.tree().unwrap()).unwrap()
    });
    let memory = format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on");
    let socket = format!("socket,id=balloon,path={}", backend.socket().display());
    let device = device(&qemu);
    let mut guest = Guest::qemu(&kernel)
        .qemu_program(qemu)
        .memory_mib(MEMORY_MIB)
        .modules(&modules)
        .machine_arguments(["-object", &memory, "-machine", "memory-backend=memory"])
        .machine_arguments(["-chardev", &socket, "-device", &device])
        .boot()
        .unwrap_or_else(|error| panic!("{error}\n{}", backend.log()));
    guest.load(&modules).unwrap();
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
    verify(&mut guest, "kept", KEPT_MIB, 1);
    settle(&client, 0);
    guest.run(&format!("fill more {INFLATED_MIB} 2")).unwrap();
    verify(&mut guest, "more", INFLATED_MIB, 2);
    verify(&mut guest, "kept", KEPT_MIB, 1);
    guest.run("drop more").unwrap();

    // A driver that leaves with a balloon, and comes again.
    settle(&client, INFLATED_MIB / 2);
    guest.run(&format!("rmmod {driver}")).unwrap();
    guest.run(&format!("fill all {INFLATED_MIB} 3")).unwrap();
    verify(&mut guest, "all", INFLATED_MIB, 3);
    guest.run("drop all").unwrap();
    guest.load(&modules[modules.len() - 1..]).unwrap();
    settle(&client, INFLATED_MIB);
    verify(&mut guest, "kept", KEPT_MIB, 1);
    let status = client.status().unwrap();
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    println!("{driver}: {:?}", inflated.balloon.last_change);
    guest.power_off().unwrap();
    assert!(backend.stop().unwrap().success());
}

/// QEMU 8.2 gives each queue four entries, and Linux wants 32 to report free pages.
const WITHOUT: &[&str] = &["--without", "reporting"];

/// Sets the target and waits until it is reached and all is released.
fn settle(client: &Client, mib: u64) -> Status {
    let set = client.set_balloon(mib << 20, SETTLE).unwrap();
    let end = Instant::now() + SETTLE;
    let mut balloon = set;
    while !balloon.settled {
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
