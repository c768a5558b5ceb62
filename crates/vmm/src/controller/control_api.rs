//! What the control API asks of the guest and its migrations.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use control::api::{
    MigrationSide, MigrationState, MigrationStatus, ResolveAction, StartMigration, StartSnapshot,
    TlsPaths,
};
use control::{BalloonControl, ControlError, VmmControl};
use diagnostics::{contain, panic_point};
use migration::tcp::{Security, TcpConnector};
use migration::tls::{Tls, TlsFiles};
use migration::{MigrationError, Resolution, SourceConfig};

use super::{DROP_CACHES_TIME, Doubt, MigrationController, failed, locked, nothing, refused};

/// What the control API asks; the trait is the server's, the guest this monitor's.
pub(crate) struct ControlApi(pub(crate) Arc<MigrationController>);

impl VmmControl for ControlApi {
    fn balloon(&self) -> Option<Arc<dyn BalloonControl>> {
        let machine = locked(&self.0.machine);
        machine.as_ref().map(|machine| Arc::clone(&machine.balloon) as _)
    }

    fn start_migration(&self, ask: &StartMigration) -> Result<MigrationStatus, ControlError> {
        let machine = locked(&self.0.machine).clone();
        let machine = machine.ok_or_else(|| nothing("there is no guest here to move"))?;
        let cancel = Arc::new(AtomicBool::new(false));
        let config = config(ask, Arc::clone(&cancel));
        let security = security(ask.tls.as_ref()).map_err(|error| refused(&error))?;
        let to = TcpConnector::new(&ask.to, security).map_err(|error| refused(&error))?;
        let work = move |controller: &Arc<MigrationController>, guest| {
            controller.carry(&config, guest, to)
        };
        self.0.begin(MigrationSide::Source, "migration", &machine, cancel, work)
    }

    fn start_snapshot(&self, ask: &StartSnapshot) -> Result<MigrationStatus, ControlError> {
        self.0.start_snapshot(ask)
    }

    fn migration(&self) -> MigrationStatus {
        let mut state = self.0.state();
        state.told |= state.status.state == MigrationState::Moved;
        self.0.changed.notify_all();
        let elapsed_ms = state.elapsed_ms();
        MigrationStatus { elapsed_ms, ..state.status.clone() }
    }

    fn cancel_migration(&self) -> Result<MigrationStatus, ControlError> {
        let state = self.0.state();
        let side = state.status.side;
        let leaves = matches!(side, Some(MigrationSide::Source | MigrationSide::Snapshot));
        if !leaves || state.status.state != MigrationState::Running {
            return Err(nothing("no guest is leaving, or being written to a file"));
        }
        state.cancel.store(true, Ordering::Relaxed);
        Ok(state.status.clone())
    }

    fn resolve_migration(&self, word: ResolveAction) -> Result<MigrationStatus, ControlError> {
        // Taken, so that nobody resolves it twice at a time, and put back where it is not resolved.
        let doubt = {
            let mut state = self.0.state();
            state.is_open()?;
            state.doubt.take()
        };
        match doubt {
            None => return Err(nothing("there is no doubt about where the guest runs")),
            Some(Doubt::Left { word: known, to, guest }) => {
                let mut left = (known, to, guest);
                let resolved = contain(|| {
                    panic_point("resolve");
                    self.0.resolve_source(&mut left, word).map_err(|error| refused(&error))
                });
                if let Err(error) = resolved.unwrap_or_else(failed) {
                    let (known, to, guest) = left;
                    self.0.state().doubt = Some(Doubt::Left { word: known, to, guest });
                    return Err(error);
                }
            }
            Some(Doubt::Stays(mut guest)) => {
                let resolved = contain(|| self.0.resolve_stuck(&mut guest, word));
                if let Err(error) = resolved.unwrap_or_else(failed) {
                    self.0.state().doubt = Some(Doubt::Stays(guest));
                    return Err(error);
                }
            }
            Some(Doubt::Came(kept)) => {
                let resolved = contain(|| self.0.resolve_destination(&kept, word));
                let resolved = resolved.unwrap_or_else(failed);
                if locked(&kept).ownership.resolved() == Resolution::Waits {
                    self.0.state().doubt = Some(Doubt::Came(kept));
                }
                resolved?;
            }
        }
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
        drop_caches: ask.drop_caches.then_some(DROP_CACHES_TIME),
        free_pages_wait: if ask.send_free_pages { Duration::ZERO } else { usual.free_pages_wait },
        cancel,
        ..usual
    }
}

/// Reads the certificates, if there are any.
pub(super) fn security(tls: Option<&TlsPaths>) -> Result<Security, MigrationError> {
    let Some(paths) = tls else { return Ok(Security::PlainOnLoopback) };
    let files = TlsFiles {
        authority: PathBuf::from(&paths.authority),
        certificate: PathBuf::from(&paths.certificate),
        key: PathBuf::from(&paths.key),
    };
    Tls::from_files(&files).map(Security::Tls)
}
