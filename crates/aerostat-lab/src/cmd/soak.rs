//! `aerostat-lab soak`: everything that can be done with guests, at random, for a while.

mod moves;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bench::Driver;
use bench::soak::{self, GuestReport, LEAST_MEMORY_MIB, Report, SoakOptions};
use clap::{Args, ValueEnum};
use control::Size;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::cmd::bench::{BackingArg, failure, program};
use cli::failure::{Exit, Failure};
use cli::output::{print, print_json};
use cli::progress::Steps;

/// Between two lines of progress where there is no terminal.
const LINES: Duration = Duration::from_secs(60);

/// Longest run: a week.
const MAX_MINUTES: u64 = 7 * 24 * 60;

/// Does at random all that can be done with guests, and has them verify their memory
///
/// Boots guests, inflates and deflates their balloons, lets them report free pages, asks
/// for hints, statistics, caches and free pages, unloads and loads their drivers, while they
/// allocate, verify and free memory. Fails where a page is wrong, a fault is counted, a log
/// complains or the back end's memory grows. SIGINT ends it before its time, with a report.
///
/// With --migrate or --faults it moves guests of `aerostat run` instead, from process to
/// process.
#[derive(Debug, Args)]
pub(crate) struct SoakArgs {
    /// How long
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=MAX_MINUTES))]
    minutes: u64,

    /// Repeats the steps of another run; any if it is not given
    #[arg(long)]
    seed: Option<u64>,

    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// The guests' driver; with both, guests of both kinds run at the same time
    #[arg(long, value_enum, default_value_t = DriverArg::Both)]
    driver: DriverArg,

    /// Memory of each guest, 256MiB at least
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = memory)]
    memory: Size,

    /// Only this kind of host pages; a guest of each kind otherwise
    #[arg(long, value_enum)]
    backing: Vec<BackingArg>,

    #[command(flatten)]
    moves: moves::MovesArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DriverArg {
    /// The kernel's own
    Stock,
    /// Aerostat's
    Own,
    /// Each in guests of its own
    Both,
}

pub(crate) fn run(args: &SoakArgs) -> Result<(), Failure> {
    if args.moves.are_wanted() {
        return moves::run(&args.moves, args.seed, args.json);
    }
    let options = SoakOptions {
        program: program()?,
        duration: Duration::from_secs(60 * args.minutes),
        seed: args.seed.unwrap_or_else(soak::any_seed),
        drivers: match args.driver {
            DriverArg::Stock => vec![Driver::Stock],
            DriverArg::Own => vec![Driver::Own],
            DriverArg::Both => Driver::ALL.to_vec(),
        },
        backings: BackingArg::chosen(&args.backing),
        memory_mib: args.memory.0 >> 20,
    };
    let stop =
        stop_flag().map_err(|error| Failure::new(&error, "check the limits of this user"))?;
    let steps = Steps::sparse(LINES);
    let report = soak::run(&options, &stop, &mut |step| steps.show(step)).map_err(failure)?;
    steps.end();
    if args.json {
        print_json(&report)?;
    } else {
        print(&table(&report))?;
    }
    verdict(&report.problems, format!("repeat the same steps with --seed {}", report.seed))
}

/// A failure where there are problems.
fn verdict(problems: &[String], hint: String) -> Result<(), Failure> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(Failure { what: problems.join("\n       "), hint, exit: Exit::Failed })
}

fn memory(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: control::ParseSizeError| error.to_string())?;
    match size.0 >> 20 < LEAST_MEMORY_MIB {
        true => Err(format!("a guest needs {LEAST_MEMORY_MIB} MiB at least")),
        false => Ok(size),
    }
}

/// Set by SIGINT or SIGTERM; the second one ends the process at once.
fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// A column for each guest: plain text and Markdown both.
fn table(report: &Report) -> String {
    let mut text = format!("seed {}, guests of {} MiB\n\n", report.seed, report.memory_mib);
    let mut row = |what: &str, value: &dyn Fn(&GuestReport) -> String| {
        text += &format!("| {what:<26} |");
        for guest in &report.guests {
            text += &format!(" {:>14} |", value(guest));
        }
        text += "\n";
    };
    row("", &|guest| guest.name.clone());
    row("---", &|_| "---".to_owned());
    row("minutes", &|guest| format!("{:.1}", guest.walked_s / 60.0));
    let mut kinds: Vec<&String> =
        report.guests.iter().flat_map(|guest| guest.tally.steps.keys()).collect();
    kinds.sort();
    kinds.dedup();
    for kind in kinds {
        row(kind, &|guest| match guest.tally.steps.get(kind) {
            None => "-".to_owned(),
            Some(count) if count.failed > 0 => format!("{}, {} failed", count.steps, count.failed),
            Some(count) => count.steps.to_string(),
        });
    }
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let kib = |bytes: u64| format!("{} KiB", bytes >> 10);
    row("verified", &|guest| mib(guest.tally.verified_bytes));
    row("reported by itself", &|guest| match guest.driver {
        Driver::Stock => mib(guest.reported_bytes),
        Driver::Own => "-".to_owned(),
    });
    row("wrong pages", &|guest| guest.tally.wrong_pages.to_string());
    row("faults", &|guest| guest.faults.total().to_string());
    row("complaints, guest", &|guest| guest.guest_complaints.len().to_string());
    row("complaints, back end", &|guest| guest.backend_complaints.len().to_string());
    row("heap: warmed up", &|guest| kib(guest.resident.start_bytes));
    row("heap: highest", &|guest| kib(guest.resident.highest_bytes));
    row("heap: at the end", &|guest| kib(guest.resident.end_bytes));
    row("heap: slope a minute", &|guest| {
        format!("{:+.2} KiB", guest.resident.slope_bytes_per_minute / 1024.0)
    });
    row("heap: rise", &|guest| format!("{:+.1} KiB", guest.resident.rise_bytes / 1024.0));
    row("program: highest", &|guest| kib(guest.resident.program_highest_bytes));
    row("guest memory: highest", &|guest| kib(guest.resident.guest_highest_bytes));
    row("flat", &|guest| if guest.resident.flat { "yes" } else { "NO" }.to_owned());
    for guest in report.guests.iter().filter(|guest| guest.logs.is_some()) {
        let logs = guest.logs.iter().map(|path| path.display());
        logs.for_each(|path| text += &format!("\nlogs of {}: {path}\n", guest.name));
    }
    text
}
