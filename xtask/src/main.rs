//! Developer commands of the workspace.

#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};

mod core_object;
mod fuzz;
mod man;
mod module;
mod package;
mod process;
mod tidy;

/// Developer commands of the workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Fuzz(fuzz::Args),
    Man(man::Args),
    Module(module::Args),
    Package(package::Args),
    Tidy(tidy::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Man(args) => man::run(&args),
        Command::Module(args) => module::run(&args),
        Command::Package(args) => package::run(&args),
        Command::Tidy(args) => tidy::run(&args),
    }
}
