//! `aerostat status`: shows one guest, or all guests in a table.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::Args;
use control::api::{
    BalloonChange, Faults, HoldState, MAX_STATS_INTERVAL_MS, MIN_STATS_INTERVAL_MS, MigrationPhase,
    MigrationSide, MigrationState, MigrationStatus, ReportsStatus, RequestStatus, StatsStatus,
    Status,
};
use control::{Client, ControlError, Size, list_sockets, runtime_dir};
use humantime::format_duration;
use serde::Serialize;

use super::watch;
use crate::guest_arg::GuestArg;
use cli::failure::Failure;
use cli::output::{json, plural, print, print_json};

/// Show one guest, or all guests in a table
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Name of the guest, or the path of its control socket [default: all guests]
    guest: Option<GuestArg>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Repeat every SECONDS, with fresh guest statistics
    #[arg(
        long, value_name = "SECONDS", requires = "guest", num_args = 0..=1,
        default_missing_value = "2", value_parser = period
    )]
    watch: Option<Duration>,
}

/// Parses a polling interval in seconds, which may have a fraction.
fn period(text: &str) -> Result<Duration, String> {
    let limits =
        Duration::from_millis(MIN_STATS_INTERVAL_MS)..=Duration::from_millis(MAX_STATS_INTERVAL_MS);
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .filter(|period| limits.contains(period))
        .ok_or_else(|| "use seconds from 0.1 to 86400".into())
}

/// Guests queried concurrently for the table, so that the timeouts of hanging ones do not add up.
const CONCURRENT_QUERIES: usize = 32;

/// Timeout for each guest in the table, so that one that hangs does not delay the table for long.
const ROW_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &StatusArgs) -> Result<(), Failure> {
    match &args.guest {
        Some(guest) => {
            let client = guest.connect()?;
            let show = |status: &Status| match args.json {
                true => json(status),
                false => Ok(details(status)),
            };
            match args.watch {
                Some(period) => watch::run(&client, period, show),
                None if args.json => print(&show(&client.status()?)?),
                None => {
                    let status = client.status()?;
                    // A server of an older version has no such endpoint.
                    let newest =
                        client.migration().ok().and_then(|status| migration(guest, &status));
                    print(&(details(&status) + &newest.unwrap_or_default()))
                }
            }
        }
        None => {
            let rows = all()?;
            if args.json { print_json(&rows) } else { print(&table(&rows)?) }
        }
    }
}

/// A row of the table.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    socket: PathBuf,
    /// `running`, `waiting` (for a migrating guest), `dead`, `unreachable`.
    state: &'static str,
    /// Its status, if it responds.
    status: Option<Status>,
    /// Why it does not respond.
    error: Option<String>,
}

fn all() -> Result<Vec<Row>, Failure> {
    let sockets = list_sockets()?;
    let mut rows = Vec::new();
    for some in sockets.chunks(CONCURRENT_QUERIES) {
        thread::scope(|scope| {
            let asked = some.iter().map(|(name, socket)| {
                let ask = move || row(name.to_string(), socket.clone());
                // If no thread can be started, they are queried in sequence.
                thread::Builder::new().spawn_scoped(scope, ask).map_err(|_| Box::new(ask()))
            });
            let asked: Vec<_> = asked.collect();
            rows.extend(asked.into_iter().filter_map(|asked| match asked {
                Ok(thread) => thread.join().ok(),
                Err(row) => Some(*row),
            }));
        });
    }
    Ok(rows)
}

fn row(name: String, socket: PathBuf) -> Row {
    match ask(&socket) {
        Ok(status) => Row { name, socket, state: "running", status: Some(status), error: None },
        Err(error) => {
            let state = match error {
                ControlError::Dead { .. } | ControlError::NotFound { .. } => "dead",
                ControlError::Answered { status: 409, .. } => "waiting",
                _ => "unreachable",
            };
            Row { name, socket, state, status: None, error: Some(error.to_string()) }
        }
    }
}

fn ask(socket: &Path) -> Result<Status, ControlError> {
    Client::connect(socket)?.with_answer_timeout(ROW_TIMEOUT).status()
}

const HEAD: [&str; 8] =
    ["NAME", "STATE", "DRIVER", "MEMORY", "BALLOON", "TARGET", "RESIDENT", "FAULTS"];

fn table(rows: &[Row]) -> Result<String, Failure> {
    if rows.is_empty() {
        return Ok(format!("no guests in {}\n", runtime_dir()?.display()));
    }
    let mut cells: Vec<[String; 8]> = vec![HEAD.map(String::from)];
    cells.extend(rows.iter().map(row_cells));
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &cells {
        let line: Vec<_> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += line.join("  ").trim_end();
        text.push('\n');
    }
    Ok(text)
}

fn row_cells(row: &Row) -> [String; 8] {
    let mut cells: [String; 8] = std::array::from_fn(|_| "-".into());
    cells[0].clone_from(&row.name);
    cells[1] = row.state.into();
    if let Some(status) = &row.status {
        cells[2] = driver(status).into();
        cells[3] = Size(status.guest.memory_bytes).to_string();
        cells[4] = Size(status.balloon.actual_bytes).to_string();
        cells[5] = Size(status.balloon.target_bytes).to_string();
        cells[6] = status.resident_bytes.map_or("-".into(), |bytes| Size(bytes).to_string());
        cells[7] = status.faults.total().to_string();
    }
    cells
}

fn driver(status: &Status) -> &'static str {
    if status.guest.connected { status.guest.driver.as_str() } else { "-" }
}

/// Formats one guest as lines of a name and a value.
fn details(status: &Status) -> String {
    let (guest, balloon, release) = (&status.guest, &status.balloon, &status.release);
    let mut lines = vec![("name", status.name.clone())];
    let uptime = format_duration(Duration::from_secs(status.uptime_ms / 1000));
    lines.push(("process", format!("{}, for {uptime}", status.pid)));
    let connected = match (guest.connected, guest.features.join(", ")) {
        (false, _) => "not connected".into(),
        (true, features) if features.is_empty() => format!("driver {}", guest.driver.as_str()),
        (true, features) => format!("driver {} ({features})", guest.driver.as_str()),
    };
    lines.push(("guest", connected));
    let resident = match status.resident_bytes {
        Some(bytes) => format!(", {} of it in host memory", Size(bytes)),
        None => String::new(),
    };
    lines.push(("memory", format!("{}{resident}", Size(guest.memory_bytes))));
    let (actual, target) = (Size(balloon.actual_bytes), Size(balloon.target_bytes));
    let state = if balloon.at_target { "at target" } else { "in progress" };
    lines.push(("balloon", format!("{actual} of {target}, {state}")));
    if let Some(change) = &balloon.last_change {
        lines.push(("last change", last_change(change)));
    }
    let (mode, partial) = (release.mode.as_str(), release.partial_huge.as_str());
    lines.push(("release", format!("{mode}, parts of huge pages: {partial}")));
    let (pending, in_flight) = (Size(release.pending_bytes), Size(release.in_flight_bytes));
    let waiting = Size(release.waiting_bytes);
    lines.push((
        "unreleased",
        format!("{pending} pending, {in_flight} in flight, {waiting} waiting"),
    ));
    let (calls, errors) =
        (plural(release.release_calls, "call"), plural(release.release_errors, "error"));
    lines.push(("released", format!("{} in {calls}, {errors}", Size(release.released_bytes))));
    if let Some(exits) = status.exits {
        let kicks = status.kicks.unwrap_or_default();
        lines.push((
            "exits",
            format!("{exits} caused by the balloon, {kicks} of them notifications"),
        ));
    }
    if status.reports.messages > 0 {
        lines.push(("reported", reports(&status.reports)));
    }
    lines.push(("statistics", stats(&status.stats)));
    lines.push(("requests", requests(&status.requests)));
    lines.push(("faults", faults(&status.faults)));
    lines.iter().fold(String::new(), |mut text, (name, value)| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<12} {value}");
        text
    })
}

/// Formats the newest migration in one line.
fn migration(guest: &GuestArg, status: &MigrationStatus) -> Option<String> {
    let phase = status.phase.map_or("", MigrationPhase::as_str);
    let why = status.error.as_deref().unwrap_or("unknown");
    let text = match status.state {
        MigrationState::None => return None,
        MigrationState::Waiting => "waiting for the guest".to_owned(),
        MigrationState::Running => {
            format!("in progress: {phase}, {} sent", Size(status.wire_bytes))
        }
        MigrationState::Failed => format!("failed, the guest still runs here: {why}"),
        MigrationState::InDoubt => {
            format!("IN DOUBT, the guest is paused; run `aerostat resolve {guest}`: {why}")
        }
        MigrationState::Stuck => format!("failed, the guest could not be resumed: {why}"),
        MigrationState::Moved => "the guest runs on the other side".to_owned(),
        MigrationState::Arrived => format!("the guest arrived, in {:.0} ms", status.elapsed_ms),
        MigrationState::Saved => format!("saved, in {:.0} ms", status.elapsed_ms),
    };
    let is_snapshot = status.side == Some(MigrationSide::Snapshot);
    let what = if is_snapshot { "snapshot" } else { "migration" };
    Some(format!("{what:<12} {text}\n"))
}

fn last_change(change: &BalloonChange) -> String {
    let size = |pages: u32| Size(u64::from(pages) * control::BALLOON_PAGE_BYTES);
    let stages = &change.stages_ms;
    format!(
        "{} to {} in {:.1} ms (allocate {:.1}, send {:.1}, translate {:.1}, release {:.1}), {}, {}",
        size(change.from_pages),
        size(change.to_pages),
        change.wall_ms,
        stages.allocate,
        stages.send,
        stages.translate,
        stages.release,
        plural(change.messages, "message"),
        plural(change.release_calls, "release call"),
    )
}

fn reports(reports: &ReportsStatus) -> String {
    let mut text = format!(
        "{} free, {} of it released in {}",
        Size(reports.reported_bytes),
        Size(reports.released_bytes),
        plural(reports.release_calls, "call"),
    );
    for (bytes, why) in [
        (reports.poisoned_bytes, "not released because of the guest's poison value"),
        (reports.partial_bytes, "not released as part of huge pages"),
    ] {
        if bytes > 0 {
            text += &format!(", {} {why}", Size(bytes));
        }
    }
    text
}

/// Formats bytes as sizes, other values as numbers.
fn stats(stats: &StatsStatus) -> String {
    let Some(age_ms) = stats.age_ms else { return "none".into() };
    let values = stats.values.iter().map(|(name, value)| match name.strip_suffix("_bytes") {
        Some(name) => format!("{} {}", name.replace('_', " "), Size(*value)),
        None => format!("{} {value}", name.replace('_', " ")),
    });
    let values: Vec<String> = values.collect();
    let stale = if stats.stale { ", stale" } else { "" };
    format!("{} ({:.1} s old{stale})", values.join(", "), age_ms as f64 / 1000.0)
}

/// Formats the requests in one line.
fn requests(requests: &RequestStatus) -> String {
    if !requests.possible {
        return "not available".into();
    }
    let running = requests.running.as_deref().unwrap_or("none");
    let mut text = format!("{running} running, {} waiting", requests.waiting);
    if let Some(hold) = requests.hold {
        let state = match hold {
            HoldState::Kept => "held",
            HoldState::Paused => "paused",
            HoldState::Releasing => "being released",
        };
        text += &format!(", hold {state}");
    }
    for (command, outcomes) in &requests.ended {
        for (outcome, count) in outcomes {
            text += &format!(", {command} {outcome} {count}");
        }
    }
    text
}

fn faults(faults: &Faults) -> String {
    let mut all = Vec::new();
    for (side, kinds) in faults.sides() {
        all.extend(kinds.iter().map(|(kind, count)| format!("{side} {kind} {count}")));
    }
    if all.is_empty() { "none".into() } else { all.join(", ") }
}
