//! The VMM with a guest that needs no Linux and boots in milliseconds (`testing/guest/bare`).
//!
//! It runs on KVMs that boot no Linux guest. On a machine without any usable KVM, each test runs in
//! an emulated machine with KVM instead, and prints so.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use control::Client;
use lab::bare::{self, BareBuilder, BareGuest};
use lab::kvm::KvmMachine;

use crate::program::{outcome, program};

/// Timeout of a test in an emulated machine.
const LIMIT: Duration = Duration::from_secs(300);

/// Memory of all guests of one test, in MiB.
const GUESTS_MIB: u64 = 256;

/// Environment variable that is set in the emulated machine.
const INSIDE: &str = "AEROSTAT_TEST_BARE_INSIDE";

/// Runs a test of bare guests with KVM: `body` on this machine if its KVM works, else the whole
/// test `name` (`module::function`) in an emulated machine.
pub(crate) fn on_a_kvm(name: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() || runs_here() {
        return body();
    }
    println!("{name}: this machine's KVM runs no bare guest; running in an emulated machine");
    let mut machine = KvmMachine::boot(GUESTS_MIB).unwrap();
    let kernel = bare::kernel().unwrap();
    let variables = [
        (INSIDE, OsStr::new("1")),
        (bare::KERNEL_VARIABLE, kernel.as_os_str()),
        ("AEROSTAT_PROGRAM", program().as_os_str()),
    ];
    let words = ["--exact", name, "--nocapture"].map(OsStr::new);
    let this = std::env::current_exe().unwrap();
    let outcome = machine.run(&this, &words, &variables, LIMIT);
    let outcome = outcome.unwrap_or_else(|error| panic!("{error}\n{}", machine.console_log()));
    let text = outcome.lines.join("\n");
    assert_eq!(outcome.code, Some(0), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

/// Whether this machine's KVM boots a bare guest. Probed once.
fn runs_here() -> bool {
    static RUNS: OnceLock<bool> = OnceLock::new();
    *RUNS.get_or_init(|| {
        // If KVM exists, a boot that fails for another reason would fail every test too.
        Path::new("/dev/kvm").exists()
            && BareBuilder::run(program(), "probe").unwrap().boot().is_ok()
    })
}

/// A booted guest.
pub(crate) fn boot(name: &str) -> BareGuest {
    builder(name).boot().unwrap_or_else(|error| panic!("{error}"))
}

/// A builder of a guest with this name.
pub(crate) fn builder(name: &str) -> BareBuilder {
    BareBuilder::run(program(), name).unwrap()
}

/// Starts `aerostat receive` with its own control directory. Returns it and its address.
pub(crate) fn receiver(name: &str, words: &[&str]) -> (BareGuest, String) {
    let receiver = BareBuilder::command(program(), "receive", name).unwrap();
    let receiver = receiver.arguments(["--listen", "127.0.0.1:0", "--plain"]);
    let mut receiver = receiver.arguments(words.iter().copied()).start().unwrap();
    let address = receiver.wait_for_error("the address", |text| {
        let line = text.lines().find(|line| line.contains("127.0.0.1:"))?;
        let start = line.find("127.0.0.1:")?;
        Some(line[start..].split_whitespace().next()?.trim_end_matches([',', ';', '.']).to_owned())
    });
    let address = address.unwrap_or_else(|error| panic!("{error}"));
    (receiver, address)
}

/// Runs an `aerostat` command on a guest. Returns exit code, standard output, standard error.
pub(crate) fn aerostat(guest: &BareGuest, words: &[&str]) -> (Option<i32>, String, String) {
    outcome(&command(guest, words))
}

fn command(guest: &BareGuest, words: &[&str]) -> Output {
    let mut command = Command::new(program());
    command.args(words).env(bare::RUNTIME_VARIABLE, guest.directory());
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command.output().unwrap()
}

/// Connects to the control socket of a guest.
pub(crate) fn client(guest: &BareGuest, name: &str) -> Client {
    Client::connect(&guest.directory().join(format!("{name}.sock"))).unwrap()
}

#[test]
fn a_bare_guest_balloons_and_migrates() {
    on_a_kvm("bare::a_bare_guest_balloons_and_migrates", || {
        let mut guest = boot("moves");
        guest.run("fill 8 8 1").unwrap();
        guest.run("follow 1").unwrap();
        let (code, out, err) = aerostat(&guest, &["balloon", "moves", "4MiB"]);
        assert_eq!(code, Some(0), "{out}{err}");
        guest.run("check 8 8 1").unwrap();
        assert_eq!(client(&guest, "moves").status().unwrap().balloon.actual_bytes, 4 << 20);
        let (mut there, address) = receiver("moves", &[]);
        let (code, out, err) = aerostat(&guest, &["migrate", "moves", &address, "--plain"]);
        assert_eq!(code, Some(0), "{out}{err}\n{}\n{}", guest.errors(), there.errors());
        there.run("check 8 8 1").unwrap();
        assert_eq!(there.number("target").unwrap(), 1024);
        assert!(guest.wait_for_end(Duration::from_secs(20)).unwrap().success());
        assert!(there.power_off().unwrap().success());
    });
}
