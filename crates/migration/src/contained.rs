//! Panics of this process's own threads: a fault of this side, which costs no guest.

use crate::error::MigrationError;

/// Does `work`; where it panics, `what` failed.
pub(crate) fn contained<T>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, MigrationError>,
) -> Result<T, MigrationError> {
    let failed =
        |panicked: diagnostics::Panicked| Err(MigrationError::machine(what)(panicked.into()));
    diagnostics::contain(work).unwrap_or_else(failed)
}

/// Does what nothing depends on; a panic of it is in the log.
pub(crate) fn attempted(work: impl FnOnce()) {
    let _ = diagnostics::contain(work);
}

/// The panics of the process at one moment. A guest whose devices, processors or memory another
/// thread left half done is not given to another host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PanicWatch(u64);

impl PanicWatch {
    /// From now on.
    pub(crate) fn start() -> Self {
        Self(diagnostics::panics())
    }

    /// # Errors
    /// A thread has panicked since.
    pub(crate) fn check(self) -> Result<(), MigrationError> {
        if diagnostics::panics() == self.0 {
            return Ok(());
        }
        let why = "a thread of this process panicked meanwhile; its log says which";
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
        assert!(error.starts_with("monitor: moving: it panicked"), "{error}");
        assert!(error.ends_with("page 7"), "{error}");
    }
}
