//! Server and client together, with a fake balloon.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod fake;

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use control::api::{Driver, ReleaseMode};
use control::{Client, ControlError, Limits, Server};
use fake::{GUEST_BYTES, Guest, Setup, answered, setup};

const GIB: u64 = 1 << 30;
const GIB_PAGES: u32 = 1 << 18;
/// Longer than any test takes: such a wait ends by its event, not by its timeout.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn status_is_the_status_of_the_balloon() {
    let t = setup(Guest::Obeys, Limits::default());
    let status = t.client.status().unwrap();
    assert_eq!(status, control::BalloonControl::status(&*t.balloon));
    assert_eq!(status.guest.driver, Driver::Aerostat);
    assert_eq!(t.client.balloon().unwrap(), status.balloon);
}

#[test]
fn a_target_is_set_and_reached() {
    let t = setup(Guest::Obeys, Limits::default());
    let balloon = t.client.set_balloon(3 * GIB, TEST_TIMEOUT).unwrap();
    assert!(balloon.at_target);
    assert_eq!((balloon.generation, balloon.actual_bytes), (1, 3 * GIB));
    assert_eq!(balloon.last_change.unwrap().to_pages, 3 * GIB_PAGES);
    let again = t.client.set_balloon(3 * GIB, TEST_TIMEOUT).unwrap();
    assert_eq!(again.generation, 1, "the same target is not a new change");
    let all = t.client.set_balloon(GUEST_BYTES, TEST_TIMEOUT).unwrap();
    assert_eq!((all.generation, all.actual_bytes), (2, GUEST_BYTES));
}

#[test]
fn a_wait_ends_when_the_guest_reaches_the_target() {
    let t = setup(Guest::Waits, Limits::default());
    let started = t.client.set_balloon(GIB, Duration::ZERO).unwrap();
    assert!(!started.at_target);
    let start = Instant::now();
    let balloon = Arc::clone(&t.balloon);
    let guest = thread::spawn(move || {
        balloon.until_waited();
        balloon.reach(GIB_PAGES / 2);
        balloon.reach(GIB_PAGES);
    });
    let reached = t.client.wait(started.generation, TEST_TIMEOUT).unwrap();
    guest.join().unwrap();
    assert!(reached.at_target && start.elapsed() < TEST_TIMEOUT / 2);
    assert_eq!(reached.actual_pages, GIB_PAGES);
}

#[test]
fn a_wait_ends_when_a_later_target_replaces_the_change() {
    let t = setup(Guest::Waits, Limits::default());
    let first = t.client.set_balloon(GIB, Duration::ZERO).unwrap();
    thread::scope(|scope| {
        let waiting =
            scope.spawn(|| Client::connect(t.server.path()).unwrap().wait(1, TEST_TIMEOUT));
        t.balloon.until_waited();
        let second = t.client.set_balloon(2 * GIB, Duration::ZERO).unwrap();
        assert_eq!((first.generation, second.generation), (1, 2));
        let seen = waiting.join().unwrap().unwrap();
        assert_eq!((seen.generation, seen.at_target), (2, false));
    });
}

#[test]
fn a_wait_ends_at_its_timeout_and_returns_the_progress() {
    let limits = Limits { max_wait: Duration::from_millis(80), ..Limits::default() };
    let t = setup(Guest::Waits, limits);
    t.balloon.reach(7);
    let start = Instant::now();
    let balloon = t.client.set_balloon(GIB, Duration::from_millis(30)).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(30));
    assert_eq!((balloon.at_target, balloon.actual_pages), (false, 7));
    // A longer wait than the server allows.
    let start = Instant::now();
    assert!(!t.client.wait(1, TEST_TIMEOUT).unwrap().at_target);
    assert!(start.elapsed() >= Duration::from_millis(80) && start.elapsed() < TEST_TIMEOUT / 2);
}

#[test]
fn invalid_targets_are_refused_without_effect() {
    let t = setup(Guest::Obeys, Limits::default());
    let (status, error, hint) = answered(t.client.set_balloon(5 * GIB, TEST_TIMEOUT).unwrap_err());
    assert_eq!(status, 422);
    assert_eq!(error, "a balloon of 5 GiB does not fit into a guest of 4 GiB");
    assert!(hint.contains("4 GiB"), "{hint}");
    let (status, error, hint) = answered(t.client.set_balloon(4097, TEST_TIMEOUT).unwrap_err());
    assert_eq!((status, hint.as_str()), (422, "ask for 4096 bytes"));
    assert!(error.contains("4097"), "{error}");
    // A number of MiB, as QEMU uses it.
    let (status, _, hint) = answered(t.client.set_balloon(1024, TEST_TIMEOUT).unwrap_err());
    assert_eq!(status, 422);
    assert_eq!(hint, "target_bytes counts bytes, 1073741824 of them are 1GiB");
    assert_eq!(t.client.balloon().unwrap().generation, 0);

    t.balloon.edit(|status| status.balloon.max_bytes = None);
    let (status, ..) = answered(t.client.set_balloon(1 << 44, TEST_TIMEOUT).unwrap_err());
    assert_eq!(status, 422, "2^32 pages do not fit the device's 32 bits");
    assert_eq!(
        t.client.set_balloon((1 << 44) - 4096, TEST_TIMEOUT).unwrap().target_pages,
        u32::MAX
    );
    assert_eq!(t.client.set_balloon(0, TEST_TIMEOUT).unwrap().target_pages, 0);
}

#[test]
fn an_error_of_the_balloon_reaches_the_client() {
    let t = setup(Guest::Obeys, Limits::default());
    t.balloon.edit(|status| status.guest.connected = false);
    let refused = answered(t.client.set_balloon(GIB, TEST_TIMEOUT).unwrap_err());
    assert_eq!(refused, (409, "no guest is connected".into(), "start the guest".into()));
}

/// Measuring takes milliseconds per GiB, or blocks on a file system.
#[test]
fn only_the_full_status_measures_memory() {
    let t = setup(Guest::Obeys, Limits::default());
    t.client.set_release(ReleaseMode::Immediate).unwrap();
    t.client.set_stats(1000).unwrap();
    t.client.set_balloon(GIB, TEST_TIMEOUT).unwrap();
    t.client.balloon().unwrap();
    assert_eq!(t.balloon.measured(), 0);
    t.client.status().unwrap();
    assert_eq!(t.balloon.measured(), 1);
}

#[test]
fn the_release_mode_is_set() {
    let t = setup(Guest::Obeys, Limits::default());
    for mode in [ReleaseMode::Immediate, ReleaseMode::PerPage, ReleaseMode::Background] {
        assert_eq!(t.client.set_release(mode).unwrap().mode, mode);
        assert_eq!(t.client.status().unwrap().release.mode, mode);
    }
}

#[test]
fn concurrent_clients_are_all_served() {
    let t = setup(Guest::Obeys, Limits { connections: 4, ..Limits::default() });
    let all = Barrier::new(24);
    thread::scope(|scope| {
        for i in 0..24_u64 {
            let (all, path) = (&all, t.server.path());
            scope.spawn(move || {
                let client = Client::connect(path).unwrap();
                all.wait();
                for round in 0..5 {
                    client.set_balloon((i * 5 + round + 1) * 4096, TEST_TIMEOUT).unwrap();
                    assert_eq!(client.status().unwrap().name, "web-1");
                }
            });
        }
    });
    assert!(t.client.balloon().unwrap().generation >= 24);
}

#[test]
fn waiters_over_the_limit_are_refused_while_others_are_served() {
    let limits = Limits { waiters: 1, ..Limits::default() };
    let t = setup(Guest::Waits, limits);
    t.client.set_balloon(GIB, Duration::ZERO).unwrap();
    thread::scope(|scope| {
        let waiting =
            scope.spawn(|| Client::connect(t.server.path()).unwrap().wait(1, TEST_TIMEOUT));
        t.balloon.until_waited();
        let refused = answered(t.client.wait(1, TEST_TIMEOUT).unwrap_err());
        assert_eq!(refused.0, 503);
        assert!(refused.2.contains("later"), "{refused:?}");
        // A refused target changes nothing.
        assert_eq!(answered(t.client.set_balloon(2 * GIB, TEST_TIMEOUT).unwrap_err()).0, 503);
        assert_eq!(t.client.balloon().unwrap().target_bytes, GIB);
        t.balloon.reach(GIB_PAGES);
        assert!(waiting.join().unwrap().unwrap().at_target);
    });
}

#[test]
fn stopping_completes_waiting_requests_and_removes_the_socket() {
    let Setup { balloon, server, client, dir: _dir } = setup(Guest::Waits, Limits::default());
    let path = server.path().to_owned();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| client.set_balloon(GIB, TEST_TIMEOUT));
        balloon.until_waited();
        let start = Instant::now();
        server.stop();
        assert!(start.elapsed() < TEST_TIMEOUT / 2);
        assert!(!path.exists());
        assert!(!waiting.join().unwrap().unwrap().at_target);
    });
    assert!(matches!(client.status(), Err(ControlError::NotFound { .. })));
}

#[test]
fn a_panic_of_the_balloon_fails_only_that_request() {
    struct Broken;
    impl control::BalloonControl for Broken {
        fn name(&self) -> String {
            "broken".into()
        }
        fn submit(&self, _: control::GuestRequest, _: Duration) -> Result<u32, ControlError> {
            panic!("a test of a panic")
        }
        fn wait_request(
            &self,
            _: u32,
            _: Duration,
        ) -> Option<Result<control::GuestAnswer, ControlError>> {
            None
        }
        fn cancel_request(
            &self,
            _: Option<u32>,
        ) -> Result<control::api::CancelledRequest, ControlError> {
            panic!("a test of a panic")
        }
        fn free_pages(&self) -> Option<control::FreePagesMap> {
            None
        }
        fn status(&self) -> control::Status {
            panic!("a test of a panic")
        }
        fn release(&self) -> control::api::ReleaseStatus {
            panic!("a test of a panic")
        }
        fn stats(&self) -> control::api::StatsStatus {
            panic!("a test of a panic")
        }
        fn set_target(&self, _: u32) -> Result<u64, ControlError> {
            Ok(1)
        }
        fn set_release_mode(&self, _: ReleaseMode) -> Result<(), ControlError> {
            Ok(())
        }
        fn set_stats_interval(&self, _: Option<Duration>) -> Result<(), ControlError> {
            Ok(())
        }
        fn start_hints(&self) -> Result<u32, ControlError> {
            Ok(1)
        }
        fn wait_hints(&self, _: u32, _: Duration) -> control::FreePageHints {
            panic!("a test of a panic")
        }
        fn end_hints(&self, _: u32) -> Result<(), ControlError> {
            Ok(())
        }
        fn wait_change(&self, _: u64, _: Duration) -> control::api::BalloonStatus {
            control::api::BalloonStatus::from_pages(1, 1)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::bind(&dir.path().join("s"), Arc::new(Broken)).unwrap();
    let client = Client::connect(server.path()).unwrap();
    assert_eq!(answered(client.status().unwrap_err()).0, 500);
    assert_eq!(answered(client.hints(TEST_TIMEOUT).unwrap_err()).0, 500);
    assert_eq!(answered(client.cancel().unwrap_err()).0, 500);
    assert_eq!(client.balloon().unwrap().actual_pages, 1);
}

#[test]
fn the_statistics_interval_has_limits() {
    let setup = setup(Guest::Obeys, Limits::default());
    for interval_ms in [100, 86_400_000, 0, 1000] {
        assert_eq!(setup.client.set_stats(interval_ms).unwrap().interval_ms, interval_ms);
    }
    for interval_ms in [1, 99, 86_400_001, u64::MAX] {
        let (status, _, hint) = answered(setup.client.set_stats(interval_ms).unwrap_err());
        assert_eq!(status, 422);
        assert!(hint.contains("100 to 86400000"), "{hint}");
    }
    assert_eq!(setup.client.status().unwrap().stats.interval_ms, 1000, "a refusal has no effect");
}

#[test]
fn hints_are_ended_on_success_timeout_and_disconnect() {
    let answers = setup(Guest::Obeys, Limits::default());
    let hints = answers.client.hints(TEST_TIMEOUT).unwrap();
    assert_eq!((hints.id, hints.pages, hints.bytes), (1, 256, 1 << 20));
    answers.balloon.until_hints_ended(1);

    let silent = setup(Guest::Waits, Limits::default());
    let (status, error, _) = answered(silent.client.hints(Duration::from_millis(30)).unwrap_err());
    assert_eq!((status, error.as_str()), (504, "the guest did not answer within 30 ms"));
    silent.balloon.until_hints_ended(1);
    // A client that disconnects before its response.
    let path = silent.server.path();
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    let request = "POST /v1/hints?wait_ms=300 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    thread::sleep(Duration::from_millis(50));
    drop(stream);
    silent.balloon.until_hints_ended(2);
}
