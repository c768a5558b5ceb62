//! `aerostat snapshot`: writes a guest to a file while it runs.

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

/// Writes a guest of `aerostat run` to a file, and lets it go on
///
/// The guest runs while most of its memory is written, and stands still for what
/// it wrote meanwhile and until all of it is on disk. Free memory, memory in the
/// balloon and zeros are holes in the file. Its disks are not in it. `aerostat
/// restore` runs what is in the file. Ctrl-C ends the snapshot, and leaves no file.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// The file, which its monitor makes and which must not be there yet
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Have the guest drop its caches first, which are not written then
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
        (MigrationState::Saved, None) => print(&format!("{}: written\n", args.guest)),
        _ => Err(not_saved(args, &status)),
    }
}

fn not_saved(args: &SnapshotArgs, status: &MigrationStatus) -> Failure {
    let why = status.error.as_deref().unwrap_or("nobody knows why");
    let (what, hint) = match status.state {
        MigrationState::Stuck => ("the guest could not be resumed", Some("see its log".to_owned())),
        _ => ("there is no snapshot, and the guest runs on", status.hint.clone()),
    };
    let what = format!("{}: {what}: {why}", args.guest);
    let hint = hint.unwrap_or_else(|| "see the reason, and try again".into());
    Failure { what, hint, exit: Exit::Failed }
}

fn text(args: &SnapshotArgs, summary: &MigrationSummary) -> String {
    let (guest, file) = (&args.guest, args.file.display());
    let mut text = format!(
        "{guest}: written to {file} in {:.0} ms, downtime {:.1} ms\n",
        summary.total_ms, summary.downtime.total_ms
    );
    for (size, what) in [
        (summary.memory_bytes, "memory of the guest"),
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
