//! Complete migrations over TCP, with valid and invalid certificates.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Destination, Source, World, compare, quick_destination, quick_source};
use migration::link::Accept;
use migration::observer::Silent;
use migration::tcp::{Security, TcpAcceptor, TcpConnector};
use migration::tls::{Tls, TlsFiles};
use migration::{DestinationConfig, MigrationError, SourceFailure, Summary, migrate, receive};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn side(name: &str, from: &Authority, trusts: &Authority) -> Tls {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new([name.to_owned()]).unwrap();
    let certificate = params.signed_by(&key, from).unwrap();
    let files = TlsFiles {
        authority: write("ca.pem", trusts.pem()),
        certificate: write("cert.pem", certificate.pem()),
        key: write("key.pem", key.serialize_pem()),
    };
    Tls::from_files(&files).unwrap()
}

/// How long the destination waits.
const TEST_TIMEOUT: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(500);

fn run(here: Security, there: Security, wait: Duration) -> Result<Summary, SourceFailure> {
    run_beside(0, here, there, wait)
}

/// Runs a migration after `strangers` silent peers have connected.
fn run_beside(
    strangers_count: usize,
    here: Security,
    there: Security,
    wait: Duration,
) -> Result<Summary, SourceFailure> {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 300, 0);
    let mut destination = Destination::new(&world);
    let mut accept = TcpAcceptor::new("127.0.0.1:0".parse().unwrap(), there).unwrap();
    let address = accept.address().unwrap();
    let strangers = std::iter::repeat_with(|| TcpStream::connect(address).unwrap());
    let _strangers: Vec<_> = strangers.take(strangers_count).collect();
    let target = format!("localhost:{}", address.port());
    let deadline = Some(Instant::now() + wait);
    let stall = Duration::from_secs(2);
    let config = DestinationConfig { deadline, stall, ..quick_destination() };
    let mut connect = TcpConnector::new(&target, here).unwrap();
    let sent = thread::scope(|scope| {
        let received = scope.spawn(|| receive(&config, &mut destination, &mut accept, &mut Silent));
        let sent = migrate(&quick_source(), &mut source, &mut connect, &mut Silent);
        assert_eq!(received.join().expect("no panic").is_ok(), sent.is_ok());
        sent
    });
    if sent.is_ok() {
        compare(&source, &destination);
    } else {
        assert!(source.runs() && destination.memory.is_none());
    }
    sent
}

#[test]
fn a_guest_moves_between_sides_that_trust_each_other() {
    let ours = authority();
    let tls = |name| Security::Tls(side(name, &ours, &ours));
    run(tls("source"), tls("localhost"), TEST_TIMEOUT).unwrap();
}

#[test]
fn a_guest_moves_without_tls_on_loopback() {
    run(Security::PlainOnLoopback, Security::PlainOnLoopback, TEST_TIMEOUT).unwrap();
}

/// More than the limit of handshakes, and all before the source.
#[test]
fn silent_peers_do_not_block_a_source() {
    let ours = authority();
    let tls = |name| Security::Tls(side(name, &ours, &ours));
    run_beside(100, tls("source"), tls("localhost"), TEST_TIMEOUT).unwrap();
    run_beside(100, Security::PlainOnLoopback, Security::PlainOnLoopback, TEST_TIMEOUT).unwrap();
}

#[test]
fn sides_that_do_not_trust_each_other_do_not_migrate() {
    let (ours, theirs) = (authority(), authority());
    let tls = |name, from, trusts| Security::Tls(side(name, from, trusts));
    let good = || tls("localhost", &ours, &ours);
    // A source or a destination of another authority; a destination with another name.
    for (here, there) in [
        (tls("source", &theirs, &ours), good()),
        (good(), tls("localhost", &theirs, &ours)),
        (good(), tls("elsewhere", &ours, &ours)),
        (Security::PlainOnLoopback, good()),
        (good(), Security::PlainOnLoopback),
    ] {
        run(here, there, SHORT).unwrap_err();
    }
}

#[test]
fn connections_without_tls_never_leave_the_host() {
    let plain = || Security::PlainOnLoopback;
    let error = TcpConnector::new("192.0.2.1:7000", plain()).unwrap_err();
    assert!(matches!(error, MigrationError::Operator { .. }), "{error}");
    let error = TcpAcceptor::new("0.0.0.0:0".parse().unwrap(), plain()).unwrap_err();
    assert!(matches!(error, MigrationError::Operator { .. }), "{error}");
    let error = TcpConnector::new("localhost", plain()).unwrap_err();
    assert!(error.to_string().contains("HOST:PORT"), "{error}");
}

#[test]
fn a_peer_of_another_protocol_does_not_block_a_source() {
    let mut accept =
        TcpAcceptor::new("127.0.0.1:0".parse().unwrap(), Security::PlainOnLoopback).unwrap();
    let address = accept.address().unwrap();
    let mut stranger = TcpStream::connect(address).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    drop(TcpStream::connect(address).unwrap());
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 0, 0);
    let mut destination = Destination::new(&world);
    let mut connect = TcpConnector::new(&address.to_string(), Security::PlainOnLoopback).unwrap();
    let config = quick_destination();
    thread::scope(|scope| {
        scope.spawn(|| receive(&config, &mut destination, &mut accept, &mut Silent).unwrap());
        migrate(&quick_source(), &mut source, &mut connect, &mut Silent).unwrap();
    });
    compare(&source, &destination);
}

#[test]
fn accept_times_out_at_the_deadline() {
    let mut accept =
        TcpAcceptor::new("127.0.0.1:0".parse().unwrap(), Security::PlainOnLoopback).unwrap();
    let started = Instant::now();
    let error = accept.accept(Some(started + Duration::from_millis(50))).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(started.elapsed() >= Duration::from_millis(50));
}
