//! `aerostat cancel`: cancels a request to the guest.

use clap::Args;

use crate::guest_arg::GuestArg;
use cli::failure::Failure;
use cli::output::{print, print_json};

/// Cancel the request that a guest is processing
#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &CancelArgs) -> Result<(), Failure> {
    let cancelled = args.guest.connect()?.cancel()?;
    if args.json {
        return print_json(&cancelled);
    }
    let (id, command) = (cancelled.id, &cancelled.command);
    print(&format!("{}: cancelled {command} (request {id})\n", args.guest))
}
