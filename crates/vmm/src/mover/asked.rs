//! What the control API asks of the guest and its migrations.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use control::api::{
    MigrationSide, MigrationState, MigrationStatus, SettleWord, StartMigration, StartSnapshot,
    TlsPaths,
};
use control::{Balloon, ControlError, Monitor};
use diagnostics::{contain, panic_point};
use migration::tcp::{Security, TcpConnector};
use migration::tls::{Tls, TlsFiles};
use migration::{MigrationError, Settled, SourceConfig};

use super::{DROP_CACHES_TIME, Doubt, Mover, failed, locked, nothing, refused};

/// What the control API asks; the trait is the server's, the guest this monitor's.
pub(crate) struct Asked(pub(crate) Arc<Mover>);

impl Monitor for Asked {
    fn balloon(&self) -> Option<Arc<dyn Balloon>> {
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
        let work = move |mover: &Arc<Mover>, guest| mover.carry(&config, guest, to);
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

    fn settle_migration(&self, word: SettleWord) -> Result<MigrationStatus, ControlError> {
        // Taken, so that nobody settles it twice at a time, and put back where it is not settled.
        let doubt = {
            let mut state = self.0.state();
            state.is_open()?;
            state.doubt.take()
        };
        match doubt {
            None => return Err(nothing("there is no doubt about where the guest runs")),
            Some(Doubt::Left { word: known, to, guest }) => {
                let mut left = (known, to, guest);
                let settled = contain(|| {
                    panic_point("settle");
                    self.0.settle_left(&mut left, word).map_err(|error| refused(&error))
                });
                if let Err(error) = settled.unwrap_or_else(failed) {
                    let (known, to, guest) = left;
                    self.0.state().doubt = Some(Doubt::Left { word: known, to, guest });
                    return Err(error);
                }
            }
            Some(Doubt::Stays(mut guest)) => {
                let settled = contain(|| self.0.settle_stuck(&mut guest, word));
                if let Err(error) = settled.unwrap_or_else(failed) {
                    self.0.state().doubt = Some(Doubt::Stays(guest));
                    return Err(error);
                }
            }
            Some(Doubt::Came(kept)) => {
                let settled = contain(|| self.0.settle_came(&kept, word));
                let settled = settled.unwrap_or_else(failed);
                if locked(&kept).custody.settled() == Settled::Waits {
                    self.0.state().doubt = Some(Doubt::Came(kept));
                }
                settled?;
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
