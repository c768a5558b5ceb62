//! Landlock: which files may still be opened, made and removed.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::SandboxError;

/// Rules that are asked for; a kernel that knows fewer enforces those it knows.
const WANTED: ABI = ABI::V6;

/// How much of it the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restricted {
    /// All that was asked for.
    Fully,
    /// What this kernel knows of it.
    Partly,
    /// Nothing: the kernel has no Landlock, or it is switched off.
    Not,
}

/// From now on this thread, and all that it starts, may only make, open and
/// remove files, sockets and nothing else in `directories`, and read nothing else
/// anywhere. Neither may they use TCP, abstract sockets of others, or signal other
/// processes. What is open stays open.
///
/// To be called while the process has one thread, since threads that run already
/// are not restricted.
///
/// # Errors
/// A directory cannot be opened, or the kernel refuses a rule that it knows.
pub fn restrict_files(directories: &[impl AsRef<Path>]) -> Result<Restricted, SandboxError> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| SandboxError::Files(error);
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(WANTED)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(WANTED)))
        .and_then(Ruleset::create);
    let mut ruleset = ruleset.map_err(|error| failed(error.into()))?;
    for directory in directories {
        let directory = PathFd::new(directory.as_ref()).map_err(|error| failed(error.into()))?;
        let rule = PathBeneath::new(directory, in_directories());
        ruleset = ruleset.add_rule(rule).map_err(|error| failed(error.into()))?;
    }
    let status = ruleset.restrict_self().map_err(|error| failed(error.into()))?;
    Ok(how_much(&status))
}

/// Sockets and state files are made and removed; a directory is opened to be locked.
fn in_directories() -> BitFlags<AccessFs> {
    AccessFs::MakeSock
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::ReadDir
        | AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
}

fn how_much(status: &RestrictionStatus) -> Restricted {
    match status.ruleset {
        RulesetStatus::FullyEnforced => Restricted::Fully,
        RulesetStatus::PartiallyEnforced => Restricted::Partly,
        RulesetStatus::NotEnforced => Restricted::Not,
    }
}
