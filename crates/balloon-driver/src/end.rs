//! How the work on a request ends early.

use balloon_abi::request::Outcome;

use crate::inbox::Stop;

/// How an unsuccessful request ends.
pub(crate) enum End {
    /// It was stopped.
    Stop(Stop),
    /// It failed; the number is the answer's first value.
    Outcome(Outcome, u64),
}

impl From<Stop> for End {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}
