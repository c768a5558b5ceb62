//! Landlock: which files may be opened, created and removed.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::SandboxError;

/// The requested rules; an older kernel enforces those that it supports.
const REQUESTED_ABI: ABI = ABI::V6;

/// How many of the rules the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restricted {
    /// All rules.
    Fully,
    /// The rules that this kernel supports.
    Partly,
    /// None: the kernel has no Landlock, or it is disabled.
    Not,
}

/// Restricts this thread, and all threads that it starts, to creating, opening and removing files
/// and sockets in `directories`. They cannot read other files, use TCP, connect to abstract sockets
/// of other processes, or signal other processes. Open files stay open.
///
/// Call this while the process has one thread: threads that already run are not restricted.
///
/// # Errors
/// A directory cannot be opened, or the kernel refuses a rule that it supports.
pub fn restrict_files(directories: &[impl AsRef<Path>]) -> Result<Restricted, SandboxError> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| SandboxError::Files(error);
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(REQUESTED_ABI))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(REQUESTED_ABI)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(REQUESTED_ABI)))
        .and_then(Ruleset::create);
    let mut ruleset = ruleset.map_err(|error| failed(error.into()))?;
    for directory in directories {
        let directory = PathFd::new(directory.as_ref()).map_err(|error| failed(error.into()))?;
        let rule = PathBeneath::new(directory, in_directories());
        ruleset = ruleset.add_rule(rule).map_err(|error| failed(error.into()))?;
    }
    let status = ruleset.restrict_self().map_err(|error| failed(error.into()))?;
    Ok(enforcement(&status))
}

/// Sockets and state files are created and removed; a directory is opened to lock it.
fn in_directories() -> BitFlags<AccessFs> {
    AccessFs::MakeSock
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::ReadDir
        | AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
}

fn enforcement(status: &RestrictionStatus) -> Restricted {
    match status.ruleset {
        RulesetStatus::FullyEnforced => Restricted::Fully,
        RulesetStatus::PartiallyEnforced => Restricted::Partly,
        RulesetStatus::NotEnforced => Restricted::Not,
    }
}
