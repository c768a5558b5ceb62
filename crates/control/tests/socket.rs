//! The socket as a file: its permissions, and what it may replace.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod fake;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use control::{Client, ControlError, MAX_SOCKET_PATH_BYTES, Server};
use fake::{FakeBalloon, Guest};

fn bind(path: &Path) -> Result<Server, ControlError> {
    Server::bind(path, Arc::new(FakeBalloon::new("a", Guest::Obeys)))
}

#[test]
fn the_socket_is_private_and_removed_with_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = bind(&path).unwrap();
    assert_eq!(server.path(), path);
    // No call changes the mode after the bind, so it had this mode from its creation.
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    drop(server);
    assert!(!path.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "no other file is left");
}

#[test]
fn the_socket_of_an_exited_process_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    // Dropping std's listener leaves the file, as a killed process does.
    drop(UnixListener::bind(&path).unwrap());
    assert!(matches!(Client::connect(&path), Err(ControlError::Dead { .. })));
    let server = bind(&path).unwrap();
    assert_eq!(Client::connect(&path).unwrap().status().unwrap().name, "a");
    drop(server);
    assert!(matches!(Client::connect(&path), Err(ControlError::NotFound { .. })));
}

#[test]
fn the_socket_of_a_live_process_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = bind(&path).unwrap();
    let error = bind(&path).unwrap_err();
    assert!(matches!(&error, ControlError::SocketInUse { .. }), "{error:?}");
    assert!(error.hint().contains("another name"), "{}", error.hint());
    assert_eq!(Client::connect(server.path()).unwrap().status().unwrap().name, "a");
    // A live socket of another type.
    let other = dir.path().join("d");
    let _datagram = UnixDatagram::bind(&other).unwrap();
    assert!(matches!(bind(&other), Err(ControlError::SocketInUse { .. })));
}

#[test]
fn of_many_servers_starting_over_a_stale_socket_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    for _ in 0..20 {
        drop(UnixListener::bind(&path).unwrap());
        let servers: Vec<_> = thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| bind(&path))).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        let won = servers.iter().filter(|server| server.is_ok()).count();
        assert_eq!(won, 1, "{servers:?}");
        assert_eq!(Client::connect(&path).unwrap().status().unwrap().name, "a");
    }
}

#[test]
fn a_file_that_is_not_a_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    fs::write(&path, "precious").unwrap();
    assert!(matches!(bind(&path), Err(ControlError::NotASocket { .. })));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(bind(&link), Err(ControlError::NotASocket { .. })));
}

#[test]
fn a_server_removes_only_its_own_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let first = bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let second = bind(&path).unwrap();
    drop(first);
    assert_eq!(Client::connect(second.path()).unwrap().status().unwrap().name, "a");
}

#[test]
fn paths_that_cannot_be_bound_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no/s");
    let error = bind(&missing).unwrap_err();
    assert!(matches!(&error, ControlError::Io { action: "open", .. }), "{error:?}");
    let long = dir.path().join("x".repeat(MAX_SOCKET_PATH_BYTES));
    assert!(matches!(bind(&long), Err(ControlError::PathTooLong { .. })));
    let fits = MAX_SOCKET_PATH_BYTES - dir.path().as_os_str().len() - 1;
    bind(&dir.path().join("x".repeat(fits))).unwrap();
    assert!(bind(&dir.path().join("x".repeat(fits + 1))).is_err());
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_client_of_a_server_that_never_responds_times_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    let client = Client::connect(&path).unwrap();
    let client = client.with_answer_timeout(Duration::from_millis(50));
    let error = client.status().unwrap_err();
    assert!(matches!(error, ControlError::NoAnswer { limit_ms: 50, .. }), "{error:?}");
}

#[test]
fn a_server_of_another_protocol_is_detected() {
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().unwrap();
    let answers: [&[u8]; 5] = [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n{",
    ];
    for (i, answer) in answers.into_iter().enumerate() {
        let path = dir.path().join(i.to_string());
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            listener.accept().unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(answer);
        });
        let error = Client::connect(&path).unwrap().status().unwrap_err();
        let detected =
            matches!(error, ControlError::Broken { .. } | ControlError::BadAnswer { .. });
        assert!(detected, "{error:?}");
        server.join().unwrap();
    }
}
