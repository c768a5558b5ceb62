//! A guest whose back end dies.

use super::Outcome;
use super::subject::Subject;
use crate::error::Result;

/// What the balloon holds then.
const INFLATED_MIB: u64 = 200;

/// What the guest has beside that.
const USED_MIB: u64 = 100;

pub(super) fn outlives_the_back_end(subject: &mut Subject) -> Result<Outcome> {
    subject.balloon(INFLATED_MIB)?;
    subject.kill_back_end()?;
    let verified_mib = subject.use_and_verify(USED_MIB, 41)?;
    Ok(Outcome::Passed(format!(
        "killed with {INFLATED_MIB} MiB in the balloon, the guest goes on; {verified_mib} MiB verified"
    )))
}
