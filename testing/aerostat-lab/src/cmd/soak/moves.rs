//! `aerostat-lab soak --migrate` and `--faults`: repeated migrations and injected faults.

use std::ffi::OsString;

use bench::soak::moves::{self, CASES, Case, CaseReport, MoveOptions, Report};
use clap::Args;

use crate::cmd::bench::{failure, program};
use cli::failure::Failure;
use cli::output::{print, print_json};
use cli::progress::Steps;

/// Maximum migrations of a guest: weeks.
const MAX_MOVES: u64 = 1_000_000;

const KINDS: &str = "Migration";

#[derive(Debug, Args)]
pub(crate) struct MovesArgs {
    /// Migrate each guest this many times from process to process, on KVM (an emulated one if this
    /// machine has no usable one), while it verifies its memory, answers on its serial line and
    /// changes its balloon
    #[arg(long, value_name = "N", help_heading = KINDS, conflicts_with_all = ["minutes", "driver", "memory", "backing"],
          value_parser = clap::value_parser!(u64).range(1..=MAX_MOVES))]
    migrate: Option<u64>,

    /// Inject this many faults into migrations of each guest: the network breaks, stalls or
    /// corrupts data, or a side is killed, at any stage; the guest must continue on exactly one
    /// side
    #[arg(long, value_name = "N", help_heading = KINDS, conflicts_with_all = ["minutes", "driver", "memory", "backing"],
          value_parser = clap::value_parser!(u64).range(1..=MAX_MOVES))]
    faults: Option<u64>,

    /// Only this kind of guest: own, stock, own-cleared, stock-cleared, own-poisoned,
    /// stock-poisoned, no-driver, own-busy or stock-busy; all in turn by default
    #[arg(long, value_name = "KIND", help_heading = KINDS, value_parser = kind)]
    guest: Vec<Case>,

    /// Set by this program for itself, on a KVM
    #[arg(long, hide = true)]
    inside: bool,
}

impl MovesArgs {
    pub(super) const fn are_wanted(&self) -> bool {
        self.migrate.is_some() || self.faults.is_some()
    }
}

pub(super) fn run(args: &MovesArgs, seed: Option<u64>, json: bool) -> Result<(), Failure> {
    let seed = seed.unwrap_or_else(bench::soak::any_seed);
    if args.inside {
        return inside(args, seed);
    }
    let cases = if args.guest.is_empty() { CASES.to_vec() } else { args.guest.clone() };
    let moves = number(args.migrate).saturating_add(number(args.faults));
    let options = MoveOptions { program: program()?, moves, cases };
    let steps = Steps::start();
    let report =
        moves::run(&options, &|case| words(args, seed, case), &mut |step| steps.show(step));
    let report = report.map_err(failure)?;
    steps.end();
    if json {
        print_json(&report)?;
    } else {
        print(&table(&report))?;
    }
    super::verdict(&report.problems, format!("repeat the same faults with --seed {seed}"))
}

/// Arguments of this program on the KVM.
fn words(args: &MovesArgs, seed: u64, case: &Case) -> Vec<OsString> {
    let mut words = vec!["soak".to_owned(), "--inside".to_owned()];
    words.extend(["--guest".to_owned(), case.name.to_owned()]);
    words.extend(["--seed".to_owned(), seed.to_string()]);
    for (name, count) in [("--migrate", args.migrate), ("--faults", args.faults)] {
        words.extend(count.into_iter().flat_map(|count| [name.to_owned(), count.to_string()]));
    }
    words.into_iter().map(OsString::from).collect()
}

/// Runs one kind of guest, on a KVM.
fn inside(args: &MovesArgs, seed: u64) -> Result<(), Failure> {
    let run_config = moves::given_run_config(&program()?).map_err(failure)?;
    moves::raise_loopback();
    let progress = &mut |step: &str| diagnostics::log_line!("{step}");
    let mut reports = Vec::new();
    for case in &args.guest {
        if args.migrate.is_some() {
            reports.push(moves::endure(&run_config, *case, 0..number(args.migrate), progress));
        }
        if args.faults.is_some() {
            reports.push(moves::fail(&run_config, *case, number(args.faults), seed, progress));
        }
    }
    for report in reports {
        let text = serde_json::to_string(&report);
        let text = text.map_err(|error| Failure::new(&error, "report this bug"))?;
        print(&format!("{text}\n"))?;
    }
    Ok(())
}

fn number(count: Option<u64>) -> usize {
    usize::try_from(count.unwrap_or_default()).unwrap_or(usize::MAX)
}

fn kind(name: &str) -> Result<Case, String> {
    Case::named(name).ok_or_else(|| {
        let names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        format!("one of {}", names.join(", "))
    })
}

/// A row per kind of guest, readable as plain text and as Markdown.
fn table(report: &Report) -> String {
    let mut text = String::from(
        "| guest          | moves | total ms: min, median, max  | downtime ms      | rounds | \
         throttle | answered | lost    | verified   | wrong | log errors | minutes |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for case in report.cases.iter().filter(|case| case.seed.is_none()) {
        let CaseReport { name, moves, total_ms: total, downtime_ms: down, .. } = case;
        text += &format!(
            "| {name:<14} | {moves:>5} | {:>8.0} {:>9.0} {:>10.0} | {:>4.0} {:>5.0} {:>5.0} | {:>6} | \
             {:>6} % | {:>8} | {:>7} | {:>6} MiB | {:>5} | {:>10} | {:>7.1} |\n",
            total.min,
            total.median,
            total.max,
            down.min,
            down.median,
            down.max,
            case.most_rounds,
            case.most_throttle,
            case.answered,
            case.unheard,
            case.verified_bytes >> 20,
            case.wrong_pages,
            case.complaints.len(),
            case.took_s / 60.0,
        );
    }
    for case in report.cases.iter() {
        let Some(seed) = case.seed else { continue };
        let count: u64 = case.faults.iter().map(|fault| fault.count).sum();
        text += &format!(
            "\n{}: {count} faults of seed {seed} in {:.1} minutes, {} MiB verified\n",
            case.name,
            case.took_s / 60.0,
            case.verified_bytes >> 20
        );
        let mut faults: Vec<_> = case.faults.iter().collect();
        faults.sort_by(|one, other| one.what.cmp(&other.what));
        for fault in faults {
            text += &format!("  {:>4}  {}\n", fault.count, fault.what);
        }
    }
    text
}
