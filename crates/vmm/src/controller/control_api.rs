//! The control API of the guest and its migrations.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use control::api::{
    MigrationSide, MigrationState, MigrationStatus, ResolveAction, StartMigration, StartSnapshot,
    TlsPaths,
};
use control::{BalloonControl, ControlError, VmmControl};
use migration::tcp::{Security, TcpConnector};
use migration::tls::{Tls, TlsFiles};
use migration::{MigrationError, SourceConfig};

use super::state::{Event, Refusal};
use super::{MigrationController, refusal, refused};

/// How long the guest may take to drop its caches.
pub(super) const DROP_CACHES_TIMEOUT: Duration = Duration::from_secs(30);

/// The control API of a guest of `aerostat run`.
pub(crate) struct ControlApi(pub(crate) Arc<MigrationController>);

impl VmmControl for ControlApi {
    fn balloon(&self) -> Option<Arc<dyn BalloonControl>> {
        self.0.machine().map(|machine| Arc::clone(&machine.balloon) as _)
    }

    fn start_migration(&self, ask: &StartMigration) -> Result<MigrationStatus, ControlError> {
        if self.0.machine().is_none() {
            return Err(refusal(Refusal::NoGuest));
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let config = config(ask, Arc::clone(&cancel));
        let security = security(ask.tls.as_ref()).map_err(|error| refused(&error))?;
        let to = TcpConnector::new(&ask.to, security).map_err(|error| refused(&error))?;
        let work = move |controller: &Arc<MigrationController>, guest| {
            controller.send(&config, guest, to);
        };
        self.0.begin(MigrationSide::Source, "migration", cancel, work)
    }

    fn start_snapshot(&self, ask: &StartSnapshot) -> Result<MigrationStatus, ControlError> {
        self.0.start_snapshot(ask)
    }

    fn migration(&self) -> MigrationStatus {
        let mut current = self.0.current();
        let status = current.report.status(current.state);
        current.report.outcome_read |= status.state == MigrationState::Moved;
        self.0.changed.notify_all();
        status
    }

    fn cancel_migration(&self) -> Result<MigrationStatus, ControlError> {
        let mut current = self.0.current();
        current.advance(Event::Cancel).map_err(refusal)?;
        current.cancel.store(true, Ordering::Relaxed);
        Ok(current.report.status(current.state))
    }

    fn resolve_migration(&self, action: ResolveAction) -> Result<MigrationStatus, ControlError> {
        self.0.resolve(action)?;
        Ok(self.migration())
    }
}

fn config(ask: &StartMigration, cancel: Arc<AtomicBool>) -> SourceConfig {
    let usual = SourceConfig::default();
    SourceConfig {
        connections: ask.connections.map_or(usual.connections, usize::from),
        max_downtime: ask.max_downtime_ms.map_or(usual.max_downtime, Duration::from_millis),
        max_rounds: ask.max_rounds.unwrap_or(usual.max_rounds),
        bandwidth: ask.bandwidth_bytes_per_s,
        compression: ask.compression.map(i32::from),
        drop_caches: ask.drop_caches.then_some(DROP_CACHES_TIMEOUT),
        free_pages_wait: if ask.send_free_pages { Duration::ZERO } else { usual.free_pages_wait },
        cancel,
        ..usual
    }
}

/// Reads the certificates; without any, TLS is off and only loopback addresses are allowed.
pub(super) fn security(tls: Option<&TlsPaths>) -> Result<Security, MigrationError> {
    let Some(paths) = tls else { return Ok(Security::PlainOnLoopback) };
    let files = TlsFiles {
        authority: PathBuf::from(&paths.authority),
        certificate: PathBuf::from(&paths.certificate),
        key: PathBuf::from(&paths.key),
    };
    Tls::from_files(&files).map(Security::Tls)
}
