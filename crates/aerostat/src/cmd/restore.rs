//! `aerostat restore`: runs a guest from where it was when it was written to a file.

use std::path::PathBuf;

use clap::Args;
use control::GuestName;
use vmm::{DiskOptions, HostOptions, RestoreOptions};

use crate::cmd::run::ended;
use crate::disk_arg::disk;
use crate::guest_arg::guest_name;
use crate::host_arg::HostArgs;
use cli::failure::Failure;

/// Runs a guest that `aerostat snapshot` has written to a file
///
/// From then on this is what `aerostat run` is: the guest's serial line is
/// standard input and output. The file stays as it is, and may be restored as
/// often as is liked. One that is damaged, cut short, or of another version is
/// refused.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Name of the guest, which may be another than it had
    #[arg(long, value_parser = guest_name)]
    name: GuestName,

    /// Run it at once, and read its memory when it touches it, and meanwhile in
    /// order. The file must stay until the guest has ended. Needs root, or
    /// vm.unprivileged_userfaultfd=1
    #[arg(long, conflicts_with = "shared")]
    lazy: bool,

    /// A disk of the guest, the same file as before or a copy; as many as it had, in
    /// the same order
    #[arg(long = "disk", value_name = "FILE[,readonly]", value_parser = disk)]
    disks: Vec<DiskOptions>,

    /// Take these disks though they are not those that the guest had: they need only
    /// be of the same sizes
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
    args.host.give_up_calls()?;
    ended(&options.host.name, vmm::restore(&options))
}
