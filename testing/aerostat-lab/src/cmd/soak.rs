//! `aerostat-lab soak`: random operations on guests.

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

/// Between two lines of progress without a terminal.
const LINES: Duration = Duration::from_secs(60);

/// Maximum duration: a week.
const MAX_MINUTES: u64 = 7 * 24 * 60;

/// Runs random operations on guests that verify their memory
///
/// Boots guests, inflates and deflates their balloons, uses free page reporting, hints,
/// statistics and requests, and reloads their drivers, while the guests allocate, verify and
/// free memory. Fails if a page is wrong, a fault is counted, a log has errors or the back
/// end's memory grows. SIGINT ends it early, with a report.
///
/// With --migrate or --faults it migrates guests of `aerostat run` from process to process
/// instead.
#[derive(Debug, Args)]
pub(crate) struct SoakArgs {
    /// Duration
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=MAX_MINUTES))]
    minutes: u64,

    /// Seed of the steps, to repeat a run [default: random]
    #[arg(long)]
    seed: Option<u64>,

    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Driver of the guests; with both, guests of both kinds run at the same time
    #[arg(long, value_enum, default_value_t = DriverArg::Both)]
    driver: DriverArg,

    /// Memory of each guest, at least 256MiB
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = memory)]
    memory: Size,

    /// Only this host page size [default: one guest of each]
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
    /// Both, in separate guests
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

/// A failure if there are problems.
fn verdict(problems: &[String], hint: String) -> Result<(), Failure> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(Failure { what: problems.join("\n       "), hint, exit: Exit::Failed })
}

fn memory(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: control::ParseSizeError| error.to_string())?;
    match size.0 >> 20 < LEAST_MEMORY_MIB {
        true => Err(format!("a guest needs {LEAST_MEMORY_MIB} MiB")),
        false => Ok(size),
    }
}

/// A flag that SIGINT or SIGTERM sets. The second signal ends the process at once.
fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// A column per guest, readable as plain text and as Markdown.
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
    row("free pages reported", &|guest| match guest.driver {
        Driver::Stock => mib(guest.reported_bytes),
        Driver::Own => "-".to_owned(),
    });
    row("wrong pages", &|guest| guest.tally.wrong_pages.to_string());
    row("faults", &|guest| guest.faults.total().to_string());
    row("log errors, guest", &|guest| guest.guest_complaints.len().to_string());
    row("log errors, back end", &|guest| guest.backend_complaints.len().to_string());
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
