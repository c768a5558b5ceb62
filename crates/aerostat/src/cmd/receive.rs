//! `aerostat receive`: takes a guest that comes from another host.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use clap::Args;
use control::{GuestName, Size};
use vmm::{DiskOptions, HostOptions, MAX_CPUS, MAX_MEMORY_BYTES, ReceiveOptions};

use crate::cmd::run::ended;
use crate::disk_arg::disk;
use crate::guest_arg::guest_name;
use crate::host_arg::HostArgs;
use crate::security_arg::SecurityArgs;
use cli::failure::Failure;

/// Waits for a guest from another host, and then runs it
///
/// The guest is moved here by `aerostat migrate NAME HOST:PORT` where it runs.
/// From then on this is what `aerostat run` is: the guest's serial line is
/// standard input and output, and it can be moved on. Where a guest fails to
/// arrive, the next one is waited for.
#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Name of the guest, the same as where it comes from, or with --guest-name
    /// any other
    #[arg(long, value_parser = guest_name)]
    name: GuestName,

    /// Name of the guest where it comes from, if it is to have another here:
    /// control socket, status and log have that of --name from its arrival on
    #[arg(long, value_name = "NAME", value_parser = guest_name)]
    guest_name: Option<GuestName>,

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

    /// How long to wait, such as 30s or 5min; for ever if it is not given
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,

    /// A disk of the guest, which both hosts can reach; as many as it had, in
    /// the same order
    #[arg(long = "disk", value_name = "FILE[,readonly]", value_parser = disk)]
    disks: Vec<DiskOptions>,

    /// Take these disks though they are not those that the guest has where it comes
    /// from: they need only be of the same sizes
    #[arg(long, requires = "disks")]
    accept_disks: bool,

    #[command(flatten)]
    host: HostArgs,
}

pub(crate) fn run(args: ReceiveArgs) -> Result<(), Failure> {
    let guest_name = args.guest_name.as_ref().unwrap_or(&args.name).to_string();
    let options = ReceiveOptions {
        guest_name,
        host: HostOptions {
            accept_disks: args.accept_disks,
            ..args.host.options(&args.name, args.disks)?
        },
        listen: args.listen,
        security: args.security.security()?,
        max_memory_bytes: args.max_memory.0,
        max_cpus: args.max_cpus,
        wait: args.wait,
    };
    // Standard output is the guest's.
    let listens = |address| diagnostics::say!("{}: waits on {address}", options.host.name);
    args.host.give_up_calls()?;
    ended(&options.host.name, vmm::receive(&options, listens))
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs();
    let mut addresses = found.map_err(|error| format!("{error}: say HOST:PORT of this host"))?;
    addresses.next().ok_or_else(|| format!("there is no address for {text}"))
}
