//! A guest ends when its `Guest` is dropped, also by a panic, and when its process is killed.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{Guest, Scratch};

/// Environment variable: makes `victim` boot a guest and wait to be killed.
const VICTIM_VARIABLE: &str = "LAB_TEST_VICTIM";

/// Timeout for processes to end.
const LIMIT: Duration = Duration::from_secs(20);

fn boot() -> Guest {
    let kernel = lab::uml::kernel().unwrap();
    let mut guest = Guest::uml(&kernel).memory_mib(256).boot().unwrap();
    // Starts a guest user process, which is also a host process.
    guest.run("pressure 16 0").unwrap();
    guest
}

/// Returns the processes of a group, without zombies.
fn group(leader: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before the last parenthesis may contain anything.
        let fields: Vec<&str> = status.rsplit_once(')')?.1.split_whitespace().collect();
        let (state, group) = (*fields.first()?, fields.get(2)?.parse::<u32>().ok()?);
        (group == leader && state != "Z").then_some(pid)
    });
    processes.collect()
}

/// Waits until a killed group has ended.
fn assert_vanishes(leader: u32) {
    let deadline = Instant::now() + LIMIT;
    while !group(leader).is_empty() {
        assert!(Instant::now() < deadline, "still running: {:?}", group(leader));
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_dropped_guest_leaves_no_process() {
    let guest = boot();
    let leader = guest.pid();
    // The kernel, its user process, and the shell of `GuardedChild`.
    assert!(group(leader).len() >= 3, "{:?}", group(leader));
    drop(guest);
    assert_vanishes(leader);
}

#[test]
fn a_panic_leaves_no_process() {
    let leader = std::sync::Mutex::new(0);
    let outcome = std::panic::catch_unwind(|| {
        let guest = boot();
        *leader.lock().unwrap() = guest.pid();
        std::panic::resume_unwind(Box::new("a failing test"));
    });
    assert!(outcome.is_err());
    assert_vanishes(leader.into_inner().unwrap());
}

#[test]
fn a_killed_harness_leaves_no_process_and_no_file() {
    let temporary = tempfile::tempdir().unwrap();
    let mut harness = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "victim", "--ignored", "--nocapture"])
        .env(VICTIM_VARIABLE, "1")
        .env("TMPDIR", temporary.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(harness.stdout.take().unwrap()).lines();
    let leader: u32 = lines
        .find_map(|line| line.unwrap().split_once("guest=")?.1.trim().parse().ok())
        .expect("the victim boots a guest");
    assert!(!group(leader).is_empty());
    // SIGKILL: nothing in the harness can run any more.
    harness.kill().unwrap();
    harness.wait().unwrap();
    assert_vanishes(leader);
    let deadline = Instant::now() + LIMIT;
    while std::fs::read_dir(temporary.path()).unwrap().count() > 0 {
        assert!(Instant::now() < deadline, "files remain");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
#[ignore = "is started, and killed, by another test"]
fn victim() {
    if std::env::var_os(VICTIM_VARIABLE).is_some() {
        let guest = boot();
        let scratch = Scratch::new("test").unwrap();
        std::fs::write(scratch.path().join("file"), "text").unwrap();
        println!("guest={}", guest.pid());
        loop {
            std::thread::park();
        }
    }
}
