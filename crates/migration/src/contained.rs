//! Contains panics of this process's threads: a fault of this side, which must not lose a guest.

use crate::error::MigrationError;

/// Runs `work`. A panic becomes an error of the operation `what`.
pub(crate) fn contained<T>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, MigrationError>,
) -> Result<T, MigrationError> {
    let failed =
        |panicked: diagnostics::Panicked| Err(MigrationError::machine(what)(panicked.into()));
    diagnostics::contain(work).unwrap_or_else(failed)
}

/// Runs optional work. A panic is only logged.
pub(crate) fn attempted(work: impl FnOnce()) {
    let _ = diagnostics::contain(work);
}

/// The number of panics of the process at one moment. A guest is not moved to another host after
/// another thread has panicked and left its devices, vCPUs or memory in an unknown state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PanicWatch(u64);

impl PanicWatch {
    /// Watches from now on.
    pub(crate) fn start() -> Self {
        Self(diagnostics::panics())
    }

    /// # Errors
    /// A thread has panicked since.
    pub(crate) fn check(self) -> Result<(), MigrationError> {
        if diagnostics::panics() == self.0 {
            return Ok(());
        }
        let why = "a thread of this process panicked meanwhile; see its log";
        Err(MigrationError::machine("moving the guest")(why.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_of_this_side() {
        assert_eq!(contained("moving", || Ok(3)).unwrap(), 3);
        let error = contained::<()>("moving", || panic!("page 7")).unwrap_err().chain();
        assert!(error.starts_with("VMM: moving: a thread panicked"), "{error}");
        assert!(error.ends_with("page 7"), "{error}");
    }
}
