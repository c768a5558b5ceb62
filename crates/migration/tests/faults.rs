//! A network that fails at every single write, in every way, in either direction. Whatever
//! happens: the guest runs on at most one side at any moment, all of it is somewhere, and one word
//! settles what is in doubt.

mod common;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::fault::{Faulty, KINDS, Kind, Plan};
use common::{Destination, Incoming, Source, World, compare, quick_destination, quick_source};
use migration::observer::Silent;
use migration::{
    DestinationConfig, DestinationGuest, ReceiveFailure, Received, Settled, SourceConfig,
    SourceDoubt, SourceFailure, SourceGuest, Summary, migrate, receive,
};

/// Shorter than anything here takes by itself would be bad, longer than that is waiting.
const STALL: Duration = Duration::from_millis(150);

struct Setup {
    world: Arc<World>,
    source: Source,
    destination: Destination,
}

struct Ended {
    sent: Result<Summary, SourceFailure>,
    received: Result<Received, ReceiveFailure>,
}

impl Setup {
    fn new() -> Self {
        let world = Arc::new(World::default());
        let (source, destination) = (Source::new(&world, 40, 0), Destination::new(&world));
        Self { world, source, destination }
    }

    /// Runs a migration over connections that fail as planned; later ones do not.
    fn run(&mut self, source_writes: &Arc<Plan>, destination_writes: &Arc<Plan>) -> Ended {
        let (there, incoming) = mpsc::channel();
        let mut incoming = Incoming(incoming);
        let mut connect = connector(there, source_writes, destination_writes);
        let here = SourceConfig { stall: STALL, stall_paused: STALL, ..quick_source() };
        let deadline = Some(Instant::now() + 2 * STALL);
        let config = DestinationConfig {
            stall: STALL,
            stall_paused: STALL,
            deadline,
            ..quick_destination()
        };
        let (source, destination) = (&mut self.source, &mut self.destination);
        thread::scope(|scope| {
            let received = scope.spawn(move || {
                let received = receive(&config, destination, &mut incoming, &mut Silent);
                serve(received, destination, &mut incoming)
            });
            let sent = migrate(&here, source, &mut connect, &mut Silent);
            drop(connect);
            Ended { sent, received: received.join().expect("no panic") }
        })
    }

    /// What has to hold, whatever happened; settles what is in doubt.
    fn check(&mut self, ended: Ended, what: &str) {
        self.world.check();
        match (ended.sent, ended.received) {
            (Ok(_), Ok(_)) => {}
            (Ok(_), Err(failure)) => panic!("{what}: given away to nobody: {failure:?}"),
            (Err(failure), received) => match failure.guest {
                SourceGuest::Runs => self.stayed(received, what),
                SourceGuest::InDoubt(doubt) => self.settle(&doubt, received, what),
                SourceGuest::Stuck(error) => panic!("{what}: {error}"),
            },
        }
        self.world.check();
        let (here, there) = (self.source.runs(), self.destination.runs());
        assert!(here != there, "{what}: {here} and {there}");
        if there {
            compare(&self.source, &self.destination);
            assert!(self.world.given_away.load(Ordering::SeqCst), "{what}");
        } else {
            assert!(self.destination.memory.is_none(), "{what}: something is left");
            assert!(!self.source.logging && self.source.throttle == 0, "{what}");
        }
    }

    fn stayed(&mut self, received: Result<Received, ReceiveFailure>, what: &str) {
        assert!(self.source.runs(), "{what}");
        match received {
            Ok(_) => panic!("{what}: it runs there too"),
            Err(ReceiveFailure { guest: DestinationGuest::InDoubt(mut custody), .. }) => {
                // The source's operator says where it runs.
                custody.discard(&mut self.destination);
                assert_eq!(custody.settled(), Settled::Gone);
            }
            Err(_) => {}
        }
    }

    fn settle(
        &mut self,
        doubt: &SourceDoubt,
        received: Result<Received, ReceiveFailure>,
        what: &str,
    ) {
        assert!(!self.source.runs(), "{what}: in doubt and running");
        let mut custody = match received {
            Ok(received) => received.custody,
            Err(ReceiveFailure { guest: DestinationGuest::InDoubt(custody), .. }) => {
                assert!(!self.destination.runs(), "{what}: in doubt and running");
                custody
            }
            Err(ReceiveFailure { guest: DestinationGuest::Refused(custody), .. }) => custody,
            Err(ReceiveFailure { guest: DestinationGuest::Destroyed, .. }) => {
                doubt.run_here(&mut self.source).unwrap();
                return;
            }
        };
        let (mine, theirs) = UnixStream::pair().unwrap();
        let mut mine = Some(mine);
        let destination = &mut self.destination;
        thread::scope(|scope| {
            let answered = scope.spawn(|| custody.answer(theirs, 100 * STALL, destination));
            let asked = doubt.ask(&mut self.source, &mut || {
                mine.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
            });
            asked.unwrap_or_else(|error| panic!("{what}: {error}"));
            answered.join().expect("no panic").unwrap();
        });
    }
}

/// A monitor that has a guest in doubt goes on answering, for a moment.
fn serve(
    received: Result<Received, ReceiveFailure>,
    destination: &mut Destination,
    incoming: &mut Incoming<Faulty>,
) -> Result<Received, ReceiveFailure> {
    let Err(ReceiveFailure { error, guest: DestinationGuest::InDoubt(mut custody) }) = received
    else {
        return received;
    };
    while custody.settled() == Settled::Waits {
        let Ok(link) = incoming.0.recv_timeout(2 * STALL) else { break };
        let _ = custody.answer(link, STALL, destination);
    }
    Err(ReceiveFailure { error, guest: DestinationGuest::InDoubt(custody) })
}

fn connector(
    there: mpsc::Sender<Faulty>,
    source_writes: &Arc<Plan>,
    destination_writes: &Arc<Plan>,
) -> impl FnMut() -> io::Result<Faulty> {
    let (mine, theirs) = (Arc::clone(source_writes), Arc::clone(destination_writes));
    move || {
        let (a, b) = UnixStream::pair()?;
        let end = Faulty::new(b, &theirs);
        there.send(end).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Faulty::new(a, &mine))
    }
}

/// Writes of either side when nothing fails.
fn writes() -> (usize, usize) {
    let (here, there) = (Plan::never(), Plan::never());
    let mut setup = Setup::new();
    let ended = setup.run(&here, &there);
    ended.sent.as_ref().unwrap();
    setup.check(ended, "without a fault");
    (here.writes.load(Ordering::SeqCst), there.writes.load(Ordering::SeqCst))
}

fn sweep(kinds: &[Kind]) {
    let (here, there) = writes();
    // A guest that writes makes a round more or less.
    let (here, there) = (here + 4, there + 2);
    assert!(here > 10 && there > 5, "{here} {there}");
    for &kind in kinds {
        for at in 0..here {
            fault(kind, at, true);
        }
        for at in 0..there {
            fault(kind, at, false);
        }
    }
}

fn fault(kind: Kind, at: usize, is_source: bool) {
    let (plan, never) = (Plan::new(kind, at), Plan::never());
    let what = format!("{kind:?} at write {at} of the {}", side(is_source));
    let mut setup = Setup::new();
    let ended = if is_source { setup.run(&plan, &never) } else { setup.run(&never, &plan) };
    setup.check(ended, &what);
}

const fn side(is_source: bool) -> &'static str {
    if is_source { "source" } else { "destination" }
}

#[test]
fn connections_are_cut() {
    sweep(&[Kind::Cut, Kind::CutAfter, Kind::Truncate]);
}

#[test]
fn bytes_change() {
    sweep(&[Kind::Corrupt]);
}

#[test]
fn messages_are_lost() {
    sweep(&[Kind::Lose]);
}

#[test]
fn messages_come_twice() {
    sweep(&[Kind::Repeat]);
}

#[test]
fn messages_change_places() {
    sweep(&[Kind::Reorder]);
}

#[test]
fn connections_stall() {
    sweep(&[Kind::Stall]);
}

#[test]
fn every_kind_is_swept() {
    assert_eq!(KINDS.len(), 8);
}
