//! `aerostat balloon`: shows or sets the size of a guest's balloon.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use clap::Args;
use control::api::{BALLOON_PAGE_BYTES, BalloonStatus, Caches, Direction, MAX_TIMEOUT_MS};
use control::{Client, Size};
use humantime::format_duration;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cmd::drop_caches::summary;
use crate::guest_arg::GuestArg;
use cli::failure::{Exit, Failure};
use cli::output::{plural, print, print_json};

/// Show or set the size of a guest's balloon
///
/// With a size, sets the target and waits until the guest has reached it and the
/// host has released the memory. After a timeout the target stays set.
#[derive(Debug, Args)]
pub(crate) struct BalloonArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// Target size of the balloon, such as 3GiB; a multiple of 4 KiB
    #[arg(value_parser = Size::of_pages)]
    size: Option<Size>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Drop the guest's caches first, so that the memory they use can be inflated
    #[arg(long, requires = "size")]
    drop_caches: bool,

    /// How long to wait, such as 500ms, 30s or 5min
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// Update interval of the progress bar.
const BAR_WAIT: Duration = Duration::from_millis(100);

/// Interval of progress lines without a terminal.
const LINE_WAIT: Duration = Duration::from_secs(1);

pub(crate) fn run(args: &BalloonArgs) -> Result<(), Failure> {
    let client = args.guest.connect()?;
    match args.size {
        None => show(args, &client.balloon()?),
        Some(Size(bytes)) => {
            let start = Instant::now();
            if args.drop_caches {
                let time = args.timeout.min(Duration::from_millis(MAX_TIMEOUT_MS));
                let dropped = client.drop_caches(Caches::All, time)?;
                // JSON output has only the balloon.
                if !args.json {
                    print(&summary(&args.guest, &dropped))?;
                }
            }
            let left = args.timeout.saturating_sub(start.elapsed());
            set(args, &client, bytes, left)
        }
    }
}

fn show(args: &BalloonArgs, balloon: &BalloonStatus) -> Result<(), Failure> {
    if args.json {
        return print_json(balloon);
    }
    let of = match balloon.max_bytes {
        Some(max_bytes) => format!("of a guest of {}", Size(max_bytes)),
        None => "and no guest is connected".into(),
    };
    let (actual, target) = (Size(balloon.actual_bytes), Size(balloon.target_bytes));
    print(&format!("{}: the balloon holds {actual} {of}, its target is {target}\n", args.guest))
}

fn set(
    args: &BalloonArgs,
    client: &Client,
    target_bytes: u64,
    timeout: Duration,
) -> Result<(), Failure> {
    let start = Instant::now();
    let left = || timeout.saturating_sub(start.elapsed());
    // Usually the first wait suffices; then no progress is shown.
    let mut balloon = client.set_balloon(target_bytes, left().min(BAR_WAIT))?;
    let progress = Progress::new(args, &balloon);
    // A different target was set by another client; do not wait for its change.
    while !balloon.at_target && balloon.target_bytes == target_bytes && !left().is_zero() {
        balloon = client.wait(balloon.generation, left().min(progress.wait()))?;
        progress.show(&balloon);
    }
    progress.end();
    if args.json {
        print_json(&balloon)?;
    }
    if balloon.target_bytes != target_bytes {
        return Err(replaced(args, &balloon));
    }
    if !balloon.at_target {
        return Err(timed_out(args, &balloon));
    }
    if args.json {
        return Ok(());
    }
    print(&format!("{}: {}\n", args.guest, outcome(&balloon)))
}

/// Describes a completed change in one line.
fn outcome(balloon: &BalloonStatus) -> String {
    let now = Size(balloon.actual_bytes);
    let Some(change) = &balloon.last_change else {
        return format!("the balloon holds {now}");
    };
    let verb = match change.direction {
        Direction::Inflate => "inflated",
        Direction::Deflate => "deflated",
    };
    let from = Size(u64::from(change.from_pages) * BALLOON_PAGE_BYTES);
    let messages = plural(change.messages, "message");
    let calls = plural(change.release_calls, "release call");
    format!("{verb} from {from} to {now} in {:.1} ms, {messages}, {calls}", change.wall_ms)
}

fn replaced(args: &BalloonArgs, balloon: &BalloonStatus) -> Failure {
    let other = Size(balloon.target_bytes);
    Failure {
        what: format!(
            "operator: another client set the balloon of {} to {other} in the \
 meantime",
            args.guest
        ),
        hint: "let only one client control this guest, then set the target again".into(),
        exit: Exit::Failed,
    }
}

fn timed_out(args: &BalloonArgs, balloon: &BalloonStatus) -> Failure {
    let (actual, target) = (Size(balloon.actual_bytes), Size(balloon.target_bytes));
    let what = format!(
        "the balloon of {} holds {actual}, not {target}, after {}",
        args.guest,
        format_duration(args.timeout)
    );
    let hint = if balloon.max_bytes.is_none() {
        "no guest is connected, or its driver has not started; the target stays set".into()
    } else if balloon.actual_bytes == balloon.target_bytes {
        "the host is still releasing memory; see `aerostat status`".into()
    } else {
        "the target stays set; check that the guest has the driver and free memory".into()
    };
    Failure { what, hint, exit: Exit::Timeout }
}

/// Progress of the guest on standard error: a bar on a terminal, else a line a second; nothing
/// with `--json`.
enum Progress {
    Bar { bar: ProgressBar, from_bytes: u64 },
    Lines,
    Silent,
}

impl Progress {
    fn new(args: &BalloonArgs, balloon: &BalloonStatus) -> Self {
        if args.json || balloon.at_target {
            return Self::Silent;
        }
        if !io::stderr().is_terminal() {
            return Self::Lines;
        }
        let from_pages = balloon.last_change.as_ref().map_or(0, |change| change.from_pages);
        let from_bytes = u64::from(from_pages) * BALLOON_PAGE_BYTES;
        let bar = ProgressBar::new(balloon.target_bytes.abs_diff(from_bytes));
        // A template that does not parse leaves the default style.
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:40}] {percent}% {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(args.guest.to_string());
        let progress = Self::Bar { bar, from_bytes };
        progress.show(balloon);
        progress
    }

    fn wait(&self) -> Duration {
        match self {
            Self::Bar { .. } => BAR_WAIT,
            Self::Lines | Self::Silent => LINE_WAIT,
        }
    }

    fn show(&self, balloon: &BalloonStatus) {
        let text = format!("{} of {}", Size(balloon.actual_bytes), Size(balloon.target_bytes));
        match self {
            Self::Bar { bar, from_bytes } => {
                bar.set_position(balloon.actual_bytes.abs_diff(*from_bytes));
                bar.set_message(text);
            }
            Self::Lines => diagnostics::log_line!("{text}"),
            Self::Silent => {}
        }
    }

    fn end(&self) {
        if let Self::Bar { bar, .. } = self {
            bar.finish_and_clear();
        }
    }
}
