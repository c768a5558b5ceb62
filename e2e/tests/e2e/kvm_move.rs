//! Guests of our monitor that are moved while they run, from one process to another and back.

mod proxy;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use control::Client;
use control::api::{MigrationPhase, MigrationState, MigrationStatus, MigrationSummary};
use lab::Guest;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use crate::kvm::{
    MIB, OURS, STOCK, VMLINUX, VMLINUZ, builder, inside_of_a_kvm, load, number, run, signal, verify,
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
    let text = not_moved(driver, "127.0.0.1:1", &[]);
    assert!(text.contains("runs on here"), "{text}");
    run(&mut first, &format!("busy {BUSY_MIB}"));

    // Its name is taken until the guest has left.
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control").into_os_string().into_string().unwrap();
    let (mut second, address) = receiver(driver, &["--plain", "--control", &control]);
    if driver == OURS {
        goes_on_when_it_is_cancelled(driver, &address);
    }
    let summary = moved(driver, &address, &["--plain"]);
    assert!(first.wait().unwrap().success(), "{}", first.console_log());
    run(&mut second, "idle");
    verify(&mut second, "kept", KEPT_MIB, 1);
    left_out(&summary, INFLATED_MIB);

    // What the balloon had is the guest's again, and is as good as any memory.
    balloon(&control, 0);
    all_is_usable(&mut second);

    if driver == STOCK {
        return settled_at_the_destination(second, &control);
    }
    let tls = certificates(directory.path());
    let tls = tls.each_ref().map(String::as_str);
    let (mut third, address) = receiver(driver, &tls);
    let address = address.replace("127.0.0.1", "localhost");
    let summary = moved(&control, &address, &[&tls[..], &["--drop-caches"]].concat());
    assert!(second.wait().unwrap().success(), "{}", second.console_log());
    verify(&mut third, "kept", KEPT_MIB, 1);
    left_out(&summary, 0);
    settled_at_the_source(third, driver, &control);
}

/// Ctrl-C; the destination waits for the next.
fn goes_on_when_it_is_cancelled(guest: &str, to: &str) {
    let mut command = Command::new(program());
    command.args(["migrate", guest, to, "--plain", "--bandwidth", "1MiB"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let end = Instant::now() + SOON;
    while client(guest).migration().unwrap().phase != Some(MigrationPhase::Round) {
        assert!(Instant::now() < end, "{:?}", client(guest).migration());
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut kill = Command::new("kill");
    assert!(kill.args(["-s", "INT", &child.id().to_string()]).status().unwrap().success());
    let (code, out, err) = told(&child.wait_with_output().unwrap());
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(err.contains("runs on here: cancelled"), "{err}");
}

/// The offer of the guest is lost, and the source asks for it.
fn settled_at_the_source(mut third: Guest, name: &str, control: &str) {
    let (mut fourth, address) = receiver(name, &["--plain", "--control", control]);
    in_doubt(&third, name, control, &proxy::loses_the_hand_over(&address));
    // Nobody is asked in vain.
    let text = settle(control, &[]).unwrap_err();
    assert!(text.contains("does not ask"), "{text}");
    let text = settle(name, &[]).unwrap();
    assert!(text.contains("runs on the other side"), "{text}");
    assert!(third.wait().unwrap().success(), "{}", third.console_log());
    goes_on(&mut fourth, control);
    assert!(fourth.power_off().unwrap().success());
}

/// The same, and an operator says what is true: once that the guest stays, once that it has come.
fn settled_at_the_destination(mut second: Guest, control: &str) {
    let (mut third, address) = receiver(STOCK, &["--plain"]);
    in_doubt(&second, control, STOCK, &proxy::loses_the_hand_over(&address));
    let text = settle(STOCK, &["--give-up"]).unwrap();
    assert!(text.contains("is given up"), "{text}");
    let text = settle(control, &[]).unwrap();
    assert!(text.contains("runs here"), "{text}");
    verify(&mut second, "kept", KEPT_MIB, 1);
    // Also what it had hinted.
    all_is_usable(&mut second);

    in_doubt(&second, control, STOCK, &proxy::loses_the_hand_over(&address));
    drop(second);
    let text = settle(STOCK, &["--run-here"]).unwrap();
    assert!(text.contains("runs here"), "{text}");
    goes_on(&mut third, STOCK);
    assert!(third.power_off().unwrap().success());
}

/// A guest that came after a doubt is as good as any.
fn goes_on(guest: &mut Guest, name: &str) {
    verify(guest, "kept", KEPT_MIB, 1);
    all_is_usable(guest);
    assert_eq!(state(name), MigrationState::Arrived);
    let faults = client(name).status().unwrap().faults;
    assert_eq!(faults.total(), 0, "{faults:?}");
}

/// Words that name a certificate for this host, its key and the authority.
fn certificates(directory: &Path) -> [String; 6] {
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

/// The guest stands still on both sides, whoever says that it shall go on.
fn in_doubt(guest: &Guest, from: &str, there: &str, to: &str) {
    let text = not_moved(from, to, &["--connections", "1"]);
    assert!(text.contains("nobody knows") && text.contains("aerostat settle"), "{text}");
    assert_eq!(state(from), MigrationState::InDoubt);
    let end = Instant::now() + SOON;
    while state(there) != MigrationState::InDoubt {
        assert!(Instant::now() < end, "{:?}", client(there).migration());
        std::thread::sleep(Duration::from_millis(20));
    }
    signal(guest, "USR2");
    while !guest.console_log().contains("not paused or resumed") {
        assert!(Instant::now() < end, "{}", guest.console_log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Fills what is free, and most of it is.
fn all_is_usable(guest: &mut Guest) {
    let free_mib = number(guest, "free-mib");
    assert!(free_mib > MEMORY_MIB / 3, "{free_mib} MiB");
    let all_mib = free_mib - MEMORY_MIB / 8;
    run(guest, &format!("fill all {all_mib} 2"));
    verify(guest, "all", all_mib, 2);
    run(guest, "drop all");
}

/// A process that waits for a guest of this name, and where.
pub(crate) fn receiver(name: &str, arguments: &[&str]) -> (Guest, String) {
    let words = ["--name", name, "--listen", "127.0.0.1:0"];
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

pub(crate) fn moved(guest: &str, to: &str, arguments: &[&str]) -> MigrationSummary {
    let mut command = Command::new(program());
    command.args(["migrate", guest, to, "--json"]).args(arguments);
    let (code, out, err) = told(&command.output().unwrap());
    assert_eq!(code, Some(0), "{out}{err}");
    println!("{out}");
    let status: MigrationStatus = serde_json::from_str(&out).unwrap();
    assert_eq!(status.state, MigrationState::Moved);
    status.summary.unwrap()
}

fn not_moved(guest: &str, to: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program());
    command.args(["migrate", guest, to, "--plain"]).args(arguments);
    let (code, out, err) = told(&command.output().unwrap());
    assert_eq!(code, Some(1), "{out}{err}");
    err
}

/// What is said of success, or of failure.
fn settle(guest: &str, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program());
    let (code, out, err) = told(&command.args(["settle", guest]).args(arguments).output().unwrap());
    match code {
        Some(0) => Ok(out),
        Some(1) => Err(err),
        _ => panic!("{code:?} {out}{err}"),
    }
}

fn state(guest: &str) -> MigrationState {
    client(guest).migration().unwrap().state
}

/// Of a guest by its name or its socket.
fn client(guest: &str) -> Client {
    if guest.contains('/') {
        return Client::connect(Path::new(guest)).unwrap();
    }
    Client::connect(&control::socket_path(&guest.parse().unwrap()).unwrap()).unwrap()
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
    let status = client(guest).status().unwrap();
    assert_eq!(status.balloon.actual_bytes, target_mib * MIB);
}
