//! `cargo xtask man`: writes the man pages to docs/man.

use std::process::Command;

use crate::process::{output, root};

/// Writes the man pages of the command line to docs/man.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// The command line is a program, not a library, so a test of it writes them.
pub(crate) fn run(_args: &Args) -> anyhow::Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--quiet", "--package", "aerostat", "--bin", "aerostat", "man::"]);
    output(cargo.env("AEROSTAT_WRITE_MAN", "1").current_dir(root()))?;
    println!("docs/man");
    Ok(())
}
