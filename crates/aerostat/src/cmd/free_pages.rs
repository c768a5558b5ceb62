//! `aerostat free-pages`: shows which memory of a guest is free.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use control::api::{FreeKind, FreePages, FreePagesRequest, HoldState};
use control::{Client, Size};

use crate::guest_arg::{GuestArg, guest_timeout};
use cli::failure::{Exit, Failure};
use cli::memory_map;
use cli::output::{plural, print, print_json};

/// Show which memory of a guest is free
///
/// Without --hold the guest reports its free pages once; they may be in use again
/// a moment later. With --hold the guest allocates them and keeps them until
/// --release, or until it needs the memory.
#[derive(Debug, Args)]
pub(crate) struct FreePagesArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// Hold the free pages in the guest
    #[arg(long, conflicts_with = "release")]
    hold: bool,

    /// Release the hold
    #[arg(long, conflicts_with_all = ["svg", "bitmap"])]
    release: bool,

    /// Memory that a hold leaves to the guest [default: 128MiB]
    #[arg(long, value_name = "SIZE", requires = "hold", value_parser = Size::of_pages)]
    reserve: Option<Size>,

    /// Smallest block to report, 4KiB to 1GiB [default: 4KiB]
    #[arg(long, value_name = "SIZE", value_parser = Size::of_block,
          conflicts_with_all = ["hold", "release"])]
    min_block: Option<Size>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Write a picture of the guest's memory as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write a bitmap with one bit for each 4 KiB page of the guest's memory
    #[arg(long, value_name = "FILE")]
    bitmap: Option<PathBuf>,

    /// Timeout for the guest, such as 500ms, 30s or 5min; at most 10min
    #[arg(long, default_value = "30s", value_parser = guest_timeout)]
    timeout: Duration,
}

pub(crate) fn run(args: &FreePagesArgs) -> Result<(), Failure> {
    let client = args.guest.connect()?;
    if args.release {
        return release(args, &client);
    }
    let free = client.request_free_pages(&FreePagesRequest {
        kind: kind(args, &client)?,
        min_block_bytes: args.min_block.map(|size| size.0),
        reserve_bytes: args.reserve.map(|size| size.0),
        timeout_ms: u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX),
    })?;
    if let Some(path) = &args.svg {
        let svg = client.free_pages_picture()?;
        std::fs::write(path, svg).map_err(|error| not_written(path, &error))?;
    }
    if let Some(path) = &args.bitmap {
        write_bitmap(&client, path)?;
    }
    if args.json { print_json(&free) } else { print(&text(&args.guest, &free)) }
}

/// Chooses the kind of request. A driver without a request queue may support hints; for one that
/// supports neither, a snapshot request returns an error that says what is missing.
fn kind(args: &FreePagesArgs, client: &Client) -> Result<FreeKind, Failure> {
    if args.hold {
        return Ok(FreeKind::Hold);
    }
    let status = client.status()?;
    let hints = status.guest.features.iter().any(|feature| feature == "free-page-hint");
    let only_hints = hints && !status.requests.possible && args.min_block.is_none();
    Ok(if only_hints { FreeKind::Hint } else { FreeKind::Snapshot })
}

fn release(args: &FreePagesArgs, client: &Client) -> Result<(), Failure> {
    let released = client.release_free_pages(args.timeout)?;
    if args.json {
        return print_json(&released);
    }
    let size = Size(released.released_bytes);
    print(&format!("{}: released {size} in {:.1} ms\n", args.guest, released.elapsed_ms))
}

fn write_bitmap(client: &Client, path: &Path) -> Result<(), Failure> {
    let file = File::create(path).map_err(|error| not_written(path, &error))?;
    let mut out = BufWriter::new(file);
    client.free_pages_bitmap(&mut out)?;
    out.flush().map_err(|error| not_written(path, &error))
}

fn not_written(path: &Path, error: &io::Error) -> Failure {
    Failure {
        what: format!("cannot write {}: {error}", path.display()),
        hint: "check that the directory exists, is writable and has space".into(),
        exit: Exit::Failed,
    }
}

/// Formats totals, blocks and a coarse map.
fn text(guest: &GuestArg, free: &FreePages) -> String {
    let mut text = String::new();
    let (total, memory) = (Size(free.total_bytes), Size(free.memory_bytes));
    let what = match free.kind {
        FreeKind::Snapshot | FreeKind::Hint => "free",
        FreeKind::Hold => "held free",
    };
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{guest}: {total} of {memory} {what}, in {:.1} ms", free.elapsed_ms);
    let state = match free.hold {
        Some(HoldState::Kept) => " until --release, or until the guest needs it",
        Some(HoldState::Paused) => ", and the guest is paused",
        Some(HoldState::Releasing) => ", and being released",
        None => "",
    };
    let _ = writeln!(text, "  {} {}{state}", free.kind.as_str(), free.id);
    let (own, balloon) = (Size(free.guest_free_bytes), Size(free.balloon_bytes));
    let _ = match free.kind {
        FreeKind::Hint => writeln!(text, "  {balloon} in the balloon"),
        _ => writeln!(text, "  {own} free according to the guest, {balloon} in the balloon"),
    };
    for block in &free.blocks {
        let all = Size(block.block_bytes.saturating_mul(block.count));
        let count = plural(block.count, "block");
        let size = Size(block.block_bytes).to_string();
        let _ = writeln!(text, "  {size:>8}  {count:>16}  {all:#}");
    }
    text + &memory_map::draw(&free.map, memory_map::Style::of_output())
}
