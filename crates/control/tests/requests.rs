//! Requests to the guest, over the socket.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod fake;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use control::api::{
    Caches, DEFAULT_RESERVE_BYTES, FreeKind, FreePagesRequest, HoldState, ReleasedHold,
};
use control::{Client, GuestErrorKind, GuestRequest, Limits};
use fake::{Guest, Setup, answered, setup};

const GIB: u64 = 1 << 30;
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends an HTTP request; returns status and body.
fn http(path: &Path, method: &str, target: &str, body: &str) -> (u16, Vec<u8>) {
    let mut stream = UnixStream::connect(path).unwrap();
    let head = format!("{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {}", body.len());
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    (String::from_utf8_lossy(&answer[9..12]).parse().unwrap(), answer.split_off(end + 4))
}

fn snapshot() -> FreePagesRequest {
    FreePagesRequest {
        kind: FreeKind::Snapshot,
        min_block_bytes: None,
        reserve_bytes: None,
        timeout_ms: 30_000,
    }
}

#[test]
fn only_the_requested_caches_count_as_freed() {
    let t = setup(Guest::Obeys, Limits::default());
    let all = t.client.drop_caches(Caches::All, TEST_TIMEOUT).unwrap();
    assert_eq!((all.page_cache.before_bytes, all.page_cache.after_bytes), (GIB, GIB / 4));
    assert_eq!((all.page_cache.freed_bytes, all.slab.freed_bytes), (GIB / 4 * 3, 2 << 20));
    assert_eq!(all.freed_bytes, GIB / 4 * 3 + (2 << 20));
    assert!(all.elapsed_ms > all.guest_ms);
    let slab = t.client.drop_caches(Caches::Slab, TEST_TIMEOUT).unwrap();
    assert_eq!((slab.freed_bytes, slab.page_cache.freed_bytes), (2 << 20, 0));
    // All fields have defaults.
    let (status, body) = http(t.server.path(), "POST", "/v1/drop-caches", "{}");
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
}

#[test]
fn free_pages_are_requested_shown_and_released() {
    let t = setup(Guest::Obeys, Limits::default());
    let (status, error, hint) = answered(t.client.free_pages().unwrap_err());
    assert_eq!((status, error.as_str()), (404, "the guest has not reported its free pages yet"));
    assert!(hint.contains("aerostat free-pages"), "{hint}");
    let free = t.client.request_free_pages(&snapshot()).unwrap();
    assert_eq!((free.total_bytes, free.memory_bytes), (9 * GIB / 4, 4 * GIB));
    assert_eq!(free.map.cell_pages, 2048);
    let cells = &free.map.regions[0];
    assert_eq!((cells.first_page, cells.free_pages.len()), (0x100, 512));
    assert_eq!(cells.free_pages.iter().sum::<u64>() * 4096, free.total_bytes);
    assert_eq!(cells.balloon_pages[448..], [2048; 64]);
    assert_eq!(t.client.free_pages().unwrap(), free);
    let hold = FreePagesRequest { kind: FreeKind::Hold, ..snapshot() };
    assert_eq!(t.client.request_free_pages(&hold).unwrap().hold, Some(HoldState::Kept));
    let ReleasedHold { released_bytes, .. } = t.client.release_free_pages(TEST_TIMEOUT).unwrap();
    assert_eq!(released_bytes, 2 * GIB);
}

#[test]
fn free_pages_are_requested_by_hints() {
    let hint = FreePagesRequest { kind: FreeKind::Hint, ..snapshot() };
    let t = setup(Guest::Obeys, Limits::default());
    let free = t.client.request_free_pages(&hint).unwrap();
    assert_eq!((free.kind, free.total_bytes), (FreeKind::Hint, 9 * GIB / 4));
    assert_eq!(t.client.free_pages().unwrap(), free);
    t.balloon.until_hints_ended(1);

    let silent = setup(Guest::Waits, Limits::default());
    let hint = FreePagesRequest { timeout_ms: 30, ..hint };
    assert_eq!(answered(silent.client.request_free_pages(&hint).unwrap_err()).0, 504);
    silent.balloon.until_hints_ended(1);
    assert_eq!(answered(silent.client.free_pages().unwrap_err()).0, 404);
}

#[test]
fn the_bitmap_has_a_bit_per_page_and_the_picture_is_an_svg() {
    let t = setup(Guest::Obeys, Limits::default());
    let mut bits = Vec::new();
    assert_eq!(answered(t.client.free_pages_bitmap(&mut bits).unwrap_err()).0, 404);
    t.client.request_free_pages(&snapshot()).unwrap();
    let place = t.client.free_pages_bitmap(&mut bits).unwrap();
    assert_eq!((place.first_page, place.pages), (0x100, 1 << 20));
    assert_eq!(place.regions, "256+1048576");
    assert_eq!(bits.len(), (1 << 20) / 8);
    let ones: u32 = bits.iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(u64::from(ones) * 4096, 9 * GIB / 4);
    let (used, free) = bits.split_at((1 << 18) / 8);
    assert!(used.iter().all(|byte| *byte == 0));
    assert!(free[..(2 << 18) / 8].iter().all(|byte| *byte == 0xff));
    let svg = String::from_utf8(t.client.free_pages_picture().unwrap()).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
}

#[test]
fn invalid_sizes_are_refused_before_the_guest_is_asked() {
    let t = setup(Guest::Waits, Limits::default());
    for (kind, min_block_bytes, reserve_bytes) in [
        (FreeKind::Snapshot, Some(2048), None),
        (FreeKind::Snapshot, Some(12288), None),
        (FreeKind::Snapshot, Some(2 << 30), None),
        (FreeKind::Snapshot, Some(0), None),
        (FreeKind::Snapshot, None, Some(4096)),
        (FreeKind::Hold, Some(4096), None),
        (FreeKind::Hold, None, Some(1000)),
        (FreeKind::Hint, Some(4096), None),
        (FreeKind::Hint, None, Some(4096)),
    ] {
        let ask = FreePagesRequest { kind, min_block_bytes, reserve_bytes, ..snapshot() };
        assert_eq!(answered(t.client.request_free_pages(&ask).unwrap_err()).0, 422, "{ask:?}");
    }
    for body in [r#"{"what":"everything"}"#, r#"{"timeout_ms":-1}"#, r#"{"reserve_bytes":1}"#] {
        assert_eq!(http(t.server.path(), "POST", "/v1/drop-caches", body).0, 400, "{body}");
    }
    t.balloon.until_open(0);
}

#[test]
fn a_timeout_over_the_limit_is_refused_before_the_guest_is_asked() {
    let t = setup(Guest::Waits, Limits::default());
    let path = t.server.path();
    for (method, at, sent) in [
        ("POST", "/v1/drop-caches", r#"{"timeout_ms":600001}"#),
        ("POST", "/v1/free-pages", r#"{"kind":"snapshot","timeout_ms":600001}"#),
        ("POST", "/v1/free-pages", r#"{"kind":"hold","timeout_ms":18446744073709551615}"#),
        ("POST", "/v1/free-pages", r#"{"kind":"hint","timeout_ms":600001}"#),
        ("DELETE", "/v1/free-pages?timeout_ms=600001", ""),
    ] {
        let (status, body) = http(path, method, at, sent);
        let answer = String::from_utf8_lossy(&body);
        assert_eq!(status, 422, "{method} {at}: {answer}");
        assert!(answer.contains("at most 600000 ms"), "{answer}");
    }
    t.balloon.until_open(0);
}

#[test]
fn a_request_reaches_the_guest_with_its_timeout() {
    let t = setup(Guest::Waits, Limits::default());
    let asks = [
        (r#"{"kind":"snapshot","min_block_bytes":2097152,"timeout_ms":20000}"#, 20_000),
        (r#"{"kind":"hold"}"#, 30_000),
        (r#"{"kind":"hold","reserve_bytes":0,"timeout_ms":7}"#, 7),
    ];
    let expected = [
        GuestRequest::Snapshot { min_block_bytes: 2 << 20 },
        GuestRequest::Hold { reserve_bytes: DEFAULT_RESERVE_BYTES },
        GuestRequest::Hold { reserve_bytes: 0 },
    ];
    for ((body, time), expected) in asks.into_iter().zip(expected) {
        thread::scope(|scope| {
            let answer = scope.spawn(|| http(t.server.path(), "POST", "/v1/free-pages", body));
            t.balloon.until_open(1);
            let asked = t.balloon.requests(|requests| *requests.open.values().next().unwrap());
            assert_eq!(asked, (expected, Duration::from_millis(time)));
            t.balloon.requests(fake::Requests::answer);
            assert_eq!(answer.join().unwrap().0, 200);
        });
    }
}

#[test]
fn a_failed_request_returns_the_reason() {
    let t = setup(Guest::Waits, Limits::default());
    for (why, status) in [
        (GuestErrorKind::NotPossible, 409),
        (GuestErrorKind::Stopped, 409),
        (GuestErrorKind::Refused, 502),
        (GuestErrorKind::TooMany, 503),
        (GuestErrorKind::TimedOut, 504),
    ] {
        t.balloon.requests(|requests| requests.refuse = Some((why, "at once")));
        let error = t.client.drop_caches(Caches::All, TEST_TIMEOUT).unwrap_err();
        assert_eq!(answered(error), (status, "at once".into(), "do better".into()));
        let guest = Arc::clone(&t.balloon);
        let guest = thread::spawn(move || {
            guest.until_open(1);
            guest.requests(|requests| requests.fail(why, "later"));
        });
        let error = t.client.drop_caches(Caches::All, TEST_TIMEOUT).unwrap_err();
        assert_eq!(answered(error), (status, "later".into(), "look there".into()));
        guest.join().unwrap();
    }
}

#[test]
fn a_request_is_cancelled_by_an_operator_or_a_disconnect() {
    let t = setup(Guest::Waits, Limits::default());
    assert_eq!(answered(t.client.cancel().unwrap_err()).0, 409);
    thread::scope(|scope| {
        let path = t.server.path().to_owned();
        let asked = scope.spawn(move || {
            Client::connect(&path).unwrap().drop_caches(Caches::All, TEST_TIMEOUT).unwrap_err()
        });
        t.balloon.until_open(1);
        let cancelled = t.client.cancel().unwrap();
        assert_eq!((cancelled.id, cancelled.command.as_str()), (1, "drop-caches"));
        assert_eq!(answered(asked.join().unwrap()).0, 409);
    });
    // A request is cancelled when its client disconnects.
    let mut stream = UnixStream::connect(t.server.path()).unwrap();
    let head = "POST /v1/free-pages HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n";
    stream.write_all(format!("{head}{{\"kind\":\"hold\"}}").as_bytes()).unwrap();
    t.balloon.until_open(1);
    drop(stream);
    t.balloon.until_open(0);
}

#[test]
fn clients_that_wait_for_the_guest_do_not_delay_others() {
    let t = setup(Guest::Waits, Limits { waiters: 2, ..Limits::default() });
    thread::scope(|scope| {
        let path = t.server.path();
        let waiting: Vec<_> =
            (0..2).map(|_| scope.spawn(|| http(path, "POST", "/v1/drop-caches", "{}").0)).collect();
        t.balloon.until_open(2);
        let start = Instant::now();
        assert_eq!(http(path, "POST", "/v1/drop-caches", "{}").0, 503);
        assert!(t.client.status().is_ok());
        assert!(start.elapsed() < TEST_TIMEOUT / 4);
        t.balloon.requests(|requests| (0..2).for_each(|_| requests.answer()));
        assert!(waiting.into_iter().all(|thread| thread.join().unwrap() == 200));
    });
}

#[test]
fn stopping_the_server_ends_requests() {
    let t = setup(Guest::Waits, Limits::default());
    let Setup { balloon, server, client, dir: _dir } = t;
    let asked = thread::spawn(move || client.drop_caches(Caches::All, TEST_TIMEOUT));
    balloon.until_open(1);
    let start = Instant::now();
    server.stop();
    assert!(start.elapsed() < TEST_TIMEOUT / 4);
    assert!(asked.join().unwrap().is_err());
}
