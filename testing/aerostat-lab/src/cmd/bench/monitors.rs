//! `aerostat-lab bench monitors`: QEMU's own balloon device against ours.

use bench::inflate::MemoryState;
use bench::monitors::{self, Report};
use clap::{Args, ValueEnum};
use control::Size;

use super::{chosen, failure, name, program};
use cli::failure::Failure;
use cli::output::{print, print_json};

/// Inflates balloons of emulated guests with the stock driver: QEMU's device, ours
#[derive(Debug, Args)]
pub(super) struct MonitorsArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Rounds, with each case once per round
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// Size of the guests
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    guest: Size,

    /// Only this state of the guest's memory (repeatable)
    #[arg(long, value_enum)]
    memory: Vec<MemoryArg>,

    /// Kernel argument of the guests (repeatable)
    #[arg(long, value_name = "WORD", default_value = "init_on_alloc=0")]
    kernel_argument: Vec<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum MemoryArg {
    /// Never touched
    Idle,
    /// Written and freed
    Touched,
}

pub(super) fn run(args: &MonitorsArgs) -> Result<(), Failure> {
    let options = monitors::MonitorsOptions {
        program: program()?,
        rounds: args.rounds,
        guest_mib: args.guest.0 >> 20,
        memory: chosen(&args.memory, &[MemoryState::Idle, MemoryState::Touched], |memory| {
            match memory {
                MemoryArg::Idle => MemoryState::Idle,
                MemoryArg::Touched => MemoryState::Touched,
            }
        }),
        kernel_arguments: args.kernel_argument.clone(),
    };
    let report =
        monitors::run(&options, &mut |step| diagnostics::log_line!("{step}")).map_err(failure)?;
    if args.json { print_json(&report) } else { print(&table(&report)) }
}

fn table(report: &Report) -> String {
    let mut text = "| memory | device | wall ms (min .. max) | faster | at most | CPU ms of VMM and back end | of that in the vCPU thread | without the guest's work | returned | deflate ms |\n\
                    |---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for case in &report.cases {
        text += &format!(
            "| {} | {} | {:.0} ({:.0} .. {:.0}) | {:.2} x | {:.2} x | {:.0} ({:.0} .. {:.0}) | {:.0} | {:.0} | {:.0} MiB | {:.0} |\n",
            name(&case.memory),
            name(&case.name),
            case.wall_ms.median,
            case.wall_ms.min,
            case.wall_ms.max,
            case.speedup,
            case.speedup_limit,
            case.cpu_ms.median,
            case.cpu_ms.min,
            case.cpu_ms.max,
            case.vcpu_ms.median,
            case.device_cpu_ms,
            case.returned_mib,
            case.deflate_ms.median,
        );
    }
    text
}
