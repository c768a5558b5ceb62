//! The commands, one file each, with its arguments and a `run` function.

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

/// The subcommands.
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

    /// Returns whether the command restricts its files or system calls. It must be single-threaded
    /// until then, so it starts the log thread itself.
    pub(crate) fn restricts_itself(&self) -> bool {
        matches!(self, Self::Receive(_) | Self::Restore(_) | Self::Run(_) | Self::VhostUser(_))
    }

    /// Returns the log level without `-v`.
    pub(crate) fn log_level(&self) -> LogLevel {
        match self {
            Self::VhostUser(_) => LogLevel::Info,
            _ => LogLevel::Warn,
        }
    }
}
