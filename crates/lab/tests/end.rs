//! A guest ends with what holds it: dropped, panicking, or killed.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{Guest, Scratch};

/// Runs the test below as a process of its own, which boots a guest and waits to be killed.
const VICTIM_VARIABLE: &str = "LAB_TEST_VICTIM";

/// How long processes may take to vanish.
const LIMIT: Duration = Duration::from_secs(20);

fn boot() -> Guest {
    let kernel = lab::uml::kernel().unwrap();
    let mut guest = Guest::uml(&kernel).memory_mib(256).boot().unwrap();
    // Also gives the guest a user process, which is a process of this machine too.
    guest.run("pressure 16 0").unwrap();
    guest
}

/// The living processes of a group; dead ones that nobody waited for do not count.
fn group(leader: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before the last parenthesis may hold anything.
        let fields: Vec<&str> = status.rsplit_once(')')?.1.split_whitespace().collect();
        let (state, group) = (*fields.first()?, fields.get(2)?.parse::<u32>().ok()?);
        (group == leader && state != "Z").then_some(pid)
    });
    processes.collect()
}

/// A killed process is there for a moment still.
fn assert_vanishes(leader: u32) {
    let deadline = Instant::now() + LIMIT;
    while !group(leader).is_empty() {
        assert!(Instant::now() < deadline, "still there: {:?}", group(leader));
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_dropped_guest_leaves_no_process() {
    let guest = boot();
    let leader = guest.pid();
    // The kernel, a user process of it, and the keeper.
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
        assert!(Instant::now() < deadline, "files are still there");
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
