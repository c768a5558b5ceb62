//! The control socket of a real guest among clients that hang, with a guest that needs no Linux.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use lab::bare::{BareBuilder, BareGuest};

use crate::bare::{aerostat, boot, builder, on_a_kvm, receiver};
use crate::program::program;

/// Clients that hang: more than the server has connections.
const CROWD: usize = 150;

/// What a command may take that asks for the status, with the start of its process: an operator is
/// answered within a second whatever others do.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Clients that have sent a request, or a part of one, and do nothing more until they are dropped.
fn crowd(guest: &BareGuest, name: &str, size: usize, request: &str) -> Arc<Mutex<Vec<UnixStream>>> {
    let clients = Arc::new(Mutex::new(Vec::new()));
    let (come, request) = (Arc::downgrade(&clients), request.to_owned());
    let path = guest.directory().join(format!("{name}.sock"));
    let thread = thread::spawn(move || {
        for _ in 0..size {
            // Blocks where the server accepts nobody.
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
fn clients_that_hang_keep_no_operator_from_a_guest() {
    on_a_kvm("bare_control::clients_that_hang_keep_no_operator_from_a_guest", || {
        let mut guest = boot("busy");
        guest.ask("follow 1").unwrap();
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
            let hanging = crowd(&guest, "busy", CROWD, &request);
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
fn a_process_that_waits_again_and_again_keeps_no_operator_from_waiting() {
    on_a_kvm(
        "bare_control::a_process_that_waits_again_and_again_keeps_no_operator_from_waiting",
        || {
            let mut guest = boot("waits");
            guest.ask("follow 1").unwrap();
            // A change that never comes.
            let wait = "GET /v1/balloon?generation=99&wait_ms=60000 HTTP/1.1\r\nHost: x\r\n\r\n";
            let waiting = crowd(&guest, "waits", CROWD, wait);
            let (code, out, err) = aerostat(&guest, &["balloon", "waits", "4MiB"]);
            assert_eq!(code, Some(0), "{out}{err}");
            // Those that found no place were told so.
            let mut refused = 0;
            for client in waiting.lock().unwrap().iter_mut() {
                client.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
                let mut answer = Vec::new();
                let _ = client.read_to_end(&mut answer);
                refused += usize::from(answer.starts_with(b"HTTP/1.1 503"));
            }
            assert!(refused > CROWD / 2 && refused < CROWD, "{refused}");
            assert!(guest.power_off().unwrap().success());
        },
    );
}

/// Strangers of each kind; a waiting destination greets 64 at a time.
const STRANGERS: usize = 100;

/// Lines about them: 20 for each name of a thread in each minute that the test may take.
const MOST_LINES: usize = 60;

#[test]
fn strangers_fill_no_log_and_keep_no_guest_away() {
    on_a_kvm("bare_control::strangers_fill_no_log_and_keep_no_guest_away", || {
        let guest = boot("wanted");
        let (mut there, address) = receiver("wanted", &[]);
        let mut stay = Vec::new();
        for number in 0..STRANGERS {
            let come = |bytes: &[u8]| {
                let mut stranger = TcpStream::connect(&address).unwrap();
                let _ = stranger.write_all(bytes);
                stranger
            };
            // One that hangs up, one that speaks something else, one that says nothing, and one
            // that begins to say something.
            drop(come(b""));
            drop(come(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"));
            stay.push(come(b""));
            // The first bytes of what could be a message.
            stay.push(come(&[u8::try_from(number).unwrap_or(0)]));
        }
        let start = Instant::now();
        let (code, out, err) = aerostat(&guest, &["migrate", "wanted", &address, "--plain"]);
        let errors = there.errors();
        assert_eq!(code, Some(0), "{out}{err}\n{errors}");
        // One silent stranger was waited for longer than this.
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
        there.ask("ping 7").unwrap();
        let lines = there.errors().lines().filter(|line| line.contains("handshake failed")).count();
        assert!((1..=MOST_LINES).contains(&lines), "{lines} lines of {}", 4 * STRANGERS);
        assert!(there.power_off().unwrap().success());
    });
}

#[test]
fn a_restore_with_another_disk_says_what_is_wrong_with_it() {
    on_a_kvm("bare_control::a_restore_with_another_disk_says_what_is_wrong_with_it", || {
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
        // The file is as good as it was.
        assert!(!hint.contains("give a file"), "{hint}\n{}", restored.errors());
    });
}
