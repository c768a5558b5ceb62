//! `aerostat-lab bench requests`: requests to drop caches and to report free memory.

use bench::requests::{self, Report};
use clap::Args;
use control::Size;

use super::{failure, name, program};
use cli::failure::Failure;
use cli::output::{print, print_json};

/// Measures requests to drop caches and to report free memory, and their cost
#[derive(Debug, Args)]
pub(super) struct RequestsArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// Size of the guests for free-page reports (repeatable)
    #[arg(long, value_name = "SIZE", default_values = ["1GiB", "4GiB", "16GiB"])]
    guest: Vec<Size>,

    /// Number of random requests
    #[arg(long, default_value_t = 1000)]
    storm: u64,
}

pub(super) fn run(args: &RequestsArgs) -> Result<(), Failure> {
    let options = requests::RequestsOptions {
        program: program()?,
        rounds: args.rounds,
        guest_mib: args.guest.iter().map(|size| size.0 >> 20).collect(),
        storm: args.storm,
    };
    let report =
        requests::run(&options, &mut |step| diagnostics::log_line!("{step}")).map_err(failure)?;
    if args.json { print_json(&report) } else { print(&text(&report)) }
}

fn text(report: &Report) -> String {
    let dropped = &report.drop_caches;
    let mut text = format!(
        "drop caches: {:.1} % of a file of {} MiB in {:.1} ms ({:.1} .. {:.1}), {:.2} % off /proc/meminfo\n\n",
        dropped.freed_percent,
        dropped.file_mib,
        dropped.wall_ms.median,
        dropped.wall_ms.min,
        dropped.wall_ms.max,
        dropped.meminfo_off_percent,
    );
    text += "| guest | state | kind | wall ms (min .. max) | of MemFree | blocks | longest lock | used pages reported |\n\
             |---|---|---|---|---|---|---|---|\n";
    for free in &report.free_pages {
        text += &format!(
            "| {} MiB | {} | {} | {:.2} ({:.2} .. {:.2}) | {:.2} % | {} | {:.1} us | {} |\n",
            free.guest_mib,
            name(&free.state),
            name(&free.kind),
            free.wall_ms.median,
            free.wall_ms.min,
            free.wall_ms.max,
            free.mem_free_percent,
            free.blocks,
            free.lock_us_max,
            free.used_pages,
        );
    }
    let (stall, storm) = (&report.stall, &report.storm);
    text += &format!(
        "\nstall: longest wait for memory {:.3} ms alone, {:.3} ms with {} reports: {:.3} ms more\n",
        stall.alone_ms.median, stall.with_ms.median, stall.reports, stall.added_ms,
    );
    text += &format!(
        "storm: {} requests in {:.1} s: {} done, {} refused, {} lost, {} faults, {} wrong pages\n",
        storm.requests,
        storm.wall_s,
        storm.done,
        storm.refused,
        storm.lost,
        storm.faults,
        storm.wrong_pages,
    );
    text
}
