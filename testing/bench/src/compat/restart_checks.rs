//! Check of a guest whose back end is killed.

use super::Outcome;
use super::subject::Subject;
use crate::error::Result;

/// Size of the balloon then.
const INFLATED_MIB: u64 = 200;

/// Memory that the guest fills and verifies, in MiB.
const USED_MIB: u64 = 100;

pub(super) fn outlives_the_back_end(subject: &mut Subject) -> Result<Outcome> {
    subject.balloon(INFLATED_MIB)?;
    subject.kill_back_end()?;
    let verified_mib = subject.use_and_verify(USED_MIB, 41)?;
    Ok(Outcome::Passed(format!(
        "killed with {INFLATED_MIB} MiB in the balloon, the guest continues; {verified_mib} MiB verified"
    )))
}
