//! The commands, one file each: its arguments, and `run`, which calls the room
//! that does the work and prints what it says.

mod balloon;
mod cancel;
mod drop_caches;
mod free_pages;
mod migrate;
mod receive;
mod resolve;
mod restore;
mod run;
mod snapshot;
mod status;
mod vhost_user;
mod watch;

use clap::Subcommand;

use crate::log::LogLevel;
use cli::failure::Failure;

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Balloon(balloon::BalloonArgs),
    Cancel(cancel::CancelArgs),
    DropCaches(drop_caches::DropCachesArgs),
    FreePages(free_pages::FreePagesArgs),
    Migrate(migrate::MigrateArgs),
    Receive(receive::ReceiveArgs),
    Restore(restore::RestoreArgs),
    Run(run::RunArgs),
    Resolve(resolve::ResolveArgs),
    Snapshot(snapshot::SnapshotArgs),
    Status(status::StatusArgs),
    VhostUser(vhost_user::VhostUserArgs),
}

impl Command {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self {
            Self::Balloon(args) => balloon::run(&args),
            Self::Cancel(args) => cancel::run(&args),
            Self::DropCaches(args) => drop_caches::run(&args),
            Self::FreePages(args) => free_pages::run(&args),
            Self::Migrate(args) => migrate::run(&args),
            Self::Receive(args) => receive::run(args),
            Self::Restore(args) => restore::run(args),
            Self::Run(args) => run::run(args),
            Self::Resolve(args) => resolve::run(&args),
            Self::Snapshot(args) => snapshot::run(&args),
            Self::Status(args) => status::run(&args),
            Self::VhostUser(args) => vhost_user::run(&args),
        }
    }

    /// Whether it gives up files or system calls, before which it has no thread beside its own, and
    /// starts the log itself.
    pub(crate) fn gives_up(&self) -> bool {
        matches!(self, Self::Receive(_) | Self::Restore(_) | Self::Run(_) | Self::VhostUser(_))
    }

    /// What is logged without `-v`.
    pub(crate) fn log_level(&self) -> LogLevel {
        match self {
            Self::VhostUser(_) => LogLevel::Info,
            _ => LogLevel::Warn,
        }
    }
}
