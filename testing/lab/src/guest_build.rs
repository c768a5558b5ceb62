//! Builds the guests' init and kernel modules.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Key};
use crate::error::{Context, LabError, Result};
use crate::tool;

/// Raise it when the build of init changes.
const INIT_RECIPE: u32 = 1;

/// Raise it when the build of modules changes.
const MODULE_RECIPE: u32 = 1;

/// Environment variable: a clone of Aerostat whose guest sources are built.
pub const SOURCE_VARIABLE: &str = "AEROSTAT_SOURCE";

/// Target of init. It is linked statically, so the initramfs has no library.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A tree against which kbuild builds modules.
#[derive(Debug, Clone)]
pub struct KernelTree {
    /// The directory with the kernel's top Makefile.
    pub path: PathBuf,
    /// Whether it is a tree of User Mode Linux, which needs `ARCH=um`.
    pub is_uml: bool,
}

/// Builds the guests' init, once for each state of its sources.
///
/// # Errors
/// The sources are missing or do not build.
pub fn init() -> Result<PathBuf> {
    let source = guest_source("init")?;
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let key = Key::new(INIT_RECIPE)
        .with("rustc", tool::program_version("rustc", "rustc")?)
        .with("manifest", read(&source.join("Cargo.toml"))?)
        .with("lock", read(&source.join("Cargo.lock"))?)
        .with_directory(&source.join("src"))?;
    let directory = cache::artifact("init", &key, |directory| {
        let build = directory.join("build");
        let mut command = tool::command(&cargo);
        command.args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"]);
        command.arg(&build).arg("--manifest-path").arg(source.join("Cargo.toml"));
        command.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
        tool::run(&mut command, "cargo", &directory.join("build.log"))?;
        let made = build.join(TARGET).join("release/init");
        fs::rename(&made, directory.join("init")).context_path("move", &made)?;
        fs::remove_dir_all(&build).context_path("remove", &build)
    })?;
    Ok(directory.join("init"))
}

/// Builds the module `lab_memory`, which fragments the guest's memory.
///
/// # Errors
/// The sources are missing or do not build.
pub fn lab_module(tree: &KernelTree) -> Result<PathBuf> {
    module("lab_memory", &guest_source("lab")?, tree)
}

/// Builds the module `lab_balloon`, a balloon device emulated inside the guest.
///
/// # Errors
/// The sources are missing or do not build.
pub fn lab_balloon_module(tree: &KernelTree) -> Result<PathBuf> {
    Ok(lab_module(tree)?.with_file_name("lab_balloon.ko"))
}

/// Builds the module `lab_bus`, which removes the shutdown method of the virtio bus.
///
/// # Errors
/// The sources are missing or do not build.
pub fn lab_bus_module(tree: &KernelTree) -> Result<PathBuf> {
    Ok(lab_module(tree)?.with_file_name("lab_bus.ko"))
}

/// Builds the guest driver for a kernel, once for each state of its sources.
///
/// # Errors
/// The sources, the kernel's tree or the Rust compiler with its library's sources are missing,
/// or the build fails.
pub fn balloon_module(tree: &KernelTree) -> Result<PathBuf> {
    let clone = clone_root();
    let mut key = Key::new(MODULE_RECIPE)
        .with("gcc", tool::program_version("gcc", "gcc")?)
        .with("rustc", tool::program_version("/usr/bin/rustc", "rustc-web")?)
        .with("tree", tree.path.to_string_lossy().as_bytes())
        .with("symbols", read(&tree.path.join("Module.symvers"))?);
    for part in ["guest/linux", "crates/balloon-abi/src", "crates/balloon-driver/src", "xtask/src"]
    {
        key = key.with_directory(&clone.join(part))?;
    }
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let directory = cache::artifact("aerostat_balloon", &key, |directory| {
        let mut command = tool::command(&cargo);
        command.current_dir(&clone).args(["xtask", "module", "--kernel"]).arg(&tree.path);
        command.args(["--flavour", if tree.is_uml { "um" } else { "x86" }, "--out"]);
        command.arg(directory);
        tool::run(&mut command, "cargo", &directory.join("build.log"))
    })?;
    Ok(directory.join("aerostat_balloon.ko"))
}

/// Builds the module `name` from a directory of sources, once for each state of these.
///
/// # Errors
/// The sources or the kernel's tree are missing, or the build fails.
pub fn module(name: &str, source: &Path, tree: &KernelTree) -> Result<PathBuf> {
    let key = Key::new(MODULE_RECIPE)
        .with("gcc", tool::program_version("gcc", "gcc")?)
        .with("tree", tree.path.to_string_lossy().as_bytes())
        .with("symbols", read(&tree.path.join("Module.symvers"))?)
        .with_directory(source)?;
    let object = format!("{name}.ko");
    let directory = cache::artifact(name, &key, |directory| {
        // kbuild writes beside the sources, and a clone must stay clean.
        for path in cache::files_below(source)? {
            let copy = directory.join(path.strip_prefix(source).unwrap_or(&path));
            let parent = copy.parent().unwrap_or(directory);
            fs::create_dir_all(parent).context_path("make", parent)?;
            fs::copy(&path, &copy).context_path("copy", &path)?;
        }
        let mut command = tool::command("make");
        command.arg("-C").arg(&tree.path);
        if tree.is_uml {
            command.args(crate::uml::ARCHITECTURE);
        }
        let mut place = std::ffi::OsString::from("M=");
        place.push(directory);
        command.arg(place).arg("modules");
        tool::run(&mut command, "make", &directory.join("build.log"))
    })?;
    Ok(directory.join(object))
}

pub(crate) fn clone_root() -> PathBuf {
    match std::env::var_os(SOURCE_VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
    }
}

pub(crate) fn guest_source(name: &str) -> Result<PathBuf> {
    let source = clone_root().join("testing/guest").join(name);
    let found = fs::canonicalize(&source);
    found.map_err(|_| LabError::Host {
        what: format!("find the guest's sources at {}", source.display()),
        advice: format!("set {SOURCE_VARIABLE} to a clone of Aerostat"),
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context_path("read", path)
}
