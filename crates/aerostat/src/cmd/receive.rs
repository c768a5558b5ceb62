//! `aerostat receive`: takes a guest that comes from another host.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use control::{GuestName, Size};
use vmm::{DiskOptions, MAX_CPUS, MAX_MEMORY_BYTES, MemoryKind, ReceiveOptions};

use crate::cmd::run::{control_socket, ended, give_up_calls};
use crate::cmd::vhost_user::{Partial, Release, guest_name};
use crate::disk_arg::disk;
use crate::failure::Failure;
use crate::security_arg::SecurityArgs;

/// Waits for a guest from another host, and then runs it
///
/// The guest is moved here by `aerostat migrate NAME HOST:PORT` where it runs.
/// From then on this is what `aerostat run` is: the guest's serial line is
/// standard input and output, and it can be moved on. Where a guest fails to
/// arrive, the next one is waited for.
#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Name of the guest, the same as where it comes from
    #[arg(long, value_parser = guest_name)]
    name: GuestName,

    /// Where to wait; port 0 is any that is free, which is told
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    listen: SocketAddr,

    #[command(flatten)]
    security: SecurityArgs,

    /// Memory that the guest may have
    #[arg(long, value_name = "SIZE", default_value_t = Size(MAX_MEMORY_BYTES))]
    max_memory: Size,

    /// Processors that the guest may have
    #[arg(long, value_name = "N", default_value_t = MAX_CPUS,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    max_cpus: u8,

    /// A disk of the guest, which both hosts can reach; as many as it had, in
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

    /// How long to wait, such as 30s or 5min; for ever if it is not given
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,

    /// Control socket; by the name, in the runtime directory, if it is not given
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Leave the process all system calls (no seccomp)
    #[arg(long)]
    no_seccomp: bool,
}

pub(crate) fn run(args: ReceiveArgs) -> Result<(), Failure> {
    let options = ReceiveOptions {
        control: control_socket(args.control, &args.name)?,
        name: args.name.to_string(),
        listen: args.listen,
        security: args.security.security()?,
        max_memory_bytes: args.max_memory.0,
        max_cpus: args.max_cpus,
        disks: args.disks,
        memory: MemoryKind { shared: args.shared, huge: args.huge },
        release: args.release.into(),
        partial_huge: args.partial_huge.into(),
        wait: args.wait,
    };
    // Standard output is the guest's.
    let listens = |address| eprintln!("{}: waits on {address}", options.name);
    give_up_calls(args.no_seccomp)?;
    ended(&options.name, vmm::receive(&options, listens))
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let mut addresses = text.to_socket_addrs().map_err(|error| error.to_string())?;
    addresses.next().ok_or_else(|| "there is no such address".into())
}
