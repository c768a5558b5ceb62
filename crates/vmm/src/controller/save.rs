//! Writing the guest to a file: a migration after which the guest continues here.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use control::ControlError;
use control::api::{MigrationSide, MigrationStatus, StartSnapshot};
use migration::observer::{Observer as _, Phase};
use migration::snapshot::{After, snapshot};
use migration::traits::SourceMachine as _;
use migration::{SourceConfig, SourceFailure, SourceGuest};

use super::control_api::DROP_CACHES_TIMEOUT;
use super::participant::MigrationSource;
use super::state::{Event, Refusal};
use super::{MigrationController, Watch, refusal, summary};

impl MigrationController {
    pub(super) fn start_snapshot(
        self: &Arc<Self>,
        ask: &StartSnapshot,
    ) -> Result<MigrationStatus, ControlError> {
        let path = PathBuf::from(&ask.path);
        if !path.is_absolute() {
            let what = format!("{} is not an absolute path", path.display());
            let hint =
                "give an absolute path: the VMM may have another working directory".to_owned();
            return Err(ControlError::BadRequest { what, hint });
        }
        let machine = self.machine().ok_or_else(|| refusal(Refusal::NoGuest))?;
        if machine.disk_shapes().iter().any(|disk| !disk.read_only) {
            // A restored guest would find a disk that has changed since.
            let what =
                "the guest has a writable disk; a snapshot does not contain disks".to_owned();
            let hint = "take snapshots only of guests whose disks are all read-only".to_owned();
            return Err(ControlError::Refused { what, hint });
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let config = config(ask, Arc::clone(&cancel));
        let drops_caches = ask.drop_caches;
        let work = move |controller: &Arc<Self>, guest| {
            controller.save(&config, guest, &path, drops_caches)
        };
        self.begin(MigrationSide::Snapshot, "snapshot", cancel, work)
    }

    /// Writes the guest; runs in its own thread.
    fn save(
        self: &Arc<Self>,
        config: &SourceConfig,
        mut guest: MigrationSource,
        path: &Path,
        drops_caches: bool,
    ) {
        let mut watch = Watch(Arc::clone(self));
        // `snapshot` below refuses a guest that cannot be saved.
        if drops_caches && guest.describe().is_ok() {
            watch.phase(Phase::DropCaches);
            if let Err(error) = guest.drop_caches(DROP_CACHES_TIMEOUT) {
                tracing::warn!(error, "the guest did not drop its caches");
            }
        }
        match snapshot(config, &mut guest, path, After::Resume, &mut watch) {
            Ok(saved) => {
                tracing::info!(path = %path.display(), total_us = saved.total_us, "saved");
                let summary = Some(summary::summary(&saved));
                self.record(Event::Saved, |current| {
                    current.report.succeed(saved.wire_bytes, summary);
                });
            }
            Err(SourceFailure { error, guest: SourceGuest::Stuck(stuck) }) => {
                self.stuck(guest, format!("{}; {}", error.chain(), stuck.chain()));
            }
            // A snapshot has no peer, so the guest is never in-doubt.
            Err(SourceFailure { error, .. }) => {
                tracing::warn!(error = error.chain(), "the snapshot failed; the guest runs");
                self.record(Event::Failed, |current| current.report.fail(&error));
            }
        }
    }
}

fn config(ask: &StartSnapshot, cancel: Arc<AtomicBool>) -> SourceConfig {
    let usual = SourceConfig::default();
    let free_pages_wait = if ask.write_free_pages { Duration::ZERO } else { usual.free_pages_wait };
    SourceConfig { free_pages_wait, cancel, ..usual }
}
