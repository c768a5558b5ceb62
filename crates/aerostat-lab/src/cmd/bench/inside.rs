//! `aerostat-lab bench inside`: what other benches start where a KVM is.

use clap::Args;

use super::{failure, program};
use cli::failure::Failure;
use cli::output::print;

/// Carries out a measurement where a KVM is; other benches start it
#[derive(Debug, Args)]
pub(super) struct InsideArgs {
    /// What to measure, as those benches write it
    order: String,
}

pub(super) fn run(args: &InsideArgs) -> Result<(), Failure> {
    // Whoever started it reads all of it, or is gone.
    let mut say = |line: &str| drop(print(&format!("{line}\n")));
    bench::kvm::inside(&program()?, &args.order, &mut say).map_err(failure)
}
