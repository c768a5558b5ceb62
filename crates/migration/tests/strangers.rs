//! Peers that connect to a destination and are not its source.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Destination, Source, World, compare, quick_destination, quick_source};
use migration::link::Connect;
use migration::observer::Silent;
use migration::tcp::{Security, TcpAcceptor, TcpConnector, TcpLink};
use migration::{DestinationConfig, SourceConfig, migrate, receive};
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

/// Stall timeout of the destination.
const STALL: Duration = Duration::from_secs(40);

/// A source that is not blocked ends long before this.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// More than the limit of handshakes.
const FLOOD: usize = 300;

fn acceptor() -> (TcpAcceptor, SocketAddr) {
    let address = "127.0.0.1:0".parse().unwrap();
    let accept = TcpAcceptor::new(address, Security::PlainOnLoopback).unwrap();
    let address = accept.address().unwrap();
    (accept, address)
}

/// Moves a guest to `accept` over connections of `connect`.
fn moves(mut accept: TcpAcceptor, connect: &mut impl Connect<Link = TcpLink>, connections: usize) {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 0, 0);
    let mut destination = Destination::new(&world);
    let deadline = Some(Instant::now() + ANSWER_TIMEOUT * 2);
    let config = DestinationConfig { stall: STALL, deadline, ..quick_destination() };
    let from = SourceConfig { connections, stall: STALL, ..quick_source() };
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| receive(&config, &mut destination, &mut accept, &mut Silent).unwrap());
        migrate(&from, &mut source, connect, &mut Silent).unwrap();
    });
    compare(&source, &destination);
    assert!(start.elapsed() < ANSWER_TIMEOUT, "{:?}", start.elapsed());
}

fn connector(address: SocketAddr) -> TcpConnector {
    TcpConnector::new(&address.to_string(), Security::PlainOnLoopback).unwrap()
}

/// Connects from another address than all other tests.
fn stranger(to: SocketAddr) -> TcpStream {
    let other: SocketAddr = "127.0.0.2:0".parse().unwrap();
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &other).unwrap();
    connect(&socket, &to).unwrap();
    socket.into()
}

/// A source with a delay between connecting and its hello, as over a long distance.
#[test]
fn a_host_that_floods_a_destination_blocks_no_other_host() {
    let (accept, address) = acceptor();
    let mut strangers = Vec::new();
    let mut to = connector(address);
    let mut connect = || -> io::Result<TcpLink> {
        let link = to.connect()?;
        strangers.extend((0..FLOOD).map(|_| stranger(address)));
        // Until all of them were accepted.
        thread::sleep(Duration::from_millis(300));
        Ok(link)
    };
    moves(accept, &mut connect, 1);
}

#[test]
fn peers_that_send_half_a_message_block_no_source() {
    let (accept, address) = acceptor();
    // An incomplete header of 24 bytes, and one that announces contents.
    let mut promise = [0; 24];
    promise[16] = 1;
    for bytes in [&[0; 1][..], &[0; 23], &promise] {
        let mut strangers: Vec<_> = (0..20).map(|_| stranger(address)).collect();
        strangers.iter_mut().for_each(|stranger| stranger.write_all(bytes).unwrap());
        std::mem::forget(strangers);
    }
    moves(accept, &mut connector(address), 2);
}

/// A peer that speaks the protocol.
#[test]
fn a_source_that_opens_one_of_four_connections_blocks_no_other_source() {
    let (accept, address) = acceptor();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut to = connector(address);
            let mut opened = 0;
            let mut connect = || -> io::Result<TcpLink> {
                opened += 1;
                while opened > 1 && !over.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(5));
                }
                if opened > 1 { Err(io::ErrorKind::TimedOut.into()) } else { to.connect() }
            };
            let mut source = Source::new(&Arc::new(World::default()), 0, 0);
            let config = SourceConfig { connections: 4, stall: STALL, ..quick_source() };
            migrate(&config, &mut source, &mut connect, &mut Silent).unwrap_err();
        });
        // It has sent its hello by then; if not, the test is merely weaker.
        thread::sleep(Duration::from_millis(200));
        let moves = || moves(accept, &mut connector(address), 4);
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(moves));
        over.store(true, Ordering::Relaxed);
        ended.unwrap();
    });
}
