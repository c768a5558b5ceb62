//! Boots a machine with KVM.

#![allow(clippy::unwrap_used)]

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};

use lab::kvm::KvmMachine;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn host_programs_run_in_a_machine_with_kvm() {
    let mut machine = KvmMachine::boot(64).unwrap();
    let mut shell = |script: &str| {
        let words = ["-c", script].map(OsStr::new);
        let variables = [("WORDS", OsStr::new("two words"))];
        machine.run(Path::new("/bin/sh"), &words, &variables, LIMIT).unwrap()
    };
    let outcome = shell("cat /sys/module/kvm_amd/parameters/npt; test -w /dev/kvm; echo $?");
    assert_eq!((outcome.lines, outcome.code), (vec!["Y".to_owned(), "0".to_owned()], Some(0)));
    let outcome = shell("echo \"$WORDS\"; echo error >&2; exit 7");
    assert_eq!(outcome.lines, ["two words", "error"]);
    assert_eq!(outcome.code, Some(7));
    assert_eq!(shell("kill -s KILL $$").code, None);
    // The host's files are read-only there, `/run` is writable.
    assert_ne!(shell("echo x > /etc/aerostat-lab").code, Some(0));
    assert_eq!(shell("echo x > /run/aerostat-lab").code, Some(0));
    let nothing = machine.run(Path::new("/none"), &[], &[], LIMIT).unwrap();
    assert_eq!(nothing.code, Some(127), "{:?}", nothing.lines);
}

/// The next interrupt recovers one that the emulator lost, so it must not depend on it.
#[test]
fn the_rtc_interrupts_the_machine_continuously() {
    let mut machine = KvmMachine::boot(64).unwrap();
    let mut interrupts = || {
        let words = ["-c", "grep rtc0 /proc/interrupts"].map(OsStr::new);
        let outcome = machine.run(Path::new("/bin/sh"), &words, &[], LIMIT).unwrap();
        let line = outcome.lines.join(" ");
        line.split_whitespace().nth(1).map(|count| count.parse::<u64>().unwrap())
    };
    // The first one could come from setting the alarm.
    let first = interrupts().expect("the line of rtc0");
    let begun = Instant::now();
    while interrupts() < Some(first + 10) {
        assert!(begun.elapsed() < LIMIT, "no interrupt after {first}");
    }
}
