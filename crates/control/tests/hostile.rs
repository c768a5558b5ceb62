//! Faulty, hanging and hostile clients. After each, the server must still serve others.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod fake;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use control::api::{
    FreeKind, MigrationStatus, Problem, ResolveAction, StartMigration, StartSnapshot,
};
use control::{
    BalloonControl, Client, ControlError, FreePagesMap, Limits, MAX_BODY_BYTES, Server, VmmControl,
};
use fake::{FakeBalloon, Guest, free_pages};
use page_set::PageRange;
use tempfile::TempDir;

/// Fails a hanging test; no test needs a tenth of it.
const HANG: Duration = Duration::from_secs(20);

/// Longest time until a response, regardless of other clients.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Number of hanging clients: more than the connection limit.
const CROWD: usize = 150;

/// Pages of a guest of 256 GiB. Its bitmap has 8 MiB; a socket buffers some hundred KiB.
const LARGE_PAGES: u64 = 1 << 26;

fn server(limits: Limits) -> (Server, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let balloon = Arc::new(FakeBalloon::new("web-1", Guest::Obeys));
    balloon.requests(|requests| {
        let regions = vec![PageRange::new(0, LARGE_PAGES).unwrap()];
        let free = free_pages(1, FreeKind::Snapshot);
        requests.newest = Some(FreePagesMap { regions, ..free });
    });
    let server = Server::bind_with(&dir.path().join("s"), balloon, limits).unwrap();
    (server, dir)
}

fn quick() -> Limits {
    Limits { request_timeout: Duration::from_millis(100), ..Limits::default() }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    stream
}

/// Sends bytes and returns everything received until the server closes the connection.
fn raw(path: &Path, bytes: &[u8]) -> String {
    let mut stream = connect(path);
    // The server may close the connection before it has read all.
    let _ = stream.write_all(bytes);
    until_closed(&mut stream)
}

fn until_closed(stream: &mut UnixStream) -> String {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        // Closing with unread input appears as a reset.
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the server did not close the connection: {error}"),
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn status_of(answer: &str) -> u16 {
    let code = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    code.and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no HTTP: {answer:?}"))
}

fn problem(answer: &str) -> (u16, Problem) {
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let problem = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer:?}"));
    (status_of(answer), problem)
}

fn put(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

#[track_caller]
fn still_serves(server: &Server) {
    assert_eq!(Client::connect(server.path()).unwrap().status().unwrap().name, "web-1");
}

/// Clients that send a request and then do nothing until they are dropped.
struct Crowd {
    clients: Arc<Mutex<Vec<UnixStream>>>,
}

impl Crowd {
    /// Waits until all are connected, or for `ANSWER_TIMEOUT`.
    fn connect(path: &Path, request: &'static [u8]) -> Self {
        let clients = Arc::new(Mutex::new(Vec::new()));
        let (weak, path) = (Arc::downgrade(&clients), path.to_owned());
        let thread = std::thread::spawn(move || {
            for _ in 0..CROWD {
                // Blocks while the server accepts no connection.
                let mut stream = connect(&path);
                stream.write_all(request).unwrap();
                let Some(clients) = weak.upgrade() else { return };
                clients.lock().unwrap().push(stream);
            }
        });
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < ANSWER_TIMEOUT {
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { clients }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.clients.lock().unwrap().clear();
    }
}

#[track_caller]
fn responds_quickly(path: &Path) {
    for _ in 0..5 {
        let start = Instant::now();
        let client = Client::connect(path).unwrap().with_answer_timeout(HANG);
        assert_eq!(client.status().unwrap().name, "web-1");
        client.metrics().unwrap();
        assert!(start.elapsed() < ANSWER_TIMEOUT * 2, "{:?} for two answers", start.elapsed());
    }
}

const BITMAP: &[u8] = b"GET /v1/free-pages/bitmap HTTP/1.1\r\nHost: x\r\n\r\n";

#[test]
fn bad_requests_get_a_problem_with_a_hint() {
    let (server, _dir) = server(Limits::default());
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes();
    let cases: &[(Vec<u8>, u16, &str)] = &[
        (get("/"), 404, "there is no GET /"),
        (get("/v2/status"), 404, "there is no GET /v2/status"),
        (put("/v1/status", "{}"), 405, "there is no PUT /v1/status"),
        (get("/v1/balloon?wait_ms=x"), 400, "wait_ms"),
        (get("/v1/balloon?wait_ms=-1"), 400, "wait_ms"),
        (get("/v1/balloon?wait=1"), 400, "wait"),
        (put("/v1/balloon?generation=1", "{}"), 400, "generation"),
        (put("/v1/balloon", ""), 400, "EOF"),
        (put("/v1/balloon", "{}"), 400, "target_bytes"),
        (put("/v1/balloon", "{\"target_bytes\":-1}"), 400, "-1"),
        (put("/v1/balloon", "{\"target_bytes\":1.5}"), 400, "1.5"),
        (put("/v1/balloon", "{\"target_bytes\":0,\"x\":1}"), 400, "`x`"),
        (put("/v1/balloon", "{\"target_bytes\":\"3GiB\"}"), 400, "3GiB"),
        (put("/v1/balloon", "{\"target_bytes\":18446744073709551615}"), 422, "does not fit"),
        (put("/v1/balloon", "{\"target_bytes\":18446744073709551616}"), 400, "1.8446744"),
        (put("/v1/release", "{\"mode\":\"never\"}"), 400, "never"),
        (put("/v1/release", &"[".repeat(MAX_BODY_BYTES)), 400, "expected"),
        (put("/v1/balloon", "\u{fffd}\0"), 400, "expected value"),
    ];
    for (request, status, text) in cases {
        let (seen, problem) = problem(&raw(server.path(), request));
        let shown = String::from_utf8_lossy(request).into_owned();
        assert_eq!(seen, *status, "{shown:.60}");
        assert!(problem.error.contains(text), "{shown:.60}: {problem:?}");
        assert!(!problem.hint.is_empty(), "{shown:.60}");
    }
    still_serves(&server);
}

#[test]
fn a_body_over_the_limit_is_refused_before_it_is_read() {
    let (server, _dir) = server(Limits::default());
    let huge = b"PUT /v1/balloon HTTP/1.1\r\nHost: x\r\nContent-Length: 1099511627776\r\n\r\n";
    let (status, refused) = problem(&raw(server.path(), huge));
    assert_eq!(status, 413);
    assert!(refused.error.contains("16384"), "{refused:?}");

    // A chunked body has no length; it is cut off at the limit.
    let mut stream = connect(server.path());
    let head = b"PUT /v1/balloon HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head).unwrap();
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(4096));
    for _ in 0..64 {
        if stream.write_all(chunk.as_bytes()).is_err() {
            break;
        }
    }
    let answer = until_closed(&mut stream);
    // The response is lost if the close overtakes it; only the close matters.
    assert!(answer.is_empty() || status_of(&answer) == 413, "{answer:?}");
    still_serves(&server);
}

#[test]
fn garbage_is_closed_or_refused() {
    let (server, _dir) = server(quick());
    let long_path = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000));
    let long_header = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(100_000));
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000));
    let garbage: &[&[u8]] = &[
        b"",
        b"\0",
        b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v1/status HTTP/9.9\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"PUT /v1/balloon HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"PUT /v1/balloon HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PUT /v1/balloon HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &[0xff; 65536],
        long_path.as_bytes(),
        long_header.as_bytes(),
        many_headers.as_bytes(),
    ];
    for bytes in garbage {
        let answer = raw(server.path(), bytes);
        let refused = answer.is_empty() || (400..600).contains(&status_of(&answer));
        assert!(refused, "{:.60?}: {answer}", bytes);
    }
    still_serves(&server);
}

#[test]
fn a_request_that_never_ends_is_cut_off() {
    let (server, _dir) = server(quick());
    let start = Instant::now();
    // No byte, half a head, and a head sent byte by byte.
    assert_eq!(raw(server.path(), b""), "");
    let answer = raw(server.path(), b"GET /v1/status HTTP/1.1\r\nHost:");
    assert!(answer.is_empty() || status_of(&answer) == 408, "{answer}");
    let mut stream = connect(server.path());
    stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let mut one = [0];
    while start.elapsed() < HANG && stream.write_all(b"G").is_ok() {
        match stream.read(&mut one) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => break,
        }
    }
    // Half a body.
    let half = b"PUT /v1/balloon HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{\"target";
    let (status, problem) = problem(&raw(server.path(), half));
    assert_eq!(status, 408);
    assert!(problem.error.contains("100 ms"), "{problem:?}");
    assert!(start.elapsed() < HANG / 2, "each of them ends by its timeout");
    still_serves(&server);
}

#[test]
fn idle_clients_lose_their_connections_to_others() {
    let (server, _dir) = server(Limits { connections: 2, ..quick() });
    let mut idle: Vec<_> = (0..6).map(|_| connect(server.path())).collect();
    still_serves(&server);
    for stream in &mut idle {
        assert_eq!(until_closed(stream), "");
    }
}

#[test]
fn clients_that_disconnect_leave_nothing_behind() {
    let (server, _dir) = server(Limits { connections: 2, ..Limits::default() });
    for request in [&b""[..], b"GET /v1", b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"] {
        for _ in 0..20 {
            let mut stream = connect(server.path());
            stream.write_all(request).unwrap();
        }
        // Half-closed: the client sends no more but reads.
        let mut stream = connect(server.path());
        stream.write_all(request).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        until_closed(&mut stream);
    }
    still_serves(&server);
}

#[test]
fn one_connection_carries_one_request() {
    let (server, _dir) = server(Limits::default());
    let twice = b"GET /v1/release HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
    let answer = raw(server.path(), &twice);
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 1, "{answer}");
    assert!(answer.to_ascii_lowercase().contains("connection: close"), "{answer}");
}

#[test]
fn clients_that_do_not_read_do_not_delay_others() {
    let (server, _dir) = server(Limits::default());
    let _crowd = Crowd::connect(server.path(), BITMAP);
    responds_quickly(server.path());
    // Another large response is served too: clients past their minimum time are closed.
    let client = Client::connect(server.path()).unwrap().with_answer_timeout(HANG);
    let start = Instant::now();
    let mut bitmap = Vec::new();
    while let Err(error) = client.free_pages_bitmap(&mut bitmap) {
        let ControlError::Answered { status: 503, hint, .. } = error else { panic!("{error:?}") };
        assert!(hint.contains("later"), "{hint}");
        assert!(start.elapsed() < HANG);
    }
    assert_eq!(bitmap.len() as u64, LARGE_PAGES / 8);
}

#[test]
fn clients_that_send_little_or_nothing_do_not_delay_others() {
    let (server, _dir) = server(Limits::default());
    let half_body = b"PUT /v1/balloon HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{\"target";
    for request in [&b""[..], b"G", b"GET /v1/status HTTP/1.1\r\nHost:", half_body] {
        let _crowd = Crowd::connect(server.path(), request);
        responds_quickly(server.path());
    }
}

#[test]
fn a_client_has_bounded_time_to_read_its_response() {
    let limits = Limits {
        stall_timeout: Duration::from_millis(200),
        answer_timeout: Duration::from_millis(600),
        ..Limits::default()
    };
    let (server, _dir) = server(limits);
    // One client reads nothing, the other reads a little repeatedly.
    for (bytes, why) in [(0, "silent"), (4096, "slow")] {
        let mut stream = connect(server.path());
        stream.write_all(BITMAP).unwrap();
        let start = Instant::now();
        let mut taken = 0;
        while start.elapsed() < limits.answer_timeout * 2 {
            let mut piece = vec![0; bytes];
            taken += stream.read(&mut piece).unwrap_or(0);
            std::thread::sleep(Duration::from_millis(20));
        }
        taken += until_closed(&mut stream).len();
        assert!((taken as u64) < LARGE_PAGES / 8, "{why}: {taken}");
    }
    still_serves(&server);
}

#[test]
fn only_the_first_of_ten_thousand_pipelined_requests_is_served() {
    let (server, _dir) = server(Limits::default());
    let many = b"GET /v1/release HTTP/1.1\r\nHost: x\r\n\r\n".repeat(10_000);
    let answer = raw(server.path(), &many);
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 1, "{answer:.500}");
    still_serves(&server);
}

#[test]
fn one_process_cannot_use_all_waiter_slots() {
    let dir = tempfile::tempdir().unwrap();
    let balloon = Arc::new(FakeBalloon::new("web-1", Guest::Waits));
    let limits = Limits { waiters: 4, waiters_each: 2, ..Limits::default() };
    let server =
        Server::bind_with(&dir.path().join("s"), Arc::clone(&balloon) as _, limits).unwrap();
    let wait = b"GET /v1/balloon?generation=1&wait_ms=60000 HTTP/1.1\r\nHost: x\r\n\r\n";
    let _waiting: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = connect(server.path());
            stream.write_all(wait).unwrap();
            stream
        })
        .collect();
    balloon.until_waits(2);
    let (status, problem) = problem(&raw(server.path(), wait));
    assert_eq!(status, 503);
    let expected = format!("process {} already has 2 requests that wait", std::process::id());
    assert!(problem.error.contains(&expected), "{problem:?}");
    responds_quickly(server.path());
}

const RESOLVE: &[u8] =
    b"POST /v1/migration/resolve HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n\
    {\"action\":\"ask\"}";

/// A VMM whose peer never responds.
struct SilentVmm {
    balloon: Arc<FakeBalloon>,
    asked: Mutex<usize>,
    over: Mutex<bool>,
    ended: Condvar,
}

impl SilentVmm {
    fn wait(&self) -> Result<MigrationStatus, ControlError> {
        *self.asked.lock().unwrap() += 1;
        let over = self.ended.wait_while(self.over.lock().unwrap(), |over| !*over);
        drop(over.unwrap());
        Ok(MigrationStatus::default())
    }
}

impl VmmControl for SilentVmm {
    fn balloon(&self) -> Option<Arc<dyn BalloonControl>> {
        Some(Arc::clone(&self.balloon) as _)
    }

    fn start_migration(&self, _: &StartMigration) -> Result<MigrationStatus, ControlError> {
        self.wait()
    }

    fn start_snapshot(&self, _: &StartSnapshot) -> Result<MigrationStatus, ControlError> {
        self.wait()
    }

    fn migration(&self) -> MigrationStatus {
        MigrationStatus::default()
    }

    fn cancel_migration(&self) -> Result<MigrationStatus, ControlError> {
        Ok(MigrationStatus::default())
    }

    fn resolve_migration(&self, _: ResolveAction) -> Result<MigrationStatus, ControlError> {
        self.wait()
    }
}

#[test]
fn a_peer_that_does_not_respond_does_not_delay_other_clients() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = Arc::new(SilentVmm {
        balloon: Arc::new(FakeBalloon::new("web-1", Guest::Obeys)),
        asked: Mutex::new(0),
        over: Mutex::new(false),
        ended: Condvar::new(),
    });
    let path = dir.path().join("s");
    let server = Server::bind_vmm(&path, Arc::clone(&vmm) as _).unwrap();
    // Some clients stay and some disconnect; the threads that work for them all stay.
    for _ in 0..2 {
        drop(Crowd::connect(server.path(), RESOLVE));
        let _crowd = Crowd::connect(server.path(), RESOLVE);
        responds_quickly(server.path());
        assert!(Client::connect(server.path()).unwrap().cancel_migration().is_ok());
    }
    assert_eq!(*vmm.asked.lock().unwrap(), Limits::default().migrations);
    *vmm.over.lock().unwrap() = true;
    vmm.ended.notify_all();
}
