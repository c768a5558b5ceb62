//! The seam between the API and whatever runs a guest, balloon and all.

use std::sync::Arc;

use crate::api::{MigrationStatus, ResolveAction, StartMigration, StartSnapshot};
use crate::balloon::BalloonControl;
use crate::error::ControlError;

/// A monitor that can be asked and told. The server calls it as it calls a [`Balloon`].
pub trait VmmControl: Send + Sync {
    /// The guest's balloon; `None` while there is no guest.
    fn balloon(&self) -> Option<Arc<dyn BalloonControl>>;

    /// Begins to move the guest, and does not wait.
    ///
    /// # Errors
    /// [`ControlError::Refused`] where there is nothing to move, or a migration already;
    /// [`ControlError::BadRequest`] where what was asked cannot be.
    fn start_migration(&self, ask: &StartMigration) -> Result<MigrationStatus, ControlError>;

    /// Begins to write the guest to a file, and does not wait. Where it stands is
    /// [`migration`](Self::migration), and [`cancel_migration`](Self::cancel_migration) ends it.
    ///
    /// # Errors
    /// As [`start_migration`](Self::start_migration).
    fn start_snapshot(&self, ask: &StartSnapshot) -> Result<MigrationStatus, ControlError>;

    /// Where the newest migration stands.
    fn migration(&self) -> MigrationStatus;

    /// Has the migration end, and the guest go on where it is. Does not wait.
    ///
    /// # Errors
    /// [`ControlError::Refused`] where there is none that could be ended.
    fn cancel_migration(&self) -> Result<MigrationStatus, ControlError>;

    /// Ends a doubt about where the guest runs. Waits for the other side where it has to be asked.
    ///
    /// # Errors
    /// [`ControlError::Refused`] where there is no doubt, or it is still there.
    fn resolve_migration(&self, word: ResolveAction) -> Result<MigrationStatus, ControlError>;
}

/// A balloon whose guest is some other program's, which moves it or not.
pub(crate) struct OnlyBalloon(pub(crate) Arc<dyn BalloonControl>);

impl VmmControl for OnlyBalloon {
    fn balloon(&self) -> Option<Arc<dyn BalloonControl>> {
        Some(Arc::clone(&self.0))
    }

    fn start_migration(&self, _ask: &StartMigration) -> Result<MigrationStatus, ControlError> {
        Err(not_ours())
    }

    fn start_snapshot(&self, _ask: &StartSnapshot) -> Result<MigrationStatus, ControlError> {
        Err(not_ours())
    }

    fn migration(&self) -> MigrationStatus {
        MigrationStatus::default()
    }

    fn cancel_migration(&self) -> Result<MigrationStatus, ControlError> {
        Err(not_ours())
    }

    fn resolve_migration(&self, _word: ResolveAction) -> Result<MigrationStatus, ControlError> {
        Err(not_ours())
    }
}

fn not_ours() -> ControlError {
    ControlError::Refused {
        what: "this process has only the guest's balloon".into(),
        hint:
            "have the guest's monitor do it; guests of `aerostat run` can be moved and saved here"
                .into(),
    }
}
