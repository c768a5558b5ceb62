//! Kills one of two processes (SIGKILL) in each phase. A guest is lost with the process that has
//! its memory. Otherwise the guest must run on at most one side, and a side that survives must have
//! all of it.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Destination, Source, World, quick_destination, quick_source};
use migration::observer::{Observer, Phase, Silent};
use migration::tcp::{Security, TcpAcceptor, TcpConnector};
use migration::{
    DestinationConfig, DestinationGuest, ReceiveFailure, Resolution, SourceConfig, SourceGuest,
    migrate, receive,
};

/// Set in the child: its role.
const ROLE: &str = "AEROSTAT_TEST_ROLE";
const PEER: &str = "AEROSTAT_TEST_PEER";
/// The phase in which the child kills itself.
const DIES_AT: &str = "AEROSTAT_TEST_DIES_AT";

const STALL: Duration = Duration::from_secs(2);

/// Kills this process in the given phase.
struct Dies(String);

impl Observer for Dies {
    fn phase(&mut self, phase: Phase) {
        if format!("{phase:?}").starts_with(&self.0) && !self.0.is_empty() {
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
            thread::sleep(Duration::from_secs(60));
        }
    }
}

fn source_config() -> SourceConfig {
    SourceConfig { stall: STALL, stall_paused: STALL, ..quick_source() }
}

fn destination_config() -> DestinationConfig {
    DestinationConfig { stall: STALL, stall_paused: STALL, ..quick_destination() }
}

fn acceptor() -> (TcpAcceptor, SocketAddr) {
    let address = "127.0.0.1:0".parse().unwrap();
    let accept = TcpAcceptor::new(address, Security::PlainOnLoopback).unwrap();
    let address = accept.address().unwrap();
    (accept, address)
}

/// Not a test: the other process of the tests below.
#[test]
fn other_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let world = Arc::new(World::default());
    let mut observer = Dies(std::env::var(DIES_AT).unwrap_or_default());
    if role == "destination" {
        let (mut accept, address) = acceptor();
        println!("\nlistens {address}");
        std::io::stdout().flush().unwrap();
        let mut machine = Destination::new(&world);
        let _ = receive(&destination_config(), &mut machine, &mut accept, &mut observer);
    } else {
        let peer = std::env::var(PEER).unwrap();
        let mut connect = TcpConnector::new(&peer, Security::PlainOnLoopback).unwrap();
        let mut machine = Source::new(&world, 100, 0);
        let _ = migrate(&source_config(), &mut machine, &mut connect, &mut observer);
    }
}

fn other(role: &str, peer: &str, dies_at: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "other_process", "--nocapture"])
        .envs([(ROLE, role), (PEER, peer), (DIES_AT, dies_at)])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs a migration whose destination dies in phase `at`.
fn destination_dies(at: &str) -> (Source, Option<SourceGuest>) {
    let mut child = other("destination", "", at);
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let listens = lines.map_while(Result::ok).find(|line| line.starts_with("listens"));
    let listens = listens.expect("an address");
    let target = listens.trim_start_matches("listens ");
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 100, 0);
    let mut connect = TcpConnector::new(target, Security::PlainOnLoopback).unwrap();
    let moved = migrate(&source_config(), &mut source, &mut connect, &mut Silent);
    let _ = child.wait();
    (source, moved.err().map(|failure| failure.guest))
}

#[test]
fn a_killed_destination_leaves_the_guest_at_the_source() {
    for at in ["Negotiate", "Round", "LastRound", "State"] {
        let (source, guest) = destination_dies(at);
        assert!(matches!(guest, Some(SourceGuest::Runs)), "{at}: {guest:?}");
        assert!(source.runs() && !source.logging, "{at}");
    }
    // It is dead before it reads the commit, or after: the source is in doubt.
    let (mut source, guest) = destination_dies("Switchover");
    assert!(!source.runs() || matches!(guest, Some(SourceGuest::Runs)));
    if let Some(SourceGuest::InDoubt(doubt)) = guest {
        assert!(!source.runs());
        let mut unreachable = TcpConnector::new("127.0.0.1:9", Security::PlainOnLoopback).unwrap();
        doubt.resolve(&mut source, &mut unreachable).unwrap_err();
        assert!(!source.runs(), "still in doubt");
        doubt.run_here(&mut source).unwrap();
        assert!(source.runs());
    }
}

#[test]
fn a_killed_source_leaves_at_most_one_guest() {
    for (at, whole) in [
        ("Negotiate", false),
        ("FreePages", false),
        ("Round", false),
        ("LastRound", false),
        ("State", false),
        ("Switchover", true),
    ] {
        let (mut accept, address) = acceptor();
        let mut child = other("source", &address.to_string(), at);
        let world = Arc::new(World::default());
        let mut destination = Destination::new(&world);
        let deadline = Some(Instant::now() + Duration::from_secs(20));
        let config = DestinationConfig { deadline, ..destination_config() };
        let received = receive(&config, &mut destination, &mut accept, &mut Silent);
        let _ = child.wait();
        let ReceiveFailure { guest, .. } = received.unwrap_err();
        assert!(!destination.runs());
        match guest {
            DestinationGuest::InDoubt(mut ownership) if whole => {
                // The operator has verified that the source is dead.
                ownership.run_here(&mut destination).unwrap();
                assert_eq!(ownership.resolution(), Resolution::RunsAtDestination);
                assert!(destination.runs() && destination.loaded);
            }
            DestinationGuest::Destroyed if !whole => assert!(destination.memory.is_none()),
            guest => panic!("{at}: {guest:?}"),
        }
    }
}
