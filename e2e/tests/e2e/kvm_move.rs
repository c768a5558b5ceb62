//! Guests of our monitor that are moved while they run, from one process to another and back.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use control::Client;
use control::api::{MigrationState, MigrationStatus, MigrationSummary};
use lab::Guest;

use crate::kvm::{
    MIB, OURS, STOCK, VMLINUX, VMLINUZ, builder, inside_of_a_kvm, load, number, run, verify,
};
use crate::program::{program, told};

/// Memory of the guest, what its balloon takes, and what a file keeps, in MiB.
const MEMORY_MIB: u64 = 256;
const INFLATED_MIB: u64 = 64;
const KEPT_MIB: u64 = 32;

/// What the guest allocates, writes and frees all the time while it is moved.
const BUSY_MIB: u64 = 4;

/// Guests that have memory at a time: one on its way.
const GUESTS: u64 = 2;

/// For another process to begin to listen.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn guests_move_to_another_process_and_back_while_they_run() {
    inside_of_a_kvm("kvm_move::inside", GUESTS * MEMORY_MIB);
}

#[test]
#[ignore = "is started by another test where there is a KVM"]
fn inside() {
    // Started by hand it has nothing to work with.
    if std::env::var_os(VMLINUZ).is_none() {
        return;
    }
    // Connections need it, and a machine that was just booted does not have it yet. Where it is
    // there already, this may be forbidden.
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    let start = Instant::now();
    for driver in [OURS, STOCK] {
        moves_there_and_back(driver);
        println!("{driver} after {:.1?}", start.elapsed());
    }
}

fn moves_there_and_back(driver: &str) {
    let mut first = builder(driver, VMLINUX).memory_mib(MEMORY_MIB).boot().unwrap();
    load(&mut first, driver);
    run(&mut first, &format!("fill kept {KEPT_MIB} 1"));
    balloon(driver, INFLATED_MIB);
    let text = refused(driver, "127.0.0.1:1");
    assert!(text.contains("runs on here"), "{text}");
    run(&mut first, &format!("busy {BUSY_MIB}"));

    // Its name is taken until the guest has left.
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control").into_os_string().into_string().unwrap();
    let (mut second, address) = receiver(driver, &["--control", &control]);
    let summary = moved(driver, &address, &[]);
    assert!(first.wait().unwrap().success(), "{}", first.console_log());
    run(&mut second, "idle");
    verify(&mut second, "kept", KEPT_MIB, 1);
    left_out(&summary, INFLATED_MIB);

    // What the balloon had is the guest's again, and is as good as any memory.
    balloon(&control, 0);
    let free_mib = number(&mut second, "free-mib");
    assert!(free_mib > INFLATED_MIB, "{free_mib} MiB");
    let all_mib = free_mib - MEMORY_MIB / 8;
    run(&mut second, &format!("fill all {all_mib} 2"));
    verify(&mut second, "all", all_mib, 2);
    run(&mut second, "drop all");

    let (mut third, address) = receiver(driver, &[]);
    let summary = moved(&control, &address, &["--drop-caches", "--connections", "1"]);
    assert!(second.wait().unwrap().success(), "{}", second.console_log());
    left_out(&summary, 0);
    verify(&mut third, "kept", KEPT_MIB, 1);
    let status = Client::connect(&control::socket_path(&driver.parse().unwrap()).unwrap());
    let faults = status.unwrap().status().unwrap().faults;
    assert_eq!(faults.total(), 0, "{faults:?}");
    assert!(third.power_off().unwrap().success());
}

/// A process that waits for a guest of this name, and where.
fn receiver(name: &str, arguments: &[&str]) -> (Guest, String) {
    let words = ["--name", name, "--listen", "127.0.0.1:0", "--plain"];
    let words = words.iter().chain(arguments).copied();
    let receiver = Guest::receiver(program()).machine_arguments(words).boot().unwrap();
    let end = Instant::now() + SOON;
    loop {
        let log = receiver.console_log();
        let lines = log.lines().find_map(|line| line.split_once(": waits on "));
        if let Some((_, address)) = lines {
            return (receiver, address.to_owned());
        }
        assert!(Instant::now() < end, "{log}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn moved(guest: &str, to: &str, arguments: &[&str]) -> MigrationSummary {
    let mut command = Command::new(program());
    command.args(["migrate", guest, to, "--plain", "--json"]).args(arguments);
    let (code, out, err) = told(&command.output().unwrap());
    assert_eq!(code, Some(0), "{out}{err}");
    println!("{out}");
    let status: MigrationStatus = serde_json::from_str(&out).unwrap();
    assert_eq!(status.state, MigrationState::Moved);
    status.summary.unwrap()
}

fn refused(guest: &str, to: &str) -> String {
    let mut command = Command::new(program());
    let output = command.args(["migrate", guest, to, "--plain"]).output().unwrap();
    let (code, out, err) = told(&output);
    assert_eq!(code, Some(1), "{out}{err}");
    err
}

/// Free memory and that of the balloon was not sent: nothing of the former but what is in blocks
/// that the driver does not name.
fn left_out(summary: &MigrationSummary, balloon_mib: u64) {
    let MigrationSummary { memory_bytes, balloon_bytes, free_bytes, sent_bytes, .. } = *summary;
    assert_eq!((memory_bytes, balloon_bytes), (MEMORY_MIB * MIB, balloon_mib * MIB));
    let unused = free_bytes + balloon_bytes;
    assert!(free_bytes > 0 && unused > memory_bytes / 3, "{summary:?}");
    assert!(sent_bytes < memory_bytes - unused + memory_bytes / 4, "{summary:?}");
    assert!(summary.downtime.total_ms > 0.0, "{summary:?}");
}

fn balloon(guest: &str, target_mib: u64) {
    let size = format!("{target_mib}MiB");
    let mut command = Command::new(program());
    let output = command.args(["balloon", guest, &size, "--timeout", "60s"]).output().unwrap();
    let (code, out, err) = told(&output);
    assert_eq!(code, Some(0), "{out}{err}");
    let path = Path::new(guest);
    let path = if guest.contains('/') {
        path.to_owned()
    } else {
        control::socket_path(&guest.parse().unwrap()).unwrap()
    };
    let status = Client::connect(&path).unwrap().status().unwrap();
    assert_eq!(status.balloon.actual_bytes, target_mib * MIB);
}
