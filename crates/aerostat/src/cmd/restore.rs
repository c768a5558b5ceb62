//! `aerostat restore`: runs a guest from where it was when it was written to a file.

use std::path::PathBuf;

use clap::Args;
use control::GuestName;
use vmm::{DiskOptions, MemoryKind, RestoreOptions};

use crate::cmd::run::{control_socket, ended, give_up_calls};
use crate::cmd::vhost_user::{Partial, Release, guest_name};
use crate::disk_arg::disk;
use crate::failure::Failure;

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

    /// Keep the guest's memory in a file that other processes can be given
    #[arg(long)]
    shared: bool,

    /// Use huge pages for the guest's memory: transparent ones, or with --shared
    /// those that the host has set aside
    #[arg(long)]
    huge: bool,

    /// When pages that the guest gave are released
    #[arg(long, value_enum, default_value_t = Release::Background)]
    release: Release,

    /// What becomes of parts of the host's huge pages
    #[arg(long, value_enum, default_value_t = Partial::Split)]
    partial_huge: Partial,

    /// Control socket; by the name, in the runtime directory, if it is not given
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Leave the process all system calls (no seccomp)
    #[arg(long)]
    no_seccomp: bool,
}

pub(crate) fn run(args: RestoreArgs) -> Result<(), Failure> {
    let options = RestoreOptions {
        control: control_socket(args.control, &args.name)?,
        name: args.name.to_string(),
        file: args.file,
        lazy: args.lazy,
        disks: args.disks,
        memory: MemoryKind { shared: args.shared, huge: args.huge },
        release: args.release.into(),
        partial_huge: args.partial_huge.into(),
    };
    give_up_calls(args.no_seccomp)?;
    match vmm::restore(&options) {
        Err(error @ vmm::Error::Migration(_)) => {
            Err(Failure::new(&error, "give a file of `aerostat snapshot` from such a host"))
        }
        end => ended(&options.name, end),
    }
}
