//! Writing the guest to a file: a migration that ends where it began.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use control::ControlError;
use control::api::{MigrationSide, MigrationState, MigrationStatus, StartSnapshot};
use migration::observer::{Observer as _, Phase};
use migration::snapshot::{After, snapshot};
use migration::traits::SourceMachine as _;
use migration::{SourceConfig, SourceFailure, SourceGuest};

use super::{DROP_CACHES_TIME, Doubt, MigrationController, Watch, nothing, told};
use crate::traits::MigrationSource;

impl MigrationController {
    pub(super) fn start_snapshot(
        self: &Arc<Self>,
        ask: &StartSnapshot,
    ) -> Result<MigrationStatus, ControlError> {
        let path = PathBuf::from(&ask.path);
        if !path.is_absolute() {
            let what = format!("{} is no path from the root", path.display());
            let hint = "the guest's monitor may be in another directory than you".to_owned();
            return Err(ControlError::BadRequest { what, hint });
        }
        let machine = self.machine().ok_or_else(|| nothing("there is no guest here to write"))?;
        if machine.disk_shapes().iter().any(|disk| !disk.read_only) {
            // Whoever restored it would find a disk that has gone on since.
            let what = "the guest has a disk that it writes, and a snapshot has none".to_owned();
            let hint = "snapshots are for guests whose disks are all read-only".to_owned();
            return Err(ControlError::Refused { what, hint });
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let config = config(ask, Arc::clone(&cancel));
        let drops_caches = ask.drop_caches;
        let work = move |controller: &Arc<Self>, guest| {
            controller.save(&config, guest, &path, drops_caches)
        };
        self.begin(MigrationSide::Snapshot, "snapshot", &machine, cancel, work)
    }

    /// Writes the guest; runs in a thread of its own.
    fn save(
        self: &Arc<Self>,
        config: &SourceConfig,
        mut guest: MigrationSource,
        path: &Path,
        drops_caches: bool,
    ) {
        let mut watch = Watch(Arc::clone(self));
        // One that cannot be saved is refused below.
        if drops_caches && guest.describe().is_ok() {
            watch.phase(Phase::DropCaches);
            if let Err(error) = guest.drop_caches(DROP_CACHES_TIME) {
                tracing::warn!(error, "the guest did not drop its caches");
            }
        }
        let saved = snapshot(config, &mut guest, path, After::Resume, &mut watch);
        let mut state = self.state();
        match saved {
            Ok(summary) => {
                tracing::info!(path = %path.display(), total_us = summary.total_us, "saved");
                state.status.wire_bytes = summary.wire_bytes;
                state.status.summary = Some(told::summary(&summary));
                self.goes_on(state, MigrationState::Saved, None);
            }
            Err(SourceFailure { error, guest: SourceGuest::Stuck(why) }) => {
                let error = format!("{}; {}", error.chain(), why.chain());
                tracing::error!(error, "the guest was not saved, and does not go on");
                state.doubt = Some(Doubt::Stays(guest));
                state.over(MigrationState::Stuck, Some(error));
            }
            // Of a file it is never in doubt whether it runs there.
            Err(SourceFailure { error, .. }) => {
                tracing::warn!(error = error.chain(), "the guest was not saved, and runs on");
                self.goes_on_after(state, &error);
            }
        }
        self.changed.notify_all();
    }
}

fn config(ask: &StartSnapshot, cancel: Arc<AtomicBool>) -> SourceConfig {
    let usual = SourceConfig::default();
    let free_pages_wait = if ask.write_free_pages { Duration::ZERO } else { usual.free_pages_wait };
    SourceConfig { free_pages_wait, cancel, ..usual }
}
