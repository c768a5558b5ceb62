//! Who may stop a guest and let it go on: its operator, or a migration.

use std::sync::{MutexGuard, PoisonError};

use crate::error::Error;
use crate::machine::Machine;

/// Who has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum RunControl {
    /// Nobody: the guest was not started here. One that came, and is in doubt, may run where it
    /// came from, so it can be neither moved on nor written to a file, which would let it go on.
    #[default]
    Nobody,
    /// The operator, who may have paused the guest.
    Operator { paused: bool },
    /// A migration, of which nobody else may resume the guest: it may run on the other side.
    Migration,
}

impl RunControl {
    fn is_operators(self) -> Result<(), Error> {
        let what = match self {
            Self::Operator { .. } => return Ok(()),
            Self::Nobody => "the guest was not started here",
            Self::Migration => "the guest is being moved already",
        };
        Err(Error::Option { what: what.into() })
    }

    fn take(&mut self) -> Result<(), Error> {
        self.is_operators()?;
        if *self == (Self::Operator { paused: true }) {
            return Err(Error::Option { what: "the guest is paused; let it go on first".into() });
        }
        *self = Self::Migration;
        Ok(())
    }
}

impl Machine {
    /// The operator pauses the guest, or lets it go on; refused while it is moved.
    pub(crate) fn operator_pauses(&self, pause: bool) {
        let mut run_control = self.run_control();
        if let Err(error) = run_control.is_operators() {
            tracing::warn!(%error, "the guest is not paused or resumed");
            return;
        }
        if !pause {
            self.resume();
        } else if let Err(error) = self.pause() {
            tracing::error!(%error, "the guest is not paused, and goes on");
            return;
        }
        *run_control = RunControl::Operator { paused: pause };
        tracing::info!("{}", if pause { "paused" } else { "resumed" });
    }

    /// Runs a guest that has not run here yet, and gives its run_control to its operator: not before,
    /// since it may be known only now that it runs here. Whoever asks for them meanwhile waits:
    /// the guest may be heard of as soon as it runs.
    pub(crate) fn start(&self) {
        let mut run_control = self.run_control();
        self.resume();
        *run_control = RunControl::Operator { paused: false };
    }

    /// Takes the run_control for a migration.
    ///
    /// # Errors
    /// Another one has them, or the guest is paused.
    pub(crate) fn take_control(&self) -> Result<(), Error> {
        self.run_control().take()
    }

    /// Gives the run_control of a guest that runs to its operator.
    pub(crate) fn return_control(&self) {
        *self.run_control() = RunControl::Operator { paused: false };
    }

    /// One word is changed under it.
    fn run_control(&self) -> MutexGuard<'_, RunControl> {
        self.run_control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that came and is in doubt may run on the other side: who could move it, or write it
    /// to a file, would have two.
    #[test]
    fn nobody_has_the_reins_of_a_guest_that_was_not_started() {
        let mut run_control = RunControl::default();
        assert!(run_control.is_operators().is_err() && run_control.take().is_err());
        assert_eq!(run_control, RunControl::Nobody);
    }

    #[test]
    fn a_migration_has_them_alone_and_not_of_a_guest_that_is_paused() {
        let mut run_control = RunControl::Operator { paused: true };
        assert!(run_control.take().is_err() && run_control.is_operators().is_ok());
        run_control = RunControl::Operator { paused: false };
        run_control.take().unwrap();
        assert!(run_control.take().is_err() && run_control.is_operators().is_err());
    }
}
