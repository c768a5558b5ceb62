//! Tests that restrictions work. Each attempt runs in its own process, another instance of this
//! test program.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use rustix::net::{AddressFamily, SocketType};
use sandbox::{Network, Restricted, restrict_calls, restrict_files, restrict_vmm_calls};

/// The attempt that the process must make.
const ATTEMPT: &str = "AEROSTAT_SANDBOX_ATTEMPT";
/// The parent of a directory that it may use, and of one that it may not.
const DIRECTORY: &str = "AEROSTAT_SANDBOX_DIRECTORY";
const INSIDE: &str = "inside";
const OUTSIDE: &str = "outside";

/// Prefix of attempts under the rules for a VMM.
const VMM: &str = "vmm:";

/// The signal for a forbidden system call.
const SIGSYS: i32 = 31;

fn attempt(name: &str) -> (Output, tempfile::TempDir) {
    // Created here: a killed process cannot clean up.
    let dir = tempfile::tempdir().unwrap();
    for name in [INSIDE, OUTSIDE] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "attempts", "--nocapture", "--test-threads=1"])
        .env(ATTEMPT, name)
        .env(DIRECTORY, dir.path())
        .output()
        .unwrap();
    (output, dir)
}

fn assert_possible(name: &str) {
    let (output, _dir) = attempt(name);
    assert!(output.status.success(), "{name}: {output:?}");
}

fn assert_killed(name: &str) {
    let (output, _dir) = attempt(name);
    assert_eq!(output.status.signal(), Some(SIGSYS), "{name}: {output:?}");
}

#[test]
fn serving_is_possible() {
    for name in ["serve", "thread", "files-inside", "connect"] {
        assert_possible(name);
    }
}

#[test]
fn forbidden_calls_kill_the_process() {
    for name in ["tcp", "unix-socket", "exec", "chmod", "lock", "in-a-thread"] {
        assert_killed(name);
    }
}

#[test]
fn a_vmm_can_connect_and_use_kvm_but_not_start_programs() {
    for name in
        ["serve", "thread", "files-inside", "tcp", "resolve-host", "use-kvm", "lock", "terminal"]
    {
        assert_possible(&format!("{VMM}{name}"));
    }
    for name in ["exec", "chmod", "in-a-thread", "raw-socket", "window"] {
        assert_killed(&format!("{VMM}{name}"));
    }
}

#[test]
fn files_outside_the_directories_cannot_be_opened_created_or_removed() {
    let (output, _dir) = attempt("files-outside");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("refused") || text.contains("no Landlock here"), "{text}");
    // A kernel with Landlock must have refused.
    let has = Path::new("/sys/kernel/security/lsm");
    if std::fs::read_to_string(has).is_ok_and(|list| list.contains("landlock")) {
        assert!(text.contains("refused"), "{text}");
    }
}

/// Applies the restrictions for the attempt, and returns its name without the prefix.
fn restrict<'a>(name: &'a str, dir: &Path) -> (&'a str, Restricted) {
    if let Some(name) = name.strip_prefix(VMM) {
        restrict_vmm_calls().unwrap();
        return (name, Restricted::Not);
    }
    let restricted = restrict_files(&[dir]).unwrap();
    let connects = name == "connect";
    restrict_calls(if connects { Network::Connects } else { Network::Accepts }).unwrap();
    (name, restricted)
}

/// Locks a file like a disk.
fn lock(path: &Path) {
    let file = std::fs::File::create(path).unwrap();
    let lock = nix::libc::flock { l_type: 1, l_whence: 0, l_start: 0, l_len: 1, l_pid: 0 };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
}

/// Not a test: the body of the processes above.
#[test]
fn attempts() {
    let Ok(name) = std::env::var(ATTEMPT) else { return };
    let dir = std::env::var(DIRECTORY).unwrap();
    let [dir, outside] = [INSIDE, OUTSIDE].map(|name| Path::new(&dir).join(name));
    let dir = dir.as_path();
    let listener = UnixListener::bind(dir.join("a.sock")).unwrap();
    let (mut one, mut other) = UnixStream::pair().unwrap();
    let (start, started) = std::sync::mpsc::channel::<()>();
    // Starts before the filter, which must apply to it too.
    let early = std::thread::spawn(move || {
        started.recv().unwrap();
        let _ = std::process::Command::new("/bin/true").status();
    });
    let (name, restricted) = restrict(&name, dir);
    match name {
        "serve" => {
            one.write_all(b"x").unwrap();
            other.read_exact(&mut [0]).unwrap();
            drop(listener);
        }
        "thread" => std::thread::spawn(|| {}).join().unwrap(),
        "files-inside" => {
            std::fs::write(dir.join("a.state"), "x").unwrap();
            std::fs::remove_file(dir.join("a.sock")).unwrap();
        }
        "connect" => drop(UnixStream::connect(dir.join("a.sock")).unwrap()),
        "files-outside" if restricted == Restricted::Not => println!("no Landlock here"),
        "files-outside" => {
            let refused = |result: std::io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
            };
            refused(std::fs::read("/etc/passwd").map(drop));
            refused(std::fs::write(outside.join("new"), "x"));
            refused(std::fs::remove_file("/etc/passwd"));
            println!("refused");
        }
        "tcp" => drop(std::net::TcpStream::connect("127.0.0.1:1")),
        "unix-socket" => drop(UnixStream::connect("/a.sock")),
        "resolve-host" => {
            let found = std::net::ToSocketAddrs::to_socket_addrs(&("localhost", 1));
            assert!(found.unwrap().next().is_some());
            // Queries the name servers, if any: none resolves it.
            assert!(std::net::ToSocketAddrs::to_socket_addrs(&("no.invalid", 1)).is_err());
        }
        "lock" => lock(&dir.join("disk")),
        // Without KVM nothing is called.
        "use-kvm" => drop(kvm_ioctls::Kvm::new().map(|kvm| kvm.get_api_version())),
        "terminal" => {
            assert!(!std::io::IsTerminal::is_terminal(&std::fs::File::open("/").unwrap()))
        }
        "raw-socket" => drop(rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, None)),
        "window" => drop(rustix::termios::tcgetwinsize(std::io::stdout())),
        "exec" => drop(std::process::Command::new("/bin/true").status()),
        "chmod" => {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
            let _ = std::fs::set_permissions(dir.join("a.sock"), mode);
        }
        "in-a-thread" => {
            start.send(()).unwrap();
            let _ = early.join();
        }
        other => panic!("no attempt is called {other}"),
    }
    // The test harness would make other system calls.
    let _ = std::io::stdout().flush();
    std::process::exit(0);
}
