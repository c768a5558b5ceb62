//! Live migration of guests, from one `aerostat` process to another and back.
//!
//! `aerostat-lab soak --migrate 50 --faults 120` does a longer run of the same cases.

mod hostile;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bench::soak::moves::proxy::{Fault, FaultKind, Proxy, Stage};
use bench::soak::moves::{self, CaseReport, MigratingGuest, RunConfig};
use control::Client;
use control::api::{MigrationPhase, MigrationState, MigrationStatus, MigrationSummary};
use lab::Guest;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use crate::kvm::{
    INITRAMFS, MIB, MODULES, OURS, STOCK, VMLINUX, VMLINUZ, builder, inside_of_a_kvm_with, load,
    number, run, signal, verify,
};
use crate::program::{outcome, program};

/// Memory of the guest, balloon target, and size of a file in guest memory, in MiB.
const MEMORY_MIB: u64 = 256;
const INFLATED_MIB: u64 = 64;
const KEPT_MIB: u64 = 32;

/// Part of free memory that is then touched, in MiB.
const TOUCHED_MIB: u64 = 64;

/// Memory that the guest allocates, writes and frees all the time while it migrates.
const BUSY_MIB: u64 = 4;

/// Guests with memory at a time: source and destination.
const GUESTS: u64 = 2;

/// Migrations with guest commands on the way, by kind and number: to shared memory, compressed,
/// during a deflate; to huge pages; of a throttled guest.
const MOVES: [(&str, usize); 3] = [("own-cleared", 1), ("no-driver", 2), ("stock-busy", 0)];

/// Case of the random faults.
const FAULTS: (&str, usize) = ("own", 2);

/// Environment variable: seed of the faults, random by default.
const SEED: &str = "AEROSTAT_E2E_SEED";

/// Timeout for SIGTERM during a migration with a silent peer: much less than the keepalive timeout
/// of 20 s.
const PROMPT: Duration = Duration::from_secs(8);

/// Timeout for another process to listen.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn guests_live_migrate_to_another_process_and_back() {
    let seed = std::env::var_os(SEED);
    let variables: Vec<_> = seed.iter().map(|seed| (SEED, seed.as_os_str())).collect();
    inside_of_a_kvm_with("kvm_move::inside", GUESTS * MEMORY_MIB, &variables);
}

#[test]
#[ignore = "another test runs it on a KVM"]
fn inside() {
    assert!(std::env::var_os(VMLINUZ).is_some(), "another test runs this on a machine with a KVM");
    // Connections need it, and a machine that just booted has it down. Where it is up, this may be
    // forbidden.
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    let start = Instant::now();
    for driver in [OURS, STOCK] {
        migrates_there_and_back(driver);
        println!("{driver} after {:.1?}", start.elapsed());
    }
    let mut run_config = run_config();
    let directory = tempfile::tempdir().unwrap();
    run_config.boot_once(moves::MEMORY_MIB, directory.path().join("booted")).unwrap();
    println!("booted after {:.1?}", start.elapsed());
    for (name, number) in MOVES {
        let case = moves::Case::named(name).unwrap();
        all_well(&moves::endure(&run_config, case, number..number + 1, &mut |line| {
            println!("{line}")
        }));
        println!("{name} after {:.1?}", start.elapsed());
    }
    ends_promptly_during_a_migration(&run_config);
    println!("ended after {:.1?}", start.elapsed());
    survives_random_faults(&run_config);
    println!("faults after {:.1?}", start.elapsed());
}

fn run_config() -> RunConfig {
    let path = |variable: &str| PathBuf::from(std::env::var_os(variable).unwrap());
    let modules = std::env::var(MODULES).unwrap();
    RunConfig {
        program: program().into(),
        kernel: path(VMLINUX),
        initramfs: path(INITRAMFS),
        modules: modules.split_whitespace().map(str::to_owned).collect(),
        booted: None,
    }
}

fn all_well(report: &CaseReport) {
    assert_eq!(report.problems(), Vec::<String>::new());
    println!("{} commands answered on the way, {} lost", report.answered, report.unheard);
}

/// Injects some random faults, without those that take a whole keepalive timeout.
fn survives_random_faults(run_config: &RunConfig) {
    let (name, count) = FAULTS;
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(bench::soak::any_seed);
    println!("{SEED}={seed}");
    let chosen = moves::faults(seed).into_iter().filter(|fault| fault.kind != FaultKind::Stall);
    let case = moves::Case::named(name).unwrap();
    let chosen = chosen.take(count).collect();
    all_well(&moves::fail_at(run_config, case, chosen, &mut |line| println!("{line}")));
}

/// SIGTERM while the source waits for a silent destination.
fn ends_promptly_during_a_migration(run_config: &RunConfig) {
    let mut migrating_guest =
        MigratingGuest::boot(run_config, moves::CASES[0], moves::MEMORY_MIB).unwrap();
    let receiver = migrating_guest.receiver(&[]).unwrap();
    hostile::sources_get_nothing(&receiver);
    let fault = Fault { stage: Stage::RoundDone, later: 0, kind: FaultKind::Stall, seed: 0 };
    let proxy = Proxy::start(&receiver.address, Some(fault), Box::new(|_| {})).unwrap();
    let migrate = migrating_guest.start_migrate(&proxy.address, &[]).unwrap();
    let end = Instant::now() + ANSWER_TIMEOUT;
    while !proxy.has_fired() {
        assert!(Instant::now() < end, "{:?}", migrate.end());
        std::thread::sleep(Duration::from_millis(20));
    }
    let signalled = Instant::now();
    signal(&migrating_guest.guest, "TERM");
    assert!(
        migrating_guest.guest.wait().unwrap().success(),
        "{}",
        migrating_guest.guest.console_log()
    );
    assert!(signalled.elapsed() < PROMPT, "{:?}", signalled.elapsed());
    // The client received the error, or lost its connection.
    let said = migrate.end().unwrap();
    assert!(matches!(said.code, Some(1 | 3)), "{said:?}");
    // The destination now sees the disconnect, and waits for the next guest.
    drop(proxy);
    while receiver.state() != Some(MigrationState::Waiting) {
        assert!(Instant::now() < end, "{:?}", receiver.state());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A proxy that loses the commit: the source sees the prepared destination, and nothing that it
/// sends after that arrives.
pub(crate) fn loses_the_commit(to: &str) -> Proxy {
    let fault = Fault { stage: Stage::Commit, later: 0, kind: FaultKind::Cut, seed: 0 };
    Proxy::start(to, Some(fault), Box::new(|_| {})).unwrap()
}

fn migrates_there_and_back(driver: &str) {
    // Free page reporting would release pages too.
    let first = builder(driver, VMLINUX).machine_arguments(["--without", "reporting"]);
    let mut first = first.memory_mib(MEMORY_MIB).boot().unwrap();
    load(&mut first, driver);
    run(&mut first, &format!("fill kept {KEPT_MIB} 1"));
    balloon(driver, INFLATED_MIB);
    // The stock driver allocates the pages that it hints. If an emulated KVM has to allocate them
    // first, that may take longer than a migration waits.
    run(&mut first, &format!("touch {TOUCHED_MIB}"));
    let text = migrate_fails(driver, "127.0.0.1:1", &[]);
    assert!(text.contains("still runs here"), "{text}");
    run(&mut first, &format!("busy {BUSY_MIB}"));

    // The name is in use until the guest has migrated.
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control").into_os_string().into_string().unwrap();
    let (mut second, address) = receiver(driver, &["--plain", "--control", &control]);
    if driver == OURS {
        continues_after_a_cancelled_migration(driver, &address);
    }
    let summary = migrate(driver, &address, &["--plain"]);
    assert!(first.wait().unwrap().success(), "{}", first.console_log());
    run(&mut second, "idle");
    verify(&mut second, "kept", KEPT_MIB, 1);
    skips_free_memory(&summary, INFLATED_MIB);

    // Ballooned memory is the guest's again, and usable.
    balloon(&control, 0);
    all_memory_is_usable(&mut second);

    if driver == STOCK {
        return resolved_at_the_destination(second, &control);
    }
    let tls = certificates(directory.path());
    let tls = tls.each_ref().map(String::as_str);
    let (mut third, address) = receiver(driver, &tls);
    let address = address.replace("127.0.0.1", "localhost");
    let summary = migrate(&control, &address, &[&tls[..], &["--drop-caches"]].concat());
    assert!(second.wait().unwrap().success(), "{}", second.console_log());
    verify(&mut third, "kept", KEPT_MIB, 1);
    skips_free_memory(&summary, 0);
    resolved_at_the_source(third, driver, &control);
}

/// Ctrl-C cancels; the destination waits for the next migration.
fn continues_after_a_cancelled_migration(guest: &str, to: &str) {
    let mut command = Command::new(program());
    command.args(["migrate", guest, to, "--plain", "--bandwidth", "1MiB"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let end = Instant::now() + ANSWER_TIMEOUT;
    while client(guest).migration().unwrap().phase != Some(MigrationPhase::Round) {
        assert!(Instant::now() < end, "{:?}", client(guest).migration());
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut kill = Command::new("kill");
    assert!(kill.args(["-s", "INT", &child.id().to_string()]).status().unwrap().success());
    let (code, out, err) = outcome(&child.wait_with_output().unwrap());
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(err.contains("still runs here: cancelled"), "{err}");
}

/// The commit is lost, and the source asks the destination for the outcome.
fn resolved_at_the_source(mut third: Guest, name: &str, control: &str) {
    let (mut fourth, address) = receiver(name, &["--plain", "--control", control]);
    let network = loses_the_commit(&address);
    leave_in_doubt(&third, name, control, &network.address);
    // The source only a source can ask a process that has no answer.
    let text = resolve(control, &[]).unwrap_err();
    assert!(text.contains("only a source can ask"), "{text}");
    let text = resolve(name, &[]).unwrap();
    assert!(text.contains("runs on the other side"), "{text}");
    assert!(third.wait().unwrap().success(), "{}", third.console_log());
    continues(&mut fourth, control);
    assert!(fourth.power_off().unwrap().success());
}

/// The commit is lost. Once the operator keeps the guest at the source, once at the destination.
fn resolved_at_the_destination(mut second: Guest, control: &str) {
    let (mut third, address) = receiver(STOCK, &["--plain"]);
    let network = loses_the_commit(&address);
    leave_in_doubt(&second, control, STOCK, &network.address);
    let text = resolve(STOCK, &["--discard"]).unwrap();
    assert!(text.contains("is discarded"), "{text}");
    // The source may be dead: whether it asks or not, the next migration is accepted.
    until_it_waits(STOCK);
    let text = resolve(control, &[]).unwrap();
    assert!(text.contains("runs here"), "{text}");
    verify(&mut second, "kept", KEPT_MIB, 1);
    // Also the hinted pages.
    all_memory_is_usable(&mut second);

    let network = loses_the_commit(&address);
    leave_in_doubt(&second, control, STOCK, &network.address);
    drop(second);
    let text = resolve(STOCK, &["--run-here"]).unwrap();
    assert!(text.contains("runs here"), "{text}");
    continues(&mut third, STOCK);
    assert!(third.power_off().unwrap().success());
}

/// Waits until the destination waits for a guest again.
fn until_it_waits(name: &str) {
    let end = Instant::now() + ANSWER_TIMEOUT;
    while state(name) != MigrationState::Waiting {
        assert!(Instant::now() < end, "{:?}", client(name).migration());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A guest that was in doubt works like any other.
fn continues(guest: &mut Guest, name: &str) {
    verify(guest, "kept", KEPT_MIB, 1);
    all_memory_is_usable(guest);
    assert_eq!(state(name), MigrationState::Arrived);
    let faults = client(name).status().unwrap().faults;
    assert_eq!(faults.total(), 0, "{faults:?}");
}

/// Arguments for a certificate of this host, its key and the authority.
pub(crate) fn certificates(directory: &Path) -> [String; 6] {
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        std::fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    [
        "--tls-ca".into(),
        write("ca.pem", authority.pem()),
        "--tls-cert".into(),
        write("host.pem", certificate.pem()),
        "--tls-key".into(),
        write("host.key", key.serialize_pem()),
    ]
}

/// Leaves a migration in doubt: the guest is paused on both sides, and SIGUSR2 does not resume it.
pub(crate) fn leave_in_doubt(guest: &Guest, from: &str, there: &str, to: &str) {
    let text = migrate_fails(from, to, &["--connections", "1"]);
    assert!(text.contains("in doubt") && text.contains("aerostat resolve"), "{text}");
    assert_eq!(state(from), MigrationState::InDoubt);
    let end = Instant::now() + ANSWER_TIMEOUT;
    while state(there) != MigrationState::InDoubt {
        assert!(Instant::now() < end, "{:?}", client(there).migration());
        std::thread::sleep(Duration::from_millis(20));
    }
    signal(guest, "USR2");
    while !guest.console_log().contains("cannot pause or resume") {
        assert!(Instant::now() < end, "{}", guest.console_log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Fills free memory, which is most of it.
fn all_memory_is_usable(guest: &mut Guest) {
    let free_mib = number(guest, "free-mib");
    assert!(free_mib > MEMORY_MIB / 3, "{free_mib} MiB");
    let all_mib = free_mib - MEMORY_MIB / 8;
    run(guest, &format!("fill all {all_mib} 2"));
    verify(guest, "all", all_mib, 2);
    run(guest, "drop all");
}

/// Starts `aerostat receive` for a guest of this name. Returns it and its address.
pub(crate) fn receiver(name: &str, arguments: &[&str]) -> (Guest, String) {
    let words = ["--name", name, "--listen", "127.0.0.1:0"];
    let words = words.iter().chain(arguments).copied();
    let receiver = Guest::receiver(program()).machine_arguments(words).boot().unwrap();
    let end = Instant::now() + ANSWER_TIMEOUT;
    loop {
        let log = receiver.console_log();
        let lines = log.lines().find_map(|line| line.split_once(": listening on "));
        if let Some((_, address)) = lines {
            return (receiver, address.to_owned());
        }
        assert!(Instant::now() < end, "{log}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn migrate(guest: &str, to: &str, arguments: &[&str]) -> MigrationSummary {
    let mut command = Command::new(program());
    command.args(["migrate", guest, to, "--json"]).args(arguments);
    let (code, out, err) = outcome(&command.output().unwrap());
    assert_eq!(code, Some(0), "{out}{err}");
    println!("{out}");
    let status: MigrationStatus = serde_json::from_str(&out).unwrap();
    assert_eq!(status.state, MigrationState::Moved);
    status.summary.unwrap()
}

fn migrate_fails(guest: &str, to: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program());
    command.args(["migrate", guest, to, "--plain"]).args(arguments);
    let (code, out, err) = outcome(&command.output().unwrap());
    assert_eq!(code, Some(1), "{out}{err}");
    err
}

/// Runs `aerostat resolve`. Returns the text of its success or failure.
pub(crate) fn resolve(guest: &str, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program());
    let (code, out, err) =
        outcome(&command.args(["resolve", guest]).args(arguments).output().unwrap());
    match code {
        Some(0) => Ok(out),
        Some(1) => Err(err),
        _ => panic!("{code:?} {out}{err}"),
    }
}

fn state(guest: &str) -> MigrationState {
    client(guest).migration().unwrap().state
}

/// Connects to a guest by its name or socket.
fn client(guest: &str) -> Client {
    if guest.contains('/') {
        return Client::connect(Path::new(guest)).unwrap();
    }
    Client::connect(&control::socket_path(&guest.parse().unwrap()).unwrap()).unwrap()
}

/// Free and ballooned memory was not sent, except free blocks too small for the driver to report.
fn skips_free_memory(summary: &MigrationSummary, balloon_mib: u64) {
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
    let (code, out, err) = outcome(&output);
    assert_eq!(code, Some(0), "{out}{err}");
    let status = client(guest).status().unwrap();
    assert_eq!(status.balloon.actual_bytes, target_mib * MIB);
}
