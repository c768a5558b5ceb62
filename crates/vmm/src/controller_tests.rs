use control::VmmControl as _;
use control::api::{MigrationState, ResolveAction, StartMigration, TlsPaths};
use migration::tcp::TcpConnector;

use super::*;
use crate::controller::control_api::security;

fn ask(to: &str) -> StartMigration {
    StartMigration { to: to.into(), ..StartMigration::default() }
}

#[test]
fn without_a_guest_migrate_cancel_and_resolve_are_refused() {
    let controller = MigrationController::new(None);
    let api = ControlApi(Arc::clone(&controller));
    assert!(api.balloon().is_none());
    let refused = [
        api.start_migration(&ask("127.0.0.1:1")),
        api.cancel_migration(),
        api.resolve_migration(ResolveAction::Ask),
        api.resolve_migration(ResolveAction::RunHere),
        api.resolve_migration(ResolveAction::Discard),
    ];
    for refused in refused {
        assert_eq!(refused.unwrap_err().http_status(), 409);
    }
    assert_eq!(api.migration().state, MigrationState::None);
    assert!(!controller.end(&balloon_host::Ending::unwatched().unwrap()));
}

#[test]
fn a_destination_reports_its_progress() {
    let controller = MigrationController::new(None);
    let api = ControlApi(Arc::clone(&controller));
    controller.wait_for_source();
    let mut watch = Watch(Arc::clone(&controller));
    watch.phase(Phase::Connect);
    assert_eq!(api.migration().state, MigrationState::Waiting);
    watch.phase(Phase::Round { number: 3 });
    watch.progress(Progress { pages: 5, of_pages: 9, wire_bytes: 100 });
    watch.phase(Phase::LastRound);
    watch.progress(Progress { pages: 1, of_pages: 2, wire_bytes: 110 });
    let status = api.migration();
    assert_eq!((status.state, status.round), (MigrationState::Running, 3));
    assert_eq!((status.done_pages, status.of_pages, status.wire_bytes), (1, 2, 110));
    // Only the source can cancel.
    assert!(api.cancel_migration().is_err());
    controller.not_arrived(&MigrationError::Closed);
    let status = api.migration();
    assert_eq!((status.state, status.phase), (MigrationState::Failed, None));
    assert!(status.state.is_over() && status.elapsed_ms > 0.0);
    // It waits for the next source.
    controller.wait_for_source();
    assert_eq!(api.migration().state, MigrationState::Waiting);
}

/// The operator may migrate it again before the waiting thread wakes up.
#[test]
fn until_resolved_returns_true_even_if_the_guest_is_migrated_again_at_once() {
    let controller = MigrationController::new(None);
    let replay = |events: &[Event]| {
        let mut current = controller.current();
        current.state = State::default();
        for event in events {
            current.advance(*event).unwrap();
        }
    };
    let doubt = [Event::Wait, Event::Connected, Event::Uncertain];
    replay(&[&doubt[..], &[Event::Start]].concat());
    assert!(controller.until_resolved());
    replay(&[&doubt[..], &[Event::Start, Event::Begin(MigrationSide::Source)]].concat());
    assert!(controller.until_resolved());
    replay(&doubt);
    controller.discarded();
    assert!(!controller.until_resolved());
}

#[test]
fn close_cancels_and_refuses_to_commit() {
    let controller = MigrationController::new(None);
    let cancel = Arc::clone(&controller.current().cancel);
    controller.close("it ends");
    assert!(cancel.load(Ordering::Relaxed));
    assert!(controller.commit().is_err());
}

#[test]
fn plaintext_is_only_for_loopback_and_certificate_files_must_exist() {
    let plain = security(None).unwrap();
    assert!(TcpConnector::new("192.0.2.1:7000", plain).is_err());
    let paths = TlsPaths { authority: "/nowhere".into(), ..TlsPaths::default() };
    assert!(security(Some(&paths)).is_err());
}
