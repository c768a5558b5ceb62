//! `aerostat receive`: receives a guest from another host.

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

/// Receive a guest from another host, and then run it
///
/// The source is `aerostat migrate NAME HOST:PORT`. After the guest's arrival the
/// command behaves like `aerostat run`: the guest's serial line is standard input
/// and output, and the guest can be migrated again. If a migration fails, the
/// command waits for the next.
#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Name of the guest on this host; the same as at the source, unless --guest-name
    /// is given
    #[arg(long, value_parser = guest_name)]
    name: GuestName,

    /// Name of the guest at the source, if different: from its arrival on, control
    /// socket, status and log use the name of --name
    #[arg(long, value_name = "NAME", value_parser = guest_name)]
    guest_name: Option<GuestName>,

    /// Address to listen on; with port 0 a free port is chosen and printed
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    listen: SocketAddr,

    #[command(flatten)]
    security: SecurityArgs,

    /// Largest guest memory to accept
    #[arg(long, value_name = "SIZE", default_value_t = Size(MAX_MEMORY_BYTES))]
    max_memory: Size,

    /// Largest number of vCPUs to accept
    #[arg(long, value_name = "N", default_value_t = MAX_CPUS,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    max_cpus: u8,

    /// How long to wait, such as 30s or 5min [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,

    /// A disk of the guest, on storage shared by both hosts; as many as at the source,
    /// in the same order
    #[arg(long = "disk", value_name = "FILE[,readonly]", value_parser = disk)]
    disks: Vec<DiskOptions>,

    /// Accept disks that differ from those at the source, if their sizes match
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
    // Standard output is the guest's console.
    let on_listening =
        |address| diagnostics::log_line!("{}: listening on {address}", options.host.name);
    args.host.restrict_calls()?;
    ended(&options.host.name, vmm::receive(&options, on_listening))
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs();
    let mut addresses = found.map_err(|error| format!("{error}: use HOST:PORT of this host"))?;
    addresses.next().ok_or_else(|| format!("{text} has no address"))
}
