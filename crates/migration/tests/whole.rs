//! Complete migrations in one process, without network faults.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{
    BALLOONED, Destination, FREE, POISON, SOURCE, Source, World, compare, network,
    quick_destination, quick_source,
};
use migration::link::Accept as _;
use migration::observer::{Observer, Phase, Progress, Silent};
use migration::raw::FrameWriter;
use migration::traits::SourceMachine as _;
use migration::{
    DestinationConfig, DestinationGuest, MigrationError, MigrationId, ReceiveFailure, Received,
    SourceConfig, SourceFailure, SourceGuest, Summary, migrate, receive,
};

type Outcome = (Result<Summary, SourceFailure>, Result<Received, ReceiveFailure>);

fn run(
    source: &mut Source,
    destination: &mut Destination,
    here: &SourceConfig,
    there: &DestinationConfig,
    observer: &mut dyn Observer,
) -> Outcome {
    let (mut connect, mut incoming) = network();
    thread::scope(|scope| {
        // A resolve request to a destination that has ended fails at once.
        let received = scope.spawn(move || receive(there, destination, &mut incoming, &mut Silent));
        let sent = migrate(here, source, &mut connect, observer);
        drop(connect);
        (sent, received.join().expect("no panic"))
    })
}

fn moves(writes: u64, pattern: u32, config: &SourceConfig) -> (Summary, Received) {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, writes, pattern);
    let mut destination = Destination::new(&world);
    let there = quick_destination();
    let (sent, received) = run(&mut source, &mut destination, config, &there, &mut Silent);
    let (summary, received) = (sent.unwrap(), received.unwrap());
    assert!(destination.runs() && !source.runs());
    assert!(world.relinquished.load(Ordering::SeqCst));
    assert!(received.source_notified);
    compare(&source, &destination);
    (summary, received)
}

#[test]
fn unused_pages_are_not_sent() {
    let (summary, received) = moves(0, 0, &quick_source());
    assert_eq!(summary.memory_pages, 330);
    assert_eq!(summary.free_pages, FREE.1);
    assert_eq!(summary.ballooned_pages, BALLOONED.1);
    assert_eq!(summary.zero_pages, 30);
    assert_eq!(summary.sent_pages, 330 - FREE.1 - BALLOONED.1 - 30);
    assert_eq!(received.received_pages, summary.sent_pages);
    assert_eq!((summary.rounds.len(), received.rounds), (2, 2));
    let bytes = summary.sent_pages * 4096 + 300_000;
    assert!((bytes..bytes + 20_000).contains(&summary.wire_bytes), "{}", summary.wire_bytes);
    let down = summary.downtime;
    let parts = down.pause_us + down.log_us + down.copy_us + down.save_us + down.state_us;
    assert!(parts + down.switchover_us <= down.total_us && down.total_us <= summary.total_us);
}

#[test]
fn a_writing_guest_moves() {
    for connections in [1, 2, 16] {
        let config = SourceConfig { connections, ..quick_source() };
        let (summary, _) = moves(3000, 0, &config);
        assert!(summary.rounds.len() > 2 || summary.sent_pages > 220, "{summary:?}");
    }
}

#[test]
fn skipped_pages_are_filled_with_the_poison() {
    let (summary, _) = moves(3000, POISON, &quick_source());
    assert_eq!(summary.free_pages, FREE.1);
    assert_eq!(summary.filled_pages, FREE.1);
}

#[test]
fn contents_can_be_compressed() {
    let raw = moves(500, 0, &quick_source()).0;
    let config = SourceConfig { compression: Some(1), ..quick_source() };
    let compressed = moves(500, 0, &config).0;
    assert!(
        compressed.wire_bytes * 2 < raw.wire_bytes,
        "{} {}",
        compressed.wire_bytes,
        raw.wire_bytes
    );
}

#[test]
fn the_bandwidth_limit_is_kept() {
    let config = SourceConfig { bandwidth: Some(2 << 20), ..quick_source() };
    let (summary, _) = moves(0, 0, &config);
    let least =
        Duration::from_secs_f64(f64::from(u32::try_from(summary.sent_pages).unwrap()) / 600.0);
    assert!(u128::from(summary.total_us) > least.as_micros(), "{summary:?}");
}

#[test]
fn phases_are_reported_in_order() {
    struct Noted(Vec<Phase>);
    impl Observer for Noted {
        fn phase(&mut self, phase: Phase) {
            self.0.push(phase);
        }
    }
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 0, 0);
    let mut destination = Destination::new(&world);
    let mut noted = Noted(Vec::new());
    let config = SourceConfig { drop_caches: Some(Duration::from_secs(1)), ..quick_source() };
    let there = quick_destination();
    run(&mut source, &mut destination, &config, &there, &mut noted).0.unwrap();
    let phases = [
        Phase::DropCaches,
        Phase::SyncDisks,
        Phase::Connect,
        Phase::Negotiate,
        Phase::FreePages,
        Phase::Round { number: 0 },
        Phase::LastRound,
        Phase::State,
        Phase::Switchover,
    ];
    assert_eq!(noted.0, phases);
}

/// The last reported number of bytes on the wire.
#[derive(Default)]
struct LastProgress(u64);

impl Observer for LastProgress {
    fn progress(&mut self, progress: Progress) {
        assert!(progress.wire_bytes >= self.0, "{} after {}", progress.wire_bytes, self.0);
        self.0 = progress.wire_bytes;
    }
}

#[test]
fn progress_reports_all_bytes_on_the_wire() {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 300, 0);
    let mut destination = Destination::new(&world);
    let (mut sent, mut received) = (LastProgress::default(), LastProgress::default());
    let (mut connect, mut incoming) = network();
    let there = quick_destination();
    let summary = thread::scope(|scope| {
        let (destination, received) = (&mut destination, &mut received);
        let there =
            scope.spawn(move || receive(&there, destination, &mut incoming, received).unwrap());
        let summary = migrate(&quick_source(), &mut source, &mut connect, &mut sent).unwrap();
        there.join().expect("no panic");
        summary
    });
    // Rounds and the messages before them, but nothing after.
    let rounds: u64 = summary.rounds.iter().map(|round| round.wire_bytes).sum();
    assert!(rounds < sent.0 && sent.0 < summary.wire_bytes, "{} {summary:?}", sent.0);
    assert_eq!(received.0, sent.0);
}

/// Runs a migration in which the VMM of one side fails at a step.
fn fails(here: Option<&'static str>, there: Option<&'static str>) -> (Source, SourceFailure) {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 300, 0);
    source.fails_at = here;
    let mut destination = Destination::new(&world);
    destination.fails_at = there;
    let config = quick_destination();
    let (sent, received) =
        run(&mut source, &mut destination, &quick_source(), &config, &mut Silent);
    let left = received.unwrap_err().guest;
    assert!(!matches!(left, DestinationGuest::InDoubt(_)), "{here:?} {there:?}");
    assert!(destination.memory.is_none() && !destination.runs());
    (source, sent.unwrap_err())
}

#[test]
fn a_failing_vmm_leaves_the_guest_at_the_source() {
    let here = ["describe", "before connecting", "log", "dirty", "before pause", "pause", "save"]
        .map(|at| (Some(at), None));
    let there = ["create", "load", "resume"].map(|at| (None, Some(at)));
    for (here, there) in here.into_iter().chain(there) {
        let (source, failure) = fails(here, there);
        assert!(matches!(failure.guest, SourceGuest::Runs), "{failure:?}");
        assert!(source.runs() && !source.logging && source.throttle == 0);
        let text = failure.error.chain();
        let cause = here.or(there.filter(|at| *at != "resume")).unwrap_or("could not start");
        assert!(text.contains(cause), "{text}");
    }
}

/// A third party takes the disk's lock during the switchover: the guest stays paused at the source,
/// whole, until the lock is available again.
#[test]
fn a_guest_whose_disk_is_locked_by_a_third_party_is_not_lost() {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 300, 0);
    source.thief = true;
    let mut destination = Destination::new(&world);
    let config = quick_destination();
    let (sent, received) =
        run(&mut source, &mut destination, &quick_source(), &config, &mut Silent);
    let left = received.unwrap_err().guest;
    assert!(matches!(left, DestinationGuest::Refused(_)), "{left:?}");
    assert!(destination.memory.is_none() && !source.runs());
    let failure = sent.unwrap_err();
    assert!(matches!(failure.guest, SourceGuest::Stuck(_)), "{failure:?}");
    assert!(!source.logging && source.throttle == 0);
    assert!(source.resume().is_err());
    world.disk.store(0, Ordering::SeqCst);
    source.resume().unwrap();
    assert!(source.runs());
    assert_eq!(world.disk.load(Ordering::SeqCst), SOURCE);
}

#[test]
fn a_guest_that_cannot_be_queried_is_sent_completely() {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 0, 0);
    source.fails_at = Some("free");
    let mut destination = Destination::new(&world);
    let there = quick_destination();
    let (sent, _) = run(&mut source, &mut destination, &quick_source(), &there, &mut Silent);
    let summary = sent.unwrap();
    assert_eq!((summary.free_pages, summary.free_answer_us), (0, None));
    assert!(destination.runs());
}

#[test]
fn a_refusing_destination_names_the_mismatch() {
    let refused = |change: fn(&mut Destination, &mut DestinationConfig)| {
        let world = Arc::new(World::default());
        let mut source = Source::new(&world, 0, 0);
        let mut destination = Destination::new(&world);
        let mut there = quick_destination();
        change(&mut destination, &mut there);
        let here = quick_source();
        let (sent, received) = run(&mut source, &mut destination, &here, &there, &mut Silent);
        assert!(source.runs() && destination.memory.is_none());
        assert!(received.is_err());
        sent.unwrap_err().error.to_string()
    };
    let features = refused(|destination, _| destination.features = 1);
    assert!(features.contains("the host's CPU lacks 0x1:0x2"), "{features}");
    let memory = refused(|_, config| config.max_memory_bytes = 100 << 12);
    assert!(
        memory.contains("the guest has 1320 KiB of memory, and the limit is 400 KiB"),
        "{memory}"
    );
    let machine = refused(|_, config| config.machine = "another".to_owned());
    assert!(machine.contains("\"another\" is expected"), "{machine}");
    assert!(machine.contains(&format!("named {:?}", common::MACHINE)), "{machine}");
}

/// Requests the status of a migration from a destination that waits for the next guest.
fn asked(id: MigrationId, there: &DestinationConfig) -> u32 {
    let (mut connect, mut incoming) = network();
    let mut peer = connect().unwrap();
    drop(connect);
    let mut hello = b"AEROSTAT".to_vec();
    hello.extend([1, 0, 1, 0, 2, 0, 1, 0]);
    hello.extend(id.0);
    hello.extend([0; 8]);
    peer.write_all(&FrameWriter::new().frame(1, &hello, &[])).unwrap();
    let mut destination = Destination::new(&Arc::new(World::default()));
    thread::scope(|scope| {
        scope.spawn(|| receive(there, &mut destination, &mut incoming, &mut Silent).unwrap_err());
        let mut status = [0; 28];
        peer.read_exact(&mut status).unwrap();
        drop(peer);
        u32::from_le_bytes(*status.last_chunk().unwrap())
    })
}

/// *Refused* or *gone* may be lost while the destination waits for the next guest. If the
/// destination kept no record, the source would be in doubt infinitely.
#[test]
fn a_destination_answers_gone_for_earlier_migrations() {
    let world = Arc::new(World::default());
    let (mut source, mut destination) = (Source::new(&world, 0, 0), Destination::new(&world));
    destination.fails_at = Some("resume");
    let (here, mut there) = (quick_source(), quick_destination());
    let (_, received) = run(&mut source, &mut destination, &here, &there, &mut Silent);
    let id = received.unwrap_err().id.unwrap();
    assert_eq!(asked(id, &there), 4, "unknown");
    there.gone.push(id);
    assert_eq!(asked(id, &there), 3, "gone");
    assert_eq!(asked(MigrationId([7; 16]), &there), 4, "unknown");
}

/// A destination that has a guest, or one in doubt, accepts no other. That is not a protocol
/// violation.
#[test]
fn a_destination_that_has_a_guest_refuses_another() {
    let world = Arc::new(World::default());
    let (mut source, mut destination) = (Source::new(&world, 0, 0), Destination::new(&world));
    let (here, there) = (quick_source(), quick_destination());
    let (sent, received) = run(&mut source, &mut destination, &here, &there, &mut Silent);
    sent.unwrap();
    let mut ownership = received.unwrap().ownership;
    let mut second = Source::new(&Arc::new(World::default()), 0, 0);
    let (mut connect, mut incoming) = network();
    let config = SourceConfig { connections: 1, ..quick_source() };
    let sent = thread::scope(|scope| {
        scope.spawn(|| {
            let link = incoming.accept(None).unwrap();
            ownership.answer(link, Duration::from_secs(10), &mut destination).unwrap_err();
        });
        migrate(&config, &mut second, &mut connect, &mut Silent)
    });
    let error = sent.unwrap_err().error;
    assert!(matches!(&error, MigrationError::Aborted { .. }), "{error:?}");
    assert!(error.to_string().contains("another guest arrived there before"), "{error}");
    assert!(second.runs() && destination.runs());
}

/// Cancels when a phase begins.
struct Cancels(Arc<AtomicBool>, Phase);

impl Observer for Cancels {
    fn phase(&mut self, phase: Phase) {
        if phase == self.1 {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_migration_can_be_cancelled_until_the_commit() {
    for phase in [Phase::Negotiate, Phase::Round { number: 0 }, Phase::LastRound, Phase::State] {
        let config = quick_source();
        let mut cancels = Cancels(Arc::clone(&config.cancel), phase);
        let world = Arc::new(World::default());
        let mut source = Source::new(&world, 100, 0);
        let mut destination = Destination::new(&world);
        let there = quick_destination();
        let (sent, received) = run(&mut source, &mut destination, &config, &there, &mut cancels);
        let failure = sent.unwrap_err();
        assert!(matches!(failure.error, MigrationError::Cancelled), "{phase:?}: {failure:?}");
        assert!(matches!(failure.guest, SourceGuest::Runs) && source.runs());
        assert!(received.is_err() && destination.memory.is_none(), "{phase:?}");
    }
}

#[test]
fn invalid_configurations_are_refused() {
    let refused = |config: SourceConfig| {
        let world = Arc::new(World::default());
        let mut source = Source::new(&world, 0, 0);
        let (mut connect, _incoming) = network();
        let failure = migrate(&config, &mut source, &mut connect, &mut Silent).unwrap_err();
        assert!(source.runs());
        failure.error.to_string()
    };
    for config in [
        SourceConfig { connections: 0, ..quick_source() },
        SourceConfig { connections: 17, ..quick_source() },
        SourceConfig { max_rounds: 0, ..quick_source() },
        SourceConfig { compression: Some(20), ..quick_source() },
        SourceConfig { bandwidth: Some(1000), ..quick_source() },
    ] {
        let error = refused(config);
        assert!(error.starts_with("operator: "), "{error}");
    }
}

/// It never stalls, and could keep the guest paused infinitely.
#[test]
fn a_slow_destination_does_not_keep_the_guest_paused() {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 0, 0);
    let mut destination = Destination::new(&world);
    destination.dawdles = true;
    let beyond = Duration::from_millis(200);
    let here = SourceConfig {
        stall_paused: Duration::from_secs(600),
        paused_beyond: beyond,
        ..quick_source()
    };
    let there = quick_destination();
    let (sent, received) = run(&mut source, &mut destination, &here, &there, &mut Silent);
    let failure = sent.unwrap_err();
    assert!(matches!(failure.error, MigrationError::TooSlow { .. }), "{failure:?}");
    assert!(matches!(failure.guest, SourceGuest::Runs), "{failure:?}");
    assert!(source.runs() && !destination.runs());
    assert!(received.is_err());
}
