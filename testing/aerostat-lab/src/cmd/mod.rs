//! The commands, one file each: arguments, and `run`, which calls `bench` and prints its report.

mod bench;
mod demo;
mod soak;

use clap::Subcommand;
use cli::failure::Failure;

/// A command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Bench(bench::BenchArgs),
    Demo(demo::DemoArgs),
    Soak(soak::SoakArgs),
}

impl Command {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self {
            Self::Bench(args) => bench::run(&args),
            Self::Demo(args) => demo::run(&args),
            Self::Soak(args) => soak::run(&args),
        }
    }
}
