//! `aerostat restore`: runs a guest from a VM snapshot.

use std::path::PathBuf;

use clap::Args;
use control::GuestName;
use vmm::{DiskOptions, HostOptions, RestoreOptions};

use crate::cmd::run::ended;
use crate::disk_arg::disk;
use crate::guest_arg::guest_name;
use crate::host_arg::HostArgs;
use cli::failure::Failure;

/// Run a guest from a VM snapshot
///
/// The command then behaves like `aerostat run`: the guest's serial line is
/// standard input and output. The file is not modified and can be restored any
/// number of times. A damaged or truncated file, or one of another version, is
/// refused.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The snapshot file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Name of the guest; it can differ from the name in the snapshot
    #[arg(long, value_parser = guest_name)]
    name: GuestName,

    /// Run the guest immediately and load its memory on demand and in the background.
    /// The file must remain until the guest has ended. Needs root, or
    /// vm.unprivileged_userfaultfd=1
    #[arg(long, conflicts_with = "shared")]
    lazy: bool,

    /// A disk of the guest, the same file or a copy; as many as in the snapshot, in
    /// the same order
    #[arg(long = "disk", value_name = "FILE[,readonly]", value_parser = disk)]
    disks: Vec<DiskOptions>,

    /// Accept disks that differ from those in the snapshot, if their sizes match
    #[arg(long, requires = "disks")]
    accept_disks: bool,

    #[command(flatten)]
    host: HostArgs,
}

pub(crate) fn run(args: RestoreArgs) -> Result<(), Failure> {
    let options = RestoreOptions {
        host: HostOptions {
            accept_disks: args.accept_disks,
            ..args.host.options(&args.name, args.disks)?
        },
        file: args.file,
        lazy: args.lazy,
    };
    args.host.restrict_calls()?;
    ended(&options.host.name, vmm::restore(&options))
}
