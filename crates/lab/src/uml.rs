//! User Mode Linux 6.12, built from Debian's kernel sources.
//!
//! It runs at the machine's own speed without hardware virtualisation, and drives a vhost-user
//! balloon by the kernel's own virtio code.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Key};
use crate::debian;
use crate::error::{Context, LabError, Result};
use crate::guest_build::KernelTree;
use crate::tool;

/// The Debian package with the sources.
pub const SOURCE_PACKAGE: &str = "linux-source-6.12";

/// Packages without which the build fails, apart from [`SOURCE_PACKAGE`].
pub const BUILD_PACKAGES: [&str; 8] =
    ["bc", "binutils", "bison", "flex", "gcc", "libc6-dev", "make", "xz-utils"];

/// The Debian package with a kernel that is ready to run, 6.1.
pub const PACKAGE: &str = "user-mode-linux";

/// Without it, external modules cannot be linked.
const SYMBOLS: &str = "Module.symvers";

/// Words for `make`: which kernel is meant.
pub(crate) const ARCHITECTURE: [&str; 2] = ["ARCH=um", "SUBARCH=x86_64"];

/// The options on top of the architecture's own.
const CONFIG: &str = include_str!("uml.config");

/// Raise it when the way the kernel is built changes.
const RECIPE: u32 = 1;

/// Code of devices and processors that User Mode Linux never compiles: half of the sources.
const UNUSED_SOURCES: [&str; 12] = [
    "Documentation/*/*",
    "arch/arm*/*.[chS]",
    "arch/arm*/*.dts*",
    "arch/powerpc/*.[chS]",
    "arch/mips/*.[chS]",
    "drivers/gpu/*.[ch]",
    "drivers/media/*.[ch]",
    "drivers/net/*.[ch]",
    "drivers/staging/*.[ch]",
    "sound/*.[ch]",
    "tools/perf/*",
    "tools/testing/*",
];

/// The stock drivers that guests may load, as paths in the build tree, in loading order.
const STOCK_MODULES: [&str; 1] = ["drivers/virtio/virtio_balloon.ko"];

/// A built kernel.
#[derive(Debug, Clone)]
pub struct UmlKernel {
    /// The program that is the kernel.
    pub linux: PathBuf,
    /// The tree against which external modules are built; that of a packaged kernel
    /// has only the modules that came with it.
    pub build_tree: PathBuf,
    /// The stock balloon driver and what it needs, in loading order.
    pub stock_modules: Vec<PathBuf>,
}

impl UmlKernel {
    /// Whether modules can be built for it.
    pub fn builds_modules(&self) -> bool {
        self.build_tree.join(SYMBOLS).exists()
    }

    /// The tree as kbuild wants it.
    pub fn tree(&self) -> KernelTree {
        KernelTree { path: self.build_tree.clone(), is_uml: true }
    }
}

/// Returns the kernel; builds it if this machine has not done so yet, in about three minutes.
///
/// # Errors
/// When a package is missing, or the build fails.
pub fn kernel() -> Result<UmlKernel> {
    let key = Key::new(RECIPE)
        .with("source", tool::package_version(SOURCE_PACKAGE)?)
        .with("gcc", tool::program_version("gcc", "gcc")?)
        .with("config", CONFIG);
    let directory = cache::artifact("uml-6.12", &key, build)?;
    let build_tree = directory.join("tree");
    Ok(UmlKernel {
        linux: build_tree.join("linux"),
        stock_modules: STOCK_MODULES.map(|path| build_tree.join(path)).to_vec(),
        build_tree,
    })
}

/// Returns the kernel that Debian 12 ships as a program, with its own modules and no
/// headers; fetches it if this machine has not done so yet.
///
/// # Errors
/// When the package is not known to apt, or cannot be fetched.
pub fn packaged() -> Result<UmlKernel> {
    let version = debian::candidate_version(PACKAGE)?;
    let key = Key::new(RECIPE).with("package", PACKAGE).with("version", &version);
    let directory = cache::artifact(PACKAGE, &key, |directory| {
        debian::unpack(PACKAGE, &version, directory, &directory.join("fetch.log"))
    })?;
    let build_tree = directory.join("usr/lib/uml/modules");
    let files = cache::files_below(&build_tree)?;
    let stock_modules = STOCK_MODULES.map(|module| {
        files.iter().find(|file| file.ends_with(module)).cloned().ok_or_else(|| {
            let what = format!("the package {PACKAGE}");
            LabError::Unexpected { what, detail: format!("it has no {module}") }
        })
    });
    Ok(UmlKernel {
        linux: directory.join("usr/bin/linux.uml"),
        stock_modules: stock_modules.into_iter().collect::<Result<_>>()?,
        build_tree,
    })
}

fn build(directory: &Path) -> Result<()> {
    for package in BUILD_PACKAGES {
        tool::package_version(package)?;
    }
    let (tree, log) = (directory.join("tree"), directory.join("build.log"));
    unpack(&tree, &log)?;
    configure(&tree, &log)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    make(&tree, &log, &[&format!("-j{jobs}"), "all"])?;
    // External modules need the symbols; a kernel without loadable modules has no such file.
    let symbols = tree.join(SYMBOLS);
    fs::metadata(&symbols).context_path("find", &symbols).map(drop)
}

fn unpack(tree: &Path, log: &Path) -> Result<()> {
    let archive = PathBuf::from(format!("/usr/src/{SOURCE_PACKAGE}.tar.xz"));
    if !archive.exists() {
        return Err(LabError::Missing {
            what: archive.display().to_string(),
            package: SOURCE_PACKAGE.to_owned(),
        });
    }
    fs::create_dir(tree).context_path("make", tree)?;
    let mut tar = tool::command("tar");
    tar.args(["--extract", "--strip-components=1", "--wildcards-match-slash"]);
    tar.args(UNUSED_SOURCES.map(|pattern| format!("--exclude={SOURCE_PACKAGE}/{pattern}")));
    tar.arg("--file").arg(&archive).arg("--directory").arg(tree);
    tool::run(&mut tar, "tar", log)
}

/// Makes `.config`, and checks that nothing was asked for in vain.
fn configure(tree: &Path, log: &Path) -> Result<()> {
    make(tree, log, &["x86_64_defconfig"])?;
    let path = tree.join(".config");
    let defaults = fs::read_to_string(&path).context_path("read", &path)?;
    // Of two lines for one option the last one counts.
    fs::write(&path, defaults + CONFIG).context_path("write", &path)?;
    make(tree, log, &["olddefconfig"])?;
    let made = fs::read_to_string(&path).context_path("read", &path)?;
    match unmet(CONFIG, &made) {
        None => Ok(()),
        Some(line) => Err(LabError::Unexpected {
            what: "the kernel's configuration".to_owned(),
            detail: format!("{line} was asked for and is not there"),
        }),
    }
}

/// The first line of `wanted` that the configuration does not fulfil.
fn unmet<'a>(wanted: &'a str, made: &str) -> Option<&'a str> {
    wanted.lines().filter(|line| line.starts_with("CONFIG_")).find(|line| {
        match line.strip_suffix("=n") {
            Some(name) => made
                .lines()
                .any(|made| made.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))),
            None => !made.lines().any(|made| made == *line),
        }
    })
}

fn make(tree: &Path, log: &Path, words: &[&str]) -> Result<()> {
    let mut command = tool::command("make");
    command.arg("-C").arg(tree).args(ARCHITECTURE).args(words);
    tool::run(&mut command, "make", log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_asked_for_in_vain_is_found() {
        let wanted = "# comment\nCONFIG_A=y\nCONFIG_B=n\n";
        assert_eq!(unmet(wanted, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_BB=y\n"), None);
        assert_eq!(unmet(wanted, "CONFIG_A=m\n"), Some("CONFIG_A=y"));
        assert_eq!(unmet(wanted, "CONFIG_A=y\nCONFIG_B=m\n"), Some("CONFIG_B=n"));
    }
}
