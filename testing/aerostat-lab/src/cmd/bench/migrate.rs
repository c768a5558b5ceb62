//! `aerostat-lab bench migrate`: migrates guests with `aerostat` and with QEMU, and compares.

use std::time::Duration;

use bench::kvm::{self, Task};
use bench::migrate::{self, Case, GuestState, Report};
use clap::{Args, ValueEnum};
use control::Size;

use super::{chosen, failure, name};
use cli::failure::Failure;
use cli::output::{print, print_json};

/// Timeout of a migration with its boots, per GiB of a guest.
const MOVE_LIMIT: Duration = Duration::from_secs(600);

/// Migrates guests: aerostat without and with free memory, QEMU without and with hints
#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Rounds, with each case once per round
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// Size of the guests (repeatable)
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    guest: Vec<Size>,

    /// Only guests in this state (repeatable)
    #[arg(long, value_enum)]
    state: Vec<StateArg>,

    /// Only this case (repeatable)
    #[arg(long, value_enum)]
    case: Vec<CaseArg>,

    /// Kernel argument of the guests (repeatable)
    #[arg(long, value_name = "WORD", default_value = "init_on_alloc=0")]
    kernel_argument: Vec<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum StateArg {
    /// Booted
    Fresh,
    /// 85 % of memory written and freed
    DirtiedThenFreed,
    /// The same, and a page cache of 256 MiB
    PageCache,
    /// Writes all the time
    WriteLoad,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CaseArg {
    /// aerostat, without free memory
    Skip,
    /// The same, after dropping caches
    SkipDropCaches,
    /// aerostat, with free memory
    NoSkip,
    /// QEMU
    Qemu,
    /// QEMU with free page hints
    QemuHint,
}

pub(super) fn run(args: &MigrateArgs) -> Result<(), Failure> {
    let options = migrate::MigrateOptions {
        rounds: args.rounds,
        guest_mib: args.guest.iter().map(|size| size.0 >> 20).collect(),
        guests: chosen(&args.state, &GuestState::ALL, |state| match state {
            StateArg::Fresh => GuestState::Fresh,
            StateArg::DirtiedThenFreed => GuestState::DirtiedThenFreed,
            StateArg::PageCache => GuestState::PageCache,
            StateArg::WriteLoad => GuestState::WriteLoad,
        }),
        cases: chosen(&args.case, &Case::ALL, |case| match case {
            CaseArg::Skip => Case::Skip,
            CaseArg::SkipDropCaches => Case::SkipDropCaches,
            CaseArg::NoSkip => Case::NoSkip,
            CaseArg::Qemu => Case::Qemu,
            CaseArg::QemuHint => Case::QemuHint,
        }),
    };
    let gib: u64 = options.guest_mib.iter().map(|mib| mib.div_ceil(1 << 10)).sum();
    let moves = options.rounds * options.guests.len() * options.cases.len();
    let moves = u32::try_from(gib.saturating_mul(moves as u64)).unwrap_or(u32::MAX);
    let limit = MOVE_LIMIT.saturating_mul(moves);
    let guests_mib = migrate::guests_mib(&options);
    let (words, task) = (&args.kernel_argument, Task::Migrate(options));
    let report: Report =
        kvm::measure(task, words, guests_mib, limit, &mut |step| diagnostics::log_line!("{step}"))
            .map_err(failure)?;
    if args.json { print_json(&report) } else { print(&table(&report)) }
}

fn table(report: &Report) -> String {
    const MIB: f64 = (1u64 << 20) as f64;
    let mut text = "| guest | state | case | ms (min .. max) | downtime ms (min .. max) | sent | in use | sent again | skipped: free | zeros |\n\
                    |---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for case in &report.cases {
        let mib = |pages: u64| (pages << 12) as f64 / MIB;
        let written = case.written_bytes.map(|bytes| format!("{:.1} MiB", bytes.median / MIB));
        text += &format!(
            "| {} MiB | {} | {} | {:.0} ({:.0} .. {:.0}) | {:.0} ({:.0} .. {:.0}) | {:.1} MiB | {:.1} MiB | {} | {:.1} MiB | {:.1} MiB |\n",
            case.guest_mib,
            name(&case.guest),
            name(&case.name),
            case.total_ms.median,
            case.total_ms.min,
            case.total_ms.max,
            case.downtime_ms.median,
            case.downtime_ms.min,
            case.downtime_ms.max,
            case.bytes_sent.median / MIB,
            case.floor_bytes.median / MIB,
            written.unwrap_or_default(),
            mib(case.pages_skipped.free),
            mib(case.pages_skipped.zero),
        );
    }
    text
}
