//! Control socket and migration port of a real guest with clients that hang.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use lab::bare::{BareBuilder, BareGuest};
use rustix::process::Signal;

use crate::bare::{aerostat, boot, builder, on_a_kvm, receiver};
use crate::panics::{PANIC, signal};
use crate::program::program;

/// Number of hung clients: more than the server's connection limit.
const HUNG_CLIENTS: usize = 150;

/// Timeout of a status command, with the start of its process: the server answers an operator
/// within a second whatever other clients do.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Opens `size` connections that send `request`, or a part of one, and hang until they are dropped.
fn hang_clients(
    guest: &BareGuest,
    name: &str,
    size: usize,
    request: &str,
) -> Arc<Mutex<Vec<UnixStream>>> {
    let clients = Arc::new(Mutex::new(Vec::new()));
    let (come, request) = (Arc::downgrade(&clients), request.to_owned());
    let path = guest.directory().join(format!("{name}.sock"));
    let thread = thread::spawn(move || {
        for _ in 0..size {
            // Blocks if the server does not accept.
            let Ok(mut stream) = UnixStream::connect(&path) else { return };
            if stream.write_all(request.as_bytes()).is_err() {
                return;
            }
            let Some(clients) = come.upgrade() else { return };
            clients.lock().unwrap().push(stream);
        }
    });
    let end = Instant::now() + ANSWER_TIMEOUT;
    while !thread.is_finished() && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    clients
}

#[test]
fn hung_clients_do_not_block_the_operator() {
    on_a_kvm("bare_control::hung_clients_do_not_block_the_operator", || {
        let mut guest = boot("busy");
        guest.run("follow 1").unwrap();
        let head = |request: &str| format!("{request} HTTP/1.1\r\nHost: x\r\n");
        let body = "Content-Length: 20\r\n\r\n{\"target";
        for request in [
            String::new(),
            "G".to_owned(),
            head("GET /v1/status"),
            head("PUT /v1/balloon") + body,
            head("GET /v1/openapi.json") + "\r\n",
            head("GET /metrics") + "\r\n",
        ] {
            let hanging = hang_clients(&guest, "busy", HUNG_CLIENTS, &request);
            for _ in 0..3 {
                let start = Instant::now();
                let (code, out, err) = aerostat(&guest, &["status", "busy"]);
                assert_eq!(code, Some(0), "{request:?}: {out}{err}");
                assert!(start.elapsed() < ANSWER_TIMEOUT, "{request:?}: {:?}", start.elapsed());
            }
            drop(hanging);
        }
        assert!(guest.power_off().unwrap().success());
    });
}

#[test]
fn many_waiting_clients_do_not_block_the_operator() {
    on_a_kvm("bare_control::many_waiting_clients_do_not_block_the_operator", || {
        let mut guest = boot("waits");
        guest.run("follow 1").unwrap();
        // A generation that does not exist yet.
        let wait = "GET /v1/balloon?generation=99&wait_ms=60000 HTTP/1.1\r\nHost: x\r\n\r\n";
        let waiting = hang_clients(&guest, "waits", HUNG_CLIENTS, wait);
        let (code, out, err) = aerostat(&guest, &["balloon", "waits", "4MiB"]);
        assert_eq!(code, Some(0), "{out}{err}");
        // Connections over the limit are answered with an error.
        let mut refused = 0;
        for client in waiting.lock().unwrap().iter_mut() {
            client.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            let mut answer = Vec::new();
            let _ = client.read_to_end(&mut answer);
            refused += usize::from(answer.starts_with(b"HTTP/1.1 503"));
        }
        assert!(refused > HUNG_CLIENTS / 2 && refused < HUNG_CLIENTS, "{refused}");
        assert!(guest.power_off().unwrap().success());
    });
}

/// Unauthenticated connections of each kind. A destination handles 64 at a time.
const CONNECTIONS: usize = 100;

/// Maximum log lines about them: 20 per thread name and minute of the test.
const MOST_LINES: usize = 60;

#[test]
fn unauthenticated_connections_neither_flood_the_log_nor_block_a_migration() {
    on_a_kvm(
        "bare_control::unauthenticated_connections_neither_flood_the_log_nor_block_a_migration",
        || {
            let guest = boot("wanted");
            let (mut there, address) = receiver("wanted", &[]);
            let mut stay = Vec::new();
            for number in 0..CONNECTIONS {
                let come = |bytes: &[u8]| {
                    let mut connection = TcpStream::connect(&address).unwrap();
                    let _ = connection.write_all(bytes);
                    connection
                };
                // One closes, one sends another protocol, one sends nothing, and one sends the
                // start of a message.
                drop(come(b""));
                drop(come(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"));
                stay.push(come(b""));
                // The first bytes of a possible message.
                stay.push(come(&[u8::try_from(number).unwrap_or(0)]));
            }
            let start = Instant::now();
            let (code, out, err) = aerostat(&guest, &["migrate", "wanted", &address, "--plain"]);
            let errors = there.errors();
            assert_eq!(code, Some(0), "{out}{err}\n{errors}");
            // The timeout of one silent connection is longer than this.
            assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
            there.run("ping 7").unwrap();
            let lines =
                there.errors().lines().filter(|line| line.contains("handshake failed")).count();
            assert!((1..=MOST_LINES).contains(&lines), "{lines} lines of {}", 4 * CONNECTIONS);
            assert!(there.power_off().unwrap().success());
        },
    );
}

#[test]
fn a_restore_with_a_wrong_disk_names_the_disk_in_its_error() {
    on_a_kvm("bare_control::a_restore_with_a_wrong_disk_names_the_disk_in_its_error", || {
        let directory = tempfile::tempdir().unwrap();
        let disk = |name: &str, mib: u64| {
            let path = directory.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (had, other) = (disk("had", 4), disk("other", 8));
        let guest =
            builder("kept").arguments(["--disk", &format!("{had},readonly")]).boot().unwrap();
        let file = directory.path().join("saved").to_str().unwrap().to_owned();
        let (code, out, err) = aerostat(&guest, &["snapshot", "kept", &file]);
        assert_eq!(code, Some(0), "{out}{err}");
        assert!(guest.power_off().unwrap().success());
        let restored = BareBuilder::command(program(), "restore", "kept").unwrap();
        let mut restored =
            restored.arguments([&*file, "--disk", &format!("{other},readonly")]).start().unwrap();
        assert!(!restored.wait_for_end(Duration::from_secs(20)).unwrap().success());
        let hint = restored.wait_for_error("the hint", |text| {
            text.lines().find(|line| line.contains("hint: ")).map(str::to_owned)
        });
        let hint = hint.unwrap();
        // The snapshot file is not at fault.
        assert!(!hint.contains("give a file"), "{hint}\n{}", restored.errors());
    });
}

/// The operator can pause the guest, and save it, after a pause that panicked.
#[test]
fn a_panic_of_a_pause_does_not_lock_the_operator_out() {
    on_a_kvm("bare_control::a_panic_of_a_pause_does_not_lock_the_operator_out", || {
        let mut guest = builder("loop").variable(PANIC, "operator").boot().unwrap();
        signal(&guest, Signal::USR1);
        let panicked = |text: &str| text.contains("by a test at `operator`").then_some(());
        guest.wait_for_error("the panic", panicked).unwrap();
        assert_eq!(guest.run("ping 7").unwrap(), "7");
        signal(&guest, Signal::USR2);
        let file = guest.directory().join("saved");
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let (code, out, err) = aerostat(&guest, &["snapshot", "loop", file.to_str().unwrap()]);
            if code == Some(0) {
                break;
            }
            // The resume may still be in progress.
            assert!(err.contains("paused or resumed") && Instant::now() < end, "{out}{err}");
            thread::sleep(Duration::from_millis(20));
        }
        assert!(guest.power_off().unwrap().success());
    });
}
