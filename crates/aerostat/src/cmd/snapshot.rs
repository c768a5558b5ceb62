//! `aerostat snapshot`: writes a VM snapshot while the guest runs.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use control::Size;
use control::api::{MigrationState, MigrationStatus, MigrationSummary, StartSnapshot};

use crate::cmd::migrate::{interruption, watch};
use crate::guest_arg::GuestArg;
use crate::security_arg::absolute;
use cli::failure::{Exit, Failure};
use cli::output::{print, print_json};

/// Write a snapshot of a guest of `aerostat run` to a file
///
/// The guest runs while most of its memory is written. It is paused for the pages
/// it dirtied since, and until the file is on disk; then it continues. Free memory,
/// memory in the balloon and zeros are holes in the file. Disks are not included.
/// `aerostat restore` runs the snapshot. Ctrl-C cancels the snapshot and leaves no
/// file.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// The file; it must not exist. The VMM creates it
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Drop the guest's caches first, so that they are not written
    #[arg(long)]
    drop_caches: bool,

    /// Write free memory too
    #[arg(long)]
    write_free: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &SnapshotArgs) -> Result<(), Failure> {
    let client = args.guest.connect()?;
    let interrupted = interruption()?;
    client.start_snapshot(&StartSnapshot {
        path: absolute(&args.file)?,
        drop_caches: args.drop_caches,
        write_free_pages: args.write_free,
    })?;
    let status = watch(&client, &interrupted)?;
    match (status.state, &status.summary) {
        (MigrationState::Saved, _) if args.json => print_json(&status),
        (MigrationState::Saved, Some(summary)) => print(&text(args, summary)),
        (MigrationState::Saved, None) => print(&format!("{}: saved\n", args.guest)),
        _ => Err(not_saved(args, &status)),
    }
}

fn not_saved(args: &SnapshotArgs, status: &MigrationStatus) -> Failure {
    let why = status.error.as_deref().unwrap_or("unknown reason");
    let (what, hint) = match status.state {
        MigrationState::Stuck => {
            ("the guest could not be resumed", Some("see the VMM's log".to_owned()))
        }
        _ => ("the snapshot failed, the guest still runs", status.hint.clone()),
    };
    let what = format!("{}: {what}: {why}", args.guest);
    let hint = hint.unwrap_or_else(|| "fix the cause, then try again".into());
    Failure { what, hint, exit: Exit::Failed }
}

fn text(args: &SnapshotArgs, summary: &MigrationSummary) -> String {
    let (guest, file) = (&args.guest, args.file.display());
    let mut text = format!(
        "{guest}: saved to {file} in {:.0} ms, downtime {:.1} ms\n",
        summary.total_ms, summary.downtime.total_ms
    );
    for (size, what) in [
        (summary.memory_bytes, "guest memory"),
        (summary.wire_bytes, "written"),
        (summary.free_bytes, "holes: free"),
        (summary.balloon_bytes, "holes: in the balloon"),
        (summary.zero_bytes, "holes: zeros"),
    ] {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {:>12}  {what}", Size(size).to_string());
    }
    text
}
