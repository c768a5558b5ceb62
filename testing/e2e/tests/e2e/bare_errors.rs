//! Error messages for an operator's mistakes: what was compared, both values, and a hint.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use lab::bare::{self, BareGuest};

use crate::bare::{aerostat, boot, builder, client, on_a_kvm, receiver};
use crate::kvm_move::certificates;
use crate::program::{outcome, program};

/// Timeout for the end of a process whose guest has migrated.
const LIMIT: Duration = Duration::from_secs(20);

/// Asserts that a command fails, that standard error has each of `says`, and a hint.
fn fails_with(what: &str, (code, out, err): (Option<i32>, String, String), says: &[&str]) {
    assert!(code.is_some_and(|code| code != 0), "{what}: {code:?}\n{out}{err}");
    for word in says {
        assert!(err.contains(word), "{what}: no {word:?} in\n{err}");
    }
    let hint = err.lines().find_map(|line| line.trim().strip_prefix("hint: "));
    assert!(hint.is_some_and(|hint| hint.len() > 10), "{what}: no hint in\n{err}");
}

/// Migrates `guest` to a destination that rejects it; the output of both sides has each of `says`.
fn migrate_fails_with(
    guest: &BareGuest,
    name: &str,
    there: &mut (BareGuest, String),
    says: &[&str],
) {
    let output = aerostat(guest, &["migrate", name, &there.1, "--plain"]);
    fails_with("migrate", output, says);
    for word in says {
        // The log escapes quotes.
        let is_in = |text: &str| text.replace('\\', "").contains(word).then_some(());
        let said = there.0.wait_for_error(word, is_in);
        said.unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_guest_migrates_to_another_name_with_guest_name() {
    on_a_kvm("bare_errors::a_guest_migrates_to_another_name_with_guest_name", || {
        let mut guest = boot("a");
        guest.run("fill 8 4 1").unwrap();
        let says = ["\"a\"", "\"b\"", "--name a", "--guest-name a"];
        migrate_fails_with(&guest, "a", &mut receiver("b", &[]), &says);
        // It has its new name everywhere, and migrates on under it.
        let (mut there, address) = receiver("b", &["--guest-name", "a"]);
        let (code, out, err) = aerostat(&guest, &["migrate", "a", &address, "--plain"]);
        assert_eq!(code, Some(0), "{out}{err}\n{}", there.errors());
        there.run("check 8 4 1").unwrap();
        assert_eq!(client(&there, "b").status().unwrap().name, "b");
        assert!(!there.directory().join("a.sock").exists());
        migrate_fails_with(
            &there,
            "b",
            &mut receiver("a", &[]),
            &["\"a\"", "\"b\"", "--guest-name b"],
        );
        let (mut last, address) = receiver("a", &["--guest-name", "b"]);
        let (code, out, err) = aerostat(&there, &["migrate", "b", &address, "--plain"]);
        assert_eq!(code, Some(0), "{out}{err}\n{}", last.errors());
        last.run("check 8 4 1").unwrap();
        assert!(guest.wait_for_end(LIMIT).unwrap().success());
        assert!(there.wait_for_end(LIMIT).unwrap().success());
        assert!(last.power_off().unwrap().success());
    });
}

#[test]
fn a_failed_migration_reports_its_reason() {
    on_a_kvm("bare_errors::a_failed_migration_reports_its_reason", || {
        let guest = builder("a").argument("--cpus").argument("2").boot().unwrap();
        let limits: [(&[&str], &[&str]); 2] = [
            (&["--max-memory", "16MiB"], &["32 MiB", "the limit is 16 MiB", "--max-memory"]),
            (&["--max-cpus", "1"], &["2 vCPUs", "at most 1", "--max-cpus"]),
        ];
        for (words, says) in limits {
            migrate_fails_with(&guest, "a", &mut receiver("a", words), says);
        }
        let directory = tempfile::tempdir().unwrap();
        let tls = certificates(directory.path());
        let tls: Vec<&str> = tls.iter().map(String::as_str).collect();
        let missing = ["--tls-ca", tls[1], "--tls-cert", "/no/cert", "--tls-key", tls[5]];
        let (plain, address) = receiver("a", &[]);
        let port = address.rsplit_once(':').unwrap().1;
        let address = format!("localhost:{port}");
        for (to, words, says) in [
            ("127.0.0.1:1", &["--plain"][..], &["127.0.0.1:1", "refused", "aerostat receive"][..]),
            ("localhost", &["--plain"], &["localhost", "HOST:PORT"]),
            ("nowhere.invalid:1", &["--plain"], &["nowhere.invalid:1", "cannot resolve"]),
            ("192.0.2.1:7000", &["--plain"], &["192.0.2.1", "--plain", "--tls-cert"]),
            (&address, &missing, &["/no/cert", "No such file", "PEM"]),
            (&address, &tls, &[&format!("127.0.0.1:{port}"), "--plain"]),
        ] {
            let output = aerostat(&guest, &[&["migrate", "a", to], words].concat());
            fails_with(to, output, says);
        }
        let words = ["receive", "--name", "c", "--plain", "--listen"];
        let taken = aerostat(&guest, &[&words[..], &[&format!("127.0.0.1:{port}")]].concat());
        fails_with("a port that is taken", taken, &[&format!("127.0.0.1:{port}"), "in use"]);
        drop(plain);
        assert!(guest.power_off().unwrap().success());
    });
}

#[test]
fn an_invalid_snapshot_reports_its_reason() {
    on_a_kvm("bare_errors::an_invalid_snapshot_reports_its_reason", || {
        let mut guest = boot("a");
        guest.run("fill 8 4 1").unwrap();
        let path =
            |name: &str| guest.directory().join(name).into_os_string().into_string().unwrap();
        let (good, other) = (path("good"), path("other"));
        let written = aerostat(&guest, &["snapshot", "a", &good]);
        assert_eq!(written.0, Some(0), "{}", written.2);
        fails_with("it exists", aerostat(&guest, &["snapshot", "a", &good]), &[&good, "exists"]);
        let nowhere = path("no/such/file");
        let refused = aerostat(&guest, &["snapshot", "a", &nowhere]);
        fails_with("no directory", refused, &[&path("no/such"), "No such file"]);
        fails_with("a disk", aerostat(&guest, &["restore", &nowhere, "--name", "b"]), &[&nowhere]);
        let bytes = std::fs::read(&good).unwrap();
        let len = bytes.len();
        let mut newer = bytes.clone();
        newer[8] = 7;
        let mut damaged = bytes.clone();
        damaged[4096 * (1 + 0x800) + 9] ^= 1;
        let cases: [(&[u8], &[&str]); 6] = [
            (b"", &["0 bytes", "4096"]),
            (&[b'x'; 5000], &["begins with \"xxxxxxxx\"", "\"AEROSNAP\""]),
            (&newer, &["version 7", "not 1"]),
            (&bytes[..len - 5], &[&format!("of the {len} that"), &format!("has {}", len - 5)]),
            (&[&bytes[..], b"more"].concat(), &[&format!("has {}", len + 4)]),
            (&damaged, &["the checksum of memory does not match", "another copy"]),
        ];
        for (bytes, says) in cases {
            std::fs::write(&other, bytes).unwrap();
            let output = aerostat(&guest, &["restore", &other, "--name", "b"]);
            fails_with("restore", output, &[&[other.as_str()], says].concat());
        }
        // Also a pipe whose other end is never opened.
        std::fs::remove_file(&other).unwrap();
        let made = Command::new("mkfifo").arg(&other).status().unwrap();
        assert!(made.success());
        let output = aerostat(&guest, &["restore", &other, "--name", "b"]);
        fails_with("a pipe", output, &[&other, "no regular file"]);
        assert!(guest.power_off().unwrap().success());
    });
}

#[test]
fn a_guest_that_cannot_start_reports_its_reason() {
    on_a_kvm("bare_errors::a_guest_that_cannot_start_reports_its_reason", || {
        let guest = boot("a");
        let kernel = bare::kernel().unwrap().into_os_string().into_string().unwrap();
        let path =
            |name: &str| guest.directory().join(name).into_os_string().into_string().unwrap();
        let (text, disk, socket) = (path("text"), path("disk"), path("socket"));
        std::fs::write(&text, "no kernel").unwrap();
        std::fs::write(&disk, [0; 700]).unwrap();
        let run = |memory: &str, kernel: &str, more: &[&str]| {
            let words = ["run", "--name", "b", "--memory", memory, "--kernel", kernel];
            aerostat(&guest, &[&words[..], more].concat())
        };
        for (what, output, says) in [
            ("no kernel", run("32MiB", "/no/kernel", &[]), &["/no/kernel", "No such file"][..]),
            ("a text", run("32MiB", &text, &[]), &[&text, "vmlinuz"]),
            ("a size", run("33MiB", &kernel, &[]), &["34603008", "2 MiB", "32 MiB"]),
            ("no disk", run("32MiB", &kernel, &["--disk", "/no/disk"]), &["/no/disk", "No such"]),
            ("half a disk", run("32MiB", &kernel, &["--disk", &disk]), &[&disk, "700", "512"]),
        ] {
            fails_with(what, output, says);
        }
        let words = ["run", "--name", "a", "--memory", "32MiB", "--kernel", &kernel];
        fails_with("its name", aerostat(&guest, &words), &[&path("a.sock"), "another process"]);
        let _socket = UnixListener::bind(&socket).unwrap();
        let words = [&words[..], &["--control", &socket]].concat();
        fails_with("its socket", aerostat(&guest, &words), &[&socket, "another process"]);
        fails_with("no KVM", without_kvm(guest.directory(), &words), &["/dev/kvm", "No such file"]);
        assert!(guest.power_off().unwrap().success());
    });
}

/// Runs the program with an empty `/dev`.
fn without_kvm(directory: &Path, words: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", "mount -t tmpfs none /dev && exec \"$0\" \"$@\""]);
    command.arg(program()).args(words).env(bare::RUNTIME_VARIABLE, directory);
    outcome(&command.env_remove("RUST_LOG").stdin(Stdio::null()).output().unwrap())
}
