//! User Mode Linux 6.12, built from Debian's kernel sources.
//!
//! It runs at native speed without hardware virtualisation, and drives a vhost-user balloon with
//! the kernel's own virtio code.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Key};
use crate::debian;
use crate::error::{Context, LabError, Result};
use crate::guest_build::KernelTree;
use crate::tool;

/// Debian package of the sources.
pub const SOURCE_PACKAGE: &str = "linux-source-6.12";

/// Build dependencies besides [`SOURCE_PACKAGE`].
pub const BUILD_PACKAGES: [&str; 8] =
    ["bc", "binutils", "bison", "flex", "gcc", "libc6-dev", "make", "xz-utils"];

/// Debian package of a prebuilt kernel, 6.1.
pub const PACKAGE: &str = "user-mode-linux";

/// File that external modules are linked against.
const SYMBOLS: &str = "Module.symvers";

/// Arguments of `make` for the architecture.
pub(crate) const ARCHITECTURE: [&str; 2] = ["ARCH=um", "SUBARCH=x86_64"];

/// Options in addition to the architecture's defaults.
const CONFIG: &str = include_str!("uml.config");

/// Raise it when the build of the kernel changes.
const RECIPE: u32 = 1;

/// Code of devices and CPUs that User Mode Linux does not compile: half of the sources.
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

/// Stock drivers for guests in loading order, as paths in the build tree.
const STOCK_MODULES: [&str; 1] = ["drivers/virtio/virtio_balloon.ko"];

/// A built kernel.
#[derive(Debug, Clone)]
pub struct UmlKernel {
    /// Path of the kernel, an executable.
    pub linux: PathBuf,
    /// The tree against which external modules are built. That of a packaged kernel only has the
    /// modules of the package.
    pub build_tree: PathBuf,
    /// The stock balloon driver and its dependencies, in loading order.
    pub stock_modules: Vec<PathBuf>,
}

impl UmlKernel {
    /// Whether modules can be built for it.
    pub fn builds_modules(&self) -> bool {
        self.build_tree.join(SYMBOLS).exists()
    }

    /// The tree for kbuild.
    pub fn tree(&self) -> KernelTree {
        KernelTree { path: self.build_tree.clone(), is_uml: true }
    }
}

/// Returns the kernel. Builds it first, in about three minutes, if it is not in the cache.
///
/// # Errors
/// A package is missing, or the build fails.
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

/// Returns Debian 12's prebuilt kernel, with its modules and no headers. Fetches it first if it is
/// not in the cache.
///
/// # Errors
/// apt does not know the package, or it cannot be fetched.
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

/// Writes `.config`, and checks that kbuild accepted every option.
fn configure(tree: &Path, log: &Path) -> Result<()> {
    make(tree, log, &["x86_64_defconfig"])?;
    let path = tree.join(".config");
    let defaults = fs::read_to_string(&path).context_path("read", &path)?;
    // Of two lines for one option the last one takes effect.
    fs::write(&path, defaults + CONFIG).context_path("write", &path)?;
    make(tree, log, &["olddefconfig"])?;
    let made = fs::read_to_string(&path).context_path("read", &path)?;
    match unmet(CONFIG, &made) {
        None => Ok(()),
        Some(line) => Err(LabError::Unexpected {
            what: "the kernel's configuration".to_owned(),
            detail: format!("{line} was requested and is not set"),
        }),
    }
}

/// Returns the first line of `wanted` that the configuration does not fulfil.
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
    fn an_unset_option_is_reported() {
        let wanted = "# comment\nCONFIG_A=y\nCONFIG_B=n\n";
        assert_eq!(unmet(wanted, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_BB=y\n"), None);
        assert_eq!(unmet(wanted, "CONFIG_A=m\n"), Some("CONFIG_A=y"));
        assert_eq!(unmet(wanted, "CONFIG_A=y\nCONFIG_B=m\n"), Some("CONFIG_B=n"));
    }
}
