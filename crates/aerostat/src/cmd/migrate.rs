//! `aerostat migrate`: migrates a guest to another host.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::Args;
use cli::migration_summary;
use control::api::{MigrationState, MigrationStatus, StartMigration};
use control::{Client, ControlError, Size};

use crate::guest_arg::GuestArg;
use crate::security_arg::SecurityArgs;
use cli::failure::{Exit, Failure};
use cli::output::{print, print_json};
use cli::progress::Bar;

/// How often to poll the migration's progress.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Largest default number of connections.
const MAX_DEFAULT_CONNECTIONS: u8 = 4;

/// Migrate a guest of `aerostat run` to another host while it runs
///
/// `aerostat receive` must be running on the other host. Free memory, memory in
/// the balloon and zeros are not sent. Ctrl-C cancels the migration; the guest
/// then continues to run here.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// Address on which `aerostat receive` listens
    #[arg(value_name = "HOST:PORT")]
    to: String,

    #[command(flatten)]
    security: SecurityArgs,

    /// Drop the guest's caches first, so that they are not sent
    #[arg(long)]
    drop_caches: bool,

    /// Send free memory too
    #[arg(long)]
    send_free: bool,

    /// Longest downtime of the guest
    #[arg(long, value_name = "TIME", default_value = "300ms",
          value_parser = humantime::parse_duration)]
    max_downtime: Duration,

    /// TCP connections, 1 to 16 [default: one per CPU of this host, up to 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    connections: Option<u8>,

    /// Bandwidth limit in bytes per second, such as 100MiB
    #[arg(long, value_name = "SIZE")]
    bandwidth: Option<Size>,

    /// Compress pages with zstd at this level
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(u8).range(1..=19))]
    compress: Option<u8>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &MigrateArgs) -> Result<(), Failure> {
    let client = args.guest.connect()?;
    let interrupted = interruption()?;
    client.start_migration(&StartMigration {
        to: args.to.clone(),
        tls: args.security.paths()?,
        connections: Some(args.connections.unwrap_or_else(default_connections)),
        max_downtime_ms: Some(u64::try_from(args.max_downtime.as_millis()).unwrap_or(u64::MAX)),
        bandwidth_bytes_per_s: args.bandwidth.map(|size| size.0),
        compression: args.compress,
        max_rounds: None,
        drop_caches: args.drop_caches,
        send_free_pages: args.send_free,
    })?;
    let status = watch(&client, &interrupted)?;
    if args.json && status.state == MigrationState::Moved {
        return print_json(&status);
    }
    match (status.state, &status.summary) {
        (MigrationState::Moved, Some(summary)) => {
            print(&migration_summary::text(&args.guest.to_string(), &args.to, summary))
        }
        (MigrationState::Moved, None) => print(&format!("{}: migrated\n", args.guest)),
        _ => Err(not_moved(args, &status)),
    }
}

/// Returns a flag that Ctrl-C sets instead of ending the process.
pub(crate) fn interruption() -> Result<Arc<AtomicBool>, Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&interrupted))
        .map_err(|error| Failure::new(&error, "check the limits of this user"))?;
    Ok(interrupted)
}

/// Returns the default number of connections: more than CPUs only adds context switches.
fn default_connections() -> u8 {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    u8::try_from(cpus).unwrap_or(u8::MAX).min(MAX_DEFAULT_CONNECTIONS)
}

/// Shows the progress until the migration has ended.
pub(crate) fn watch(client: &Client, interrupted: &AtomicBool) -> Result<MigrationStatus, Failure> {
    let bar = Bar::start();
    let mut cancelled = false;
    loop {
        let status = client.migration();
        let status = match status {
            Ok(status) => status,
            Err(error) => {
                bar.end();
                return Err(lost(error));
            }
        };
        if status.state.is_over() {
            bar.end();
            return Ok(status);
        }
        if interrupted.load(Ordering::Relaxed) && !cancelled {
            // If the migration has ended in the meantime, the next poll returns that.
            let _ = client.cancel_migration();
            cancelled = true;
        }
        if let Some(phase) = status.phase {
            let name = match phase {
                control::api::MigrationPhase::Round => format!("round {}", status.round),
                _ => phase.as_str().replace('-', " "),
            };
            bar.show(&name, status.done_pages, status.of_pages, Size(status.wire_bytes));
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn lost(error: ControlError) -> Failure {
    let hint = "the guest's VMM has exited; see its log and the destination";
    Failure { hint: hint.into(), ..Failure::from(error) }
}

fn not_moved(args: &MigrateArgs, status: &MigrationStatus) -> Failure {
    let why = status.error.as_deref().unwrap_or("unknown reason");
    let (what, hint) = match status.state {
        MigrationState::InDoubt => (
            "the migration is in doubt; the guest is paused here and may run at the destination",
            format!("run `aerostat resolve {}` to query the destination", args.guest),
        ),
        MigrationState::Stuck => (
            "the guest is here but could not be resumed",
            format!("fix the cause, then run `aerostat resolve {}` to retry", args.guest),
        ),
        _ => (
            "the migration failed, the guest still runs here",
            status.hint.clone().unwrap_or_else(|| "fix the cause, then try again".into()),
        ),
    };
    Failure { what: format!("{}: {what}: {why}", args.guest), hint, exit: Exit::Failed }
}
