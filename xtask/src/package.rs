//! `cargo xtask package`: the Debian package that brings the guest module.

use anyhow::Result;

/// Build the Debian package of the guest's kernel module.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args) -> Result<()> {
    anyhow::bail!("not yet")
}
