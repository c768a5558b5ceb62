//! `aerostat-lab bench reporting`: free page reporting.

use bench::reporting::{self, Report};
use clap::Args;
use control::Size;

use super::{BackingArg, failure, name, program};
use cli::failure::Failure;
use cli::output::{print, print_json};

/// Measures how fast freed memory returns to the host, and the cost
#[derive(Debug, Args)]
pub(super) struct ReportingArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// Size of the guest: with less free memory, Linux reports less at a time
    #[arg(long, value_name = "SIZE", default_value = "16GiB")]
    guest: Size,

    /// Memory that it uses and frees
    #[arg(long, value_name = "SIZE", default_value = "3GiB")]
    freed: Size,

    /// Only this host page size (repeatable)
    #[arg(long, value_enum)]
    backing: Vec<BackingArg>,
}

pub(super) fn run(args: &ReportingArgs) -> Result<(), Failure> {
    let options = reporting::ReportingOptions {
        program: program()?,
        rounds: args.rounds,
        guest_mib: args.guest.0 >> 20,
        freed_mib: args.freed.0 >> 20,
        backing: BackingArg::chosen(&args.backing),
    };
    let report =
        reporting::run(&options, &mut |step| diagnostics::log_line!("{step}")).map_err(failure)?;
    if args.json { print_json(&report) } else { print(&table(&report)) }
}

fn table(report: &Report) -> String {
    let mut text = "| guest | host pages | freed | back after 10 s | 98 % back after s (min .. max) | CPU of the back end | one call over as much | the back end's own work |\n\
                    |---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for case in &report.cases {
        text += &format!(
            "| {} MiB | {} | {} MiB | {:.1} % | {:.1} ({:.1} .. {:.1}) | {:.0} ms, {:.2} % | {:.0} ms, {:.2} % | {:.2} % |\n",
            case.guest_mib,
            name(&case.backing),
            case.freed_mib,
            case.back_percent,
            case.back_ms.median / 1e3,
            case.back_ms.min / 1e3,
            case.back_ms.max / 1e3,
            case.cpu_ms.median,
            case.cpu_percent,
            case.floor_ms.median,
            case.floor_percent,
            case.own_percent,
        );
    }
    text
}
