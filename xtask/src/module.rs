//! `cargo xtask module`: the guest module for one kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::core_object::{self, Compiler, Flavour};
use crate::process::{output, root};

/// Files of `guest/linux` for a kernel build, besides the Rust object.
pub(crate) const KERNEL_SOURCES: &[&str] = &[
    "Kbuild",
    "main.c",
    "memory.c",
    "queues.c",
    "pressure.c",
    "requests.c",
    "hold.c",
    "free.c",
    "aerostat.h",
    "aerostat_core.h",
    "requests.h",
];

/// kbuild's name for a prebuilt object.
pub(crate) const SHIPPED_OBJECT: &str = "aerostat_core.o_shipped";

const MODULE: &str = "aerostat_balloon.ko";

/// Build the guest's kernel module.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The kernel's build tree, such as /lib/modules/VERSION/build.
    #[arg(long)]
    kernel: PathBuf,
    /// Kind of the kernel.
    #[arg(long, value_enum, default_value = "x86")]
    flavour: Flavour,
    /// Directory for aerostat_balloon.ko.
    #[arg(long)]
    out: PathBuf,
}

/// Builds the module and prints its path.
pub(crate) fn run(args: &Args) -> Result<()> {
    let object = core_object::build(&Compiler::find()?, args.flavour)?;
    fs::create_dir_all(&args.out)?;
    let out = args.out.canonicalize()?;
    let dir = out.join("build");
    lay_out(object.path(), &dir)?;
    kbuild(&args.kernel, args.flavour, &dir)?;
    let module = out.join(MODULE);
    fs::copy(dir.join(MODULE), &module)?;
    println!("{}", module.display());
    Ok(())
}

/// Fills the directory for kbuild.
pub(crate) fn lay_out(object: &Path, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let sources = root().join("guest/linux");
    for name in KERNEL_SOURCES {
        copy_if_changed(&sources.join(name), &dir.join(name))?;
    }
    copy_if_changed(object, &dir.join(SHIPPED_OBJECT))
}

/// Does not touch equal files: make compares their times.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| from.display().to_string())?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    fs::write(to, new).with_context(|| to.display().to_string())
}

fn kbuild(kernel: &Path, flavour: Flavour, dir: &Path) -> Result<()> {
    let mut make = Command::new("make");
    make.arg("-C").arg(kernel).arg(format!("M={}", dir.display()));
    if flavour == Flavour::Um {
        make.arg("ARCH=um");
    }
    let (stdout, stderr) = output(make.arg("modules"))?;
    let is_warning = |line: &&str| line.to_lowercase().contains("warning");
    let warnings: Vec<_> = stdout.lines().chain(stderr.lines()).filter(is_warning).collect();
    ensure!(warnings.is_empty(), "the kernel's tools warn:\n{}", warnings.join("\n"));
    Ok(())
}
