//! `aerostat-lab bench inflate`: inflates balloons and compares.

use std::path::PathBuf;

use bench::inflate::{self, MemoryState, Report};
use bench::kvm_inflate;
use clap::{Args, ValueEnum};
use control::Size;

use super::{BackingArg, chosen, failure, name, program};
use cli::failure::{Exit, Failure};
use cli::output::{print, print_json};

/// Inflates balloons: page by page, with the stock driver, with ours
#[derive(Debug, Args)]
pub(super) struct InflateArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Draw the report in this SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Rounds, with each case once per round
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// Size of the guests (repeatable)
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    guest: Vec<Size>,

    /// Only this state of the guest's memory (repeatable)
    #[arg(long, value_enum)]
    memory: Vec<MemoryArg>,

    /// Only this host page size (repeatable)
    #[arg(long, value_enum)]
    backing: Vec<BackingArg>,

    /// VMM of the guests
    #[arg(long, value_enum, default_value = "uml")]
    monitor: MonitorArg,

    /// Kernel argument for guests of `aerostat run` (repeatable)
    #[arg(long, value_name = "WORD", default_value = kvm_inflate::KERNEL_ARGUMENT)]
    kernel_argument: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MonitorArg {
    /// User Mode Linux, with our vhost-user back end
    Uml,
    /// `aerostat run`, on an emulated KVM if this machine has no usable one
    Kvm,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum MemoryArg {
    /// Never touched
    Idle,
    /// Written and freed
    Touched,
    /// Written, with pinned pages in every second 2 MiB
    Fragmented,
}

impl From<MemoryArg> for MemoryState {
    fn from(memory: MemoryArg) -> Self {
        match memory {
            MemoryArg::Idle => Self::Idle,
            MemoryArg::Touched => Self::Touched,
            MemoryArg::Fragmented => Self::Fragmented,
        }
    }
}

pub(super) fn run(args: &InflateArgs) -> Result<(), Failure> {
    match args.monitor {
        MonitorArg::Uml => run_uml(args),
        MonitorArg::Kvm => run_kvm(args),
    }
}

fn run_kvm(args: &InflateArgs) -> Result<(), Failure> {
    let options = kvm_inflate::KvmInflateOptions {
        rounds: args.rounds,
        guest_mib: args.guest.iter().map(|size| size.0 >> 20).collect(),
        memory: chosen(&args.memory, &[MemoryState::Idle, MemoryState::Touched], MemoryState::from),
    };
    if options.memory.contains(&MemoryState::Fragmented)
        || args.svg.is_some()
        || !args.backing.is_empty()
    {
        let what = "fragmented memory, --backing and --svg need User Mode Linux guests";
        return Err(Failure { what: what.into(), hint: "omit it".into(), exit: Exit::Failed });
    }
    let words = &args.kernel_argument;
    let report = kvm_inflate::measure(options, words, &mut |step| diagnostics::log_line!("{step}"))
        .map_err(failure)?;
    if args.json { print_json(&report) } else { print(&kvm_table(&report)) }
}

fn run_uml(args: &InflateArgs) -> Result<(), Failure> {
    let options = inflate::InflateOptions {
        program: program()?,
        rounds: args.rounds,
        guest_mib: args.guest.iter().map(|size| size.0 >> 20).collect(),
        memory: chosen(&args.memory, &MemoryState::ALL, MemoryState::from),
        backing: BackingArg::chosen(&args.backing),
    };
    let report =
        inflate::run(&options, &mut |step| diagnostics::log_line!("{step}")).map_err(failure)?;
    if let Some(path) = &args.svg {
        let guest_mib = options.guest_mib.first().copied().unwrap_or_default();
        std::fs::write(path, bench::chart::svg(&report, guest_mib))
            .map_err(|error| Failure::new(&error, "check the path of --svg"))?;
    }
    if args.json { print_json(&report) } else { print(&table(&report)) }
}

/// Two tables, readable as plain text and as Markdown.
fn table(report: &Report) -> String {
    let mut text = format!(
        "| guest | host pages | memory | case | wall ms {:>19} | deflate ms | messages | calls  | returned |\n\
         |---|---|---|---|---|---|---|---|---|\n",
        "(min .. max)"
    );
    for case in &report.cases {
        text += &format!(
            "| {} MiB | {:<4} | {:<10} | {:<7} | {:>7.1} {:>19} | {:>10.1} | {:>8} | {:>6} | {:>4.0} MiB |\n",
            case.guest_mib,
            name(&case.backing),
            name(&case.memory),
            name(&case.name),
            case.wall_ms.median,
            format!("({:.1} .. {:.1})", case.wall_ms.min, case.wall_ms.max),
            case.deflate_ms.median,
            case.messages,
            case.release_calls,
            case.returned_mib,
        );
    }
    text += "\n| guest | host pages | memory | classic / bitmap | classic / stock | floor ms |\n\
             |---|---|---|---|---|---|\n";
    for floor in &report.floors {
        text += &format!(
            "| {} MiB | {:<4} | {:<10} | {:>14.1} x | {:>13.1} x | {:>8.1} |\n",
            floor.guest_mib,
            name(&floor.backing),
            name(&floor.memory),
            floor.speedup,
            floor.stock_speedup,
            floor.floor_ms,
        );
    }
    text
}

fn kvm_table(report: &kvm_inflate::Report) -> String {
    let mut text = "| guest | memory | driver | wall ms (min .. max) | exits | kicks | returned | deflate ms | exits |\n\
                    |---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for case in &report.cases {
        text += &format!(
            "| {} MiB | {} | {} | {:.1} ({:.1} .. {:.1}) | {:.0} | {:.0} | {:.0} MiB | {:.1} | {:.0} |\n",
            case.guest_mib,
            name(&case.memory),
            name(&case.name),
            case.wall_ms.median,
            case.wall_ms.min,
            case.wall_ms.max,
            case.exits.median,
            case.kicks.median,
            case.returned_mib,
            case.deflate_ms.median,
            case.deflate_exits.median,
        );
    }
    text
}
