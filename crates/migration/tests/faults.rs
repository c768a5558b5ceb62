//! A network that fails at every single write, in every way, in either direction. In every case the
//! guest runs on at most one side at any moment, one side has all of it, and one resolve request
//! ends every doubt.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::fault::{Faulty, Kind, Plan};
use common::{Destination, Incoming, Source, World, compare, quick_destination, quick_source};
use migration::observer::Silent;
use migration::{
    DestinationConfig, DestinationGuest, DestinationOwnership, ReceiveFailure, Received,
    Resolution, SourceConfig, SourceDoubt, SourceFailure, SourceGuest, Summary, migrate, receive,
};

/// Longer than a busy machine delays a thread. Each stall fault takes this long.
const STALL: Duration = Duration::from_secs(2);

/// Concurrent migrations.
const AT_ONCE: usize = 24;

/// Limit of sweeps until all cases were seen.
const SWEEPS: usize = 3;

/// The outcome on both sides, before any doubt is resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Case {
    Moved,
    Stayed,
    /// It runs at the source, and the destination is in doubt.
    StayedDestinationInDoubt,
    /// It runs at the destination, and the source is in doubt.
    MovedSourceInDoubt,
    /// Both sides are in doubt.
    BothInDoubt,
}

fn case(ended: &Ended) -> Case {
    let doubts = |failure: &ReceiveFailure| matches!(failure.guest, DestinationGuest::InDoubt(_));
    match (&ended.sent, &ended.received) {
        (Ok(_), _) => Case::Moved,
        (Err(SourceFailure { guest: SourceGuest::InDoubt(_), .. }), Ok(_)) => {
            Case::MovedSourceInDoubt
        }
        (Err(SourceFailure { guest: SourceGuest::InDoubt(_), .. }), Err(_)) => Case::BothInDoubt,
        (Err(_), Err(failure)) if doubts(failure) => Case::StayedDestinationInDoubt,
        _ => Case::Stayed,
    }
}

struct Setup {
    /// One connection makes the order of events deterministic.
    connections: usize,
    stall: Duration,
    world: Arc<World>,
    source: Source,
    destination: Destination,
}

struct Ended {
    sent: Result<Summary, SourceFailure>,
    received: Result<Received, ReceiveFailure>,
}

impl Setup {
    fn new(connections: usize, stall: Duration) -> Self {
        let world = Arc::new(World::default());
        let (source, destination) = (Source::new(&world, 40, 0), Destination::new(&world));
        Self { connections, stall, world, source, destination }
    }

    /// Runs a migration over connections that fail as planned. Later ones do not fail.
    fn run(&mut self, source_writes: &Arc<Plan>, destination_writes: &Arc<Plan>) -> Ended {
        let (there, incoming) = mpsc::channel();
        let mut incoming = Incoming(incoming);
        let mut connect = connector(there, source_writes, destination_writes);
        let stall = self.stall;
        let here = SourceConfig {
            connections: self.connections,
            max_downtime: Duration::from_secs(100),
            stall,
            stall_paused: stall,
            ..quick_source()
        };
        let deadline = Some(Instant::now() + 2 * stall);
        let config =
            DestinationConfig { stall, stall_paused: stall, deadline, ..quick_destination() };
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

    /// Checks the invariants; resolves a doubt.
    fn check(&mut self, ended: Ended, what: &str) -> Case {
        self.world.check();
        let case = case(&ended);
        match (ended.sent, ended.received) {
            (Ok(_), Ok(_)) => {}
            (Ok(_), Err(failure)) => {
                panic!("{what}: relinquished without a destination: {failure:?}")
            }
            (Err(failure), received) => match failure.guest {
                SourceGuest::Runs => self.stayed(received, what),
                SourceGuest::InDoubt(doubt) => self.resolve(&doubt, received, what),
                SourceGuest::Stuck(error) => panic!("{what}: {error}"),
            },
        }
        self.world.check();
        let (here, there) = (self.source.runs(), self.destination.runs());
        assert!(here != there, "{what}: {here} and {there}");
        if there {
            compare(&self.source, &self.destination);
            assert!(self.world.relinquished.load(Ordering::SeqCst), "{what}");
        } else {
            assert!(self.destination.memory.is_none(), "{what}: something is left");
            assert!(!self.source.logging && self.source.throttle == 0, "{what}");
        }
        case
    }

    fn stayed(&mut self, received: Result<Received, ReceiveFailure>, what: &str) {
        assert!(self.source.runs(), "{what}");
        match received {
            Ok(_) => panic!("{what}: it runs there too"),
            Err(ReceiveFailure { guest: DestinationGuest::InDoubt(mut ownership), .. }) => {
                // The operator of the source confirms that it runs there.
                ownership.discard(&mut self.destination);
                assert_eq!(ownership.resolution(), Resolution::NeverRan);
            }
            Err(_) => {}
        }
    }

    fn resolve(
        &mut self,
        doubt: &SourceDoubt,
        received: Result<Received, ReceiveFailure>,
        what: &str,
    ) {
        assert!(!self.source.runs(), "{what}: in doubt and running");
        let mut ownership = match received {
            Ok(received) => received.ownership,
            Err(ReceiveFailure { guest: DestinationGuest::InDoubt(ownership), .. }) => {
                assert!(!self.destination.runs(), "{what}: in doubt and running");
                ownership
            }
            Err(ReceiveFailure { guest: DestinationGuest::Refused(ownership), .. }) => ownership,
            Err(ReceiveFailure { guest: DestinationGuest::Destroyed, .. }) => {
                doubt.run_here(&mut self.source).unwrap();
                return;
            }
        };
        // Retry, since the machine may be busy.
        let resolved = (0..50).any(|_| self.ask(doubt, &mut ownership));
        assert!(resolved, "{what}: cannot be resolved");
    }

    /// One resolve request, over a working connection.
    fn ask(&mut self, doubt: &SourceDoubt, ownership: &mut DestinationOwnership) -> bool {
        let (mine, theirs) = UnixStream::pair().unwrap();
        let mut mine = Some(mine);
        let destination = &mut self.destination;
        thread::scope(|scope| {
            let answered = scope.spawn(|| ownership.answer(theirs, 20 * STALL, destination));
            let asked = doubt.resolve(&mut self.source, &mut || {
                mine.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
            });
            answered.join().expect("no panic").is_ok() && asked.is_ok()
        })
    }
}

/// A VMM with a guest in doubt answers its source for a while.
fn serve(
    received: Result<Received, ReceiveFailure>,
    destination: &mut Destination,
    incoming: &mut Incoming<Faulty>,
) -> Result<Received, ReceiveFailure> {
    let Err(ReceiveFailure { id, error, guest: DestinationGuest::InDoubt(mut ownership) }) =
        received
    else {
        return received;
    };
    while ownership.resolution() == Resolution::InDoubt {
        let Ok(link) = incoming.0.recv_timeout(2 * STALL) else { break };
        let _ = ownership.answer(link, STALL, destination);
    }
    Err(ReceiveFailure { id, error, guest: DestinationGuest::InDoubt(ownership) })
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

/// Numbers of writes of both sides without a fault.
fn writes(connections: usize) -> (usize, usize) {
    let (here, there) = (Plan::never(), Plan::never());
    let mut setup = Setup::new(connections, 100 * STALL);
    let ended = setup.run(&here, &there);
    ended.sent.as_ref().unwrap();
    setup.check(ended, "without a fault");
    (here.writes.load(Ordering::SeqCst), there.writes.load(Ordering::SeqCst))
}

type Fault = Option<(Kind, usize)>;

/// Fails every write of both sides once in each way; returns the cases.
fn sweep(connections: usize, kinds: &[Kind]) -> BTreeSet<Case> {
    let (here, there) = writes(connections);
    assert!(here > 8 && there > 4, "{here} {there}");
    let each = |kind: &Kind| {
        let kind = *kind;
        // On a busy machine there may be additional keepalives.
        let of_source = (0..here + 2).map(move |at| (Some((kind, at)), None));
        of_source.chain((0..there).map(move |at| (None, Some((kind, at)))))
    };
    all(connections, &kinds.iter().flat_map(each).collect::<Vec<_>>())
}

/// Runs each of `faults` in its own migration, many concurrently, since most of the time is
/// waiting.
fn all(connections: usize, faults: &[(Fault, Fault)]) -> BTreeSet<Case> {
    let mut cases = BTreeSet::new();
    for some in faults.chunks(AT_ONCE) {
        thread::scope(|scope| {
            let spawn = |&(here, there)| scope.spawn(move || fault(connections, here, there));
            let threads: Vec<_> = some.iter().map(spawn).collect();
            cases.extend(threads.into_iter().map(|thread| thread.join().expect("what must hold")));
        });
    }
    cases
}

/// Faults of the source's and of the destination's writes.
fn fault(connections: usize, here: Fault, there: Fault) -> Case {
    let what = format!("{here:?} of the source, {there:?} of the destination");
    let plan = |fault: Fault| fault.map_or_else(Plan::never, |(kind, at)| Plan::new(kind, at));
    let (here, there) = (plan(here), plan(there));
    let mut setup = Setup::new(connections, STALL);
    let ended = setup.run(&here, &there);
    setup.check(ended, &what)
}

/// Sweeps until all wanted cases were seen. On a busy machine anything may stall by itself, so one
/// sweep may produce other cases, and sometimes only those.
fn sweep_until(connections: usize, kinds: &[Kind], wanted: &[Case]) {
    let mut cases = BTreeSet::new();
    for _ in 0..SWEEPS {
        cases.extend(sweep(connections, kinds));
        if wanted.iter().all(|case| cases.contains(case)) {
            return;
        }
    }
    assert_seen(&cases, wanted);
}

fn assert_seen(cases: &BTreeSet<Case>, wanted: &[Case]) {
    assert!(wanted.iter().all(|case| cases.contains(case)), "{cases:?} lack some of {wanted:?}");
}

#[test]
fn cut_connections_leave_one_guest() {
    sweep_until(
        1,
        &[Kind::Cut, Kind::CutAfter, Kind::Truncate],
        &[Case::Moved, Case::Stayed, Case::MovedSourceInDoubt, Case::BothInDoubt],
    );
}

#[test]
fn stalled_connections_leave_one_guest() {
    sweep_until(1, &[Kind::Stall], &[Case::Stayed, Case::MovedSourceInDoubt, Case::BothInDoubt]);
}

#[test]
fn corrupted_bytes_leave_one_guest() {
    sweep_until(1, &[Kind::Corrupt], &[Case::Stayed, Case::MovedSourceInDoubt, Case::BothInDoubt]);
}

#[test]
fn lost_messages_leave_one_guest() {
    sweep_until(1, &[Kind::Lose], &[Case::Stayed, Case::MovedSourceInDoubt, Case::BothInDoubt]);
}

#[test]
fn repeated_messages_leave_one_guest() {
    sweep_until(1, &[Kind::Repeat], &[Case::Moved, Case::Stayed]);
}

#[test]
fn reordered_messages_leave_one_guest() {
    sweep_until(1, &[Kind::Reorder], &[Case::Stayed]);
}

#[test]
fn a_fault_of_one_of_many_connections_leaves_one_guest() {
    sweep_until(3, &[Kind::Cut, Kind::Corrupt], &[Case::Stayed]);
}

/// Both *prepared* and the source's abort are lost, so the source sends a rollback on another
/// connection.
#[test]
fn a_destination_in_doubt_receives_a_rollback() {
    let (here, there) = writes(1);
    let both = |at| (Some((Kind::Cut, here - 1)), Some((Kind::Lose, at)));
    let cases = all(1, &(0..there).map(both).collect::<Vec<_>>());
    assert_seen(&cases, &[Case::StayedDestinationInDoubt]);
}
