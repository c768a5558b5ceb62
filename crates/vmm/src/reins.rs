//! Who may stop a guest and let it go on: its operator, or a migration.

use std::sync::{MutexGuard, PoisonError};

use crate::error::Error;
use crate::machine::Machine;

/// Who has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reins {
    /// The operator, who may have paused the guest.
    Operator { paused: bool },
    /// A migration, of which nobody else may resume the guest: it may run on the other side.
    Migration,
}

impl Machine {
    /// The operator pauses the guest, or lets it go on; refused while it is moved.
    pub(crate) fn operator_pauses(&self, pause: bool) {
        let mut reins = self.reins();
        if *reins == Reins::Migration {
            tracing::warn!("operator: the guest is being moved; it is not paused or resumed");
            return;
        }
        if pause {
            self.pause()
        } else {
            self.resume()
        }
        *reins = Reins::Operator { paused: pause };
        tracing::info!("{}", if pause { "paused" } else { "resumed" });
    }

    /// Takes the reins for a migration.
    ///
    /// # Errors
    /// Another one has them, or the guest is paused.
    pub(crate) fn take_reins(&self) -> Result<(), Error> {
        let mut reins = self.reins();
        let what = match *reins {
            Reins::Operator { paused: false } => {
                *reins = Reins::Migration;
                return Ok(());
            }
            Reins::Operator { paused: true } => "the guest is paused; let it go on first",
            Reins::Migration => "the guest is being moved already",
        };
        Err(Error::Option { what: what.into() })
    }

    /// Gives the reins of a guest that runs back to its operator.
    pub(crate) fn return_reins(&self) {
        *self.reins() = Reins::Operator { paused: false };
    }

    /// One word is changed under it.
    fn reins(&self) -> MutexGuard<'_, Reins> {
        self.reins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
