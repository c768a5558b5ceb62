//! The trait through which the server controls a VMM.

use std::sync::Arc;

use crate::api::{MigrationStatus, ResolveAction, StartMigration, StartSnapshot};
use crate::balloon::BalloonControl;
use crate::error::ControlError;

/// Control interface of a VMM. The server calls it in the same way as a [`BalloonControl`].
pub trait VmmControl: Send + Sync {
    /// Returns the guest's balloon; `None` while there is no guest.
    fn balloon(&self) -> Option<Arc<dyn BalloonControl>>;

    /// Starts a migration and returns without waiting for it.
    ///
    /// # Errors
    /// [`ControlError::Refused`] without a guest or during another migration;
    /// [`ControlError::BadRequest`] if the request is invalid.
    fn start_migration(&self, ask: &StartMigration) -> Result<MigrationStatus, ControlError>;

    /// Starts a VM snapshot and returns without waiting for it. [`migration`](Self::migration)
    /// returns its status, and [`cancel_migration`](Self::cancel_migration) cancels it.
    ///
    /// # Errors
    /// As [`start_migration`](Self::start_migration).
    fn start_snapshot(&self, ask: &StartSnapshot) -> Result<MigrationStatus, ControlError>;

    /// Returns the status of the newest migration or VM snapshot.
    fn migration(&self) -> MigrationStatus;

    /// Cancels the migration; the guest stays here. Does not wait.
    ///
    /// # Errors
    /// [`ControlError::Refused`] if there is none that can be cancelled.
    fn cancel_migration(&self) -> Result<MigrationStatus, ControlError>;

    /// Resolves an in-doubt migration. Waits for the other side if it must be queried.
    ///
    /// # Errors
    /// [`ControlError::Refused`] if no migration is in doubt, or it is still in doubt.
    fn resolve_migration(&self, action: ResolveAction) -> Result<MigrationStatus, ControlError>;
}

/// A balloon whose guest runs in another process, so that the guest cannot be migrated here.
pub(crate) struct BalloonOnly(pub(crate) Arc<dyn BalloonControl>);

impl VmmControl for BalloonOnly {
    fn balloon(&self) -> Option<Arc<dyn BalloonControl>> {
        Some(Arc::clone(&self.0))
    }

    fn start_migration(&self, _ask: &StartMigration) -> Result<MigrationStatus, ControlError> {
        Err(not_a_vmm())
    }

    fn start_snapshot(&self, _ask: &StartSnapshot) -> Result<MigrationStatus, ControlError> {
        Err(not_a_vmm())
    }

    fn migration(&self) -> MigrationStatus {
        MigrationStatus::default()
    }

    fn cancel_migration(&self) -> Result<MigrationStatus, ControlError> {
        Err(not_a_vmm())
    }

    fn resolve_migration(&self, _action: ResolveAction) -> Result<MigrationStatus, ControlError> {
        Err(not_a_vmm())
    }
}

fn not_a_vmm() -> ControlError {
    ControlError::Refused {
        what: "this process serves only the guest's balloon".into(),
        hint: "use the guest's VMM; only guests of `aerostat run` can be migrated and saved here"
            .into(),
    }
}
