//! `cargo xtask package`: the Debian package with the guest module.
//!
//! A guest needs its kernel's headers and a C compiler. DKMS builds the shim and links it with the
//! prebuilt Rust object.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::core_object::{self, Compiler, Flavour};
use crate::module;
use crate::process::{output, root};

const VERSION: &str = env!("CARGO_PKG_VERSION");

const EXECUTABLE: u32 = 0o755;
const PLAIN: u32 = 0o644;

/// Build the Debian package of the guest's kernel module.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory for the package.
    #[arg(long, default_value = "target/package")]
    out: PathBuf,
}

/// Builds the package and prints its path.
pub(crate) fn run(args: &Args) -> Result<()> {
    let object = core_object::build(&Compiler::find()?, Flavour::X86)?;
    fs::create_dir_all(&args.out)?;
    let tree = args.out.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    fill(&tree, object.path())?;
    let package = args.out.join(format!("aerostat-balloon-dkms_{VERSION}_amd64.deb"));
    output(
        Command::new("dpkg-deb").args(["--build", "--root-owner-group"]).arg(&tree).arg(&package),
    )?;
    println!("{}", package.canonicalize()?.display());
    Ok(())
}

fn fill(tree: &Path, object: &Path) -> Result<()> {
    let source = tree.join("usr/src").join(format!("aerostat-balloon-{VERSION}"));
    module::lay_out(object, &source)?;
    for entry in fs::read_dir(&source)? {
        fs::set_permissions(entry?.path(), fs::Permissions::from_mode(PLAIN))?;
    }
    write(&source.join("dkms.conf"), &template("dkms.conf")?, PLAIN)?;
    let modprobe = tree.join("usr/lib/modprobe.d/aerostat-balloon.conf");
    write(&modprobe, &template("modprobe.conf")?, PLAIN)?;
    let copyright = tree.join("usr/share/doc/aerostat-balloon-dkms/copyright");
    write(&copyright, &template("copyright")?, PLAIN)?;
    let debian = tree.join("DEBIAN");
    write(&debian.join("control"), &template("control")?, PLAIN)?;
    // An initramfs with the stock driver would load that first.
    write(&debian.join("triggers"), "activate-noawait update-initramfs\n", PLAIN)?;
    for script in ["postinst", "prerm"] {
        write(&debian.join(script), &template(script)?, EXECUTABLE)?;
    }
    Ok(())
}

fn template(name: &str) -> Result<String> {
    let path = root().join("guest/linux/dkms").join(name);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.replace("@VERSION@", VERSION))
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, text).with_context(|| path.display().to_string())?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}
