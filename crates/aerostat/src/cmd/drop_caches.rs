//! `aerostat drop-caches`: drops the caches of a guest's kernel.

use std::time::Duration;

use clap::{Args, ValueEnum};
use control::Size;
use control::api::{CacheSize, Caches, DroppedCaches};

use crate::guest_arg::{GuestArg, guest_timeout};
use cli::failure::Failure;
use cli::output::{print, print_json};

/// Drop a guest's caches, and show how much that freed
#[derive(Debug, Args)]
pub(crate) struct DropCachesArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// Which caches to drop
    #[arg(long, value_enum, default_value_t = What::All)]
    what: What,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Timeout for the guest, such as 500ms, 30s or 5min; at most 10min
    #[arg(long, default_value = "30s", value_parser = guest_timeout)]
    timeout: Duration,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Clean page cache
    PageCache,
    /// Reclaimable slab: inodes and dentries
    Slab,
    /// Both
    All,
}

impl From<What> for Caches {
    fn from(what: What) -> Self {
        match what {
            What::PageCache => Self::PageCache,
            What::Slab => Self::Slab,
            What::All => Self::All,
        }
    }
}

pub(crate) fn run(args: &DropCachesArgs) -> Result<(), Failure> {
    let dropped = args.guest.connect()?.drop_caches(args.what.into(), args.timeout)?;
    if args.json {
        return print_json(&dropped);
    }
    let mut text = summary(&args.guest, &dropped);
    for (name, size) in [("page cache", dropped.page_cache), ("slab", dropped.slab)] {
        text += &line(name, size);
    }
    print(&text)
}

/// Formats what was freed in one line.
pub(crate) fn summary(guest: &GuestArg, dropped: &DroppedCaches) -> String {
    format!("{guest}: freed {} in {:.1} ms\n", Size(dropped.freed_bytes), dropped.elapsed_ms)
}

fn line(name: &str, size: CacheSize) -> String {
    let CacheSize { before_bytes, after_bytes, freed_bytes } = size;
    let (before, after) = (Size(before_bytes), Size(after_bytes));
    format!("  {name:<11} {before} before, {after} after, {} freed\n", Size(freed_bytes))
}
