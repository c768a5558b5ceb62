//! `aerostat-lab bench inside`: started by other benchmarks on a KVM.

use clap::Args;

use super::{failure, program};
use cli::failure::Failure;
use cli::output::print;

/// Runs a measurement on a KVM; other benchmarks start it
#[derive(Debug, Args)]
pub(super) struct InsideArgs {
    /// The task as JSON
    order: String,
}

pub(super) fn run(args: &InsideArgs) -> Result<(), Failure> {
    // The parent reads all of it, or has ended.
    let mut say = |line: &str| drop(print(&format!("{line}\n")));
    bench::kvm::inside(&program()?, &args.order, &mut say).map_err(failure)
}
