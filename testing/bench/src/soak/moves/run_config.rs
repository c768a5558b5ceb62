//! Files of guests of `aerostat run`, for a process on a KVM.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::debian::{self, Release};
use lab::{Guest, GuestBuilder, guest_build};

use super::case::{CASES, Case};
use super::migrating_guest::LIMIT;
use crate::error::{Result, host, wrong};
use crate::testbed::Driver;

/// Modules of the guests besides the balloon driver.
const NEEDED: [&str; 2] = ["virtio_mmio", "pvpanic_mmio"];

/// Environment variables that name the files in a machine with KVM.
const KERNEL: &str = "AEROSTAT_MOVES_KERNEL";
const INITRAMFS: &str = "AEROSTAT_MOVES_INITRAMFS";
const MODULES: &str = "AEROSTAT_MOVES_MODULES";

/// Kernel argument of every guest: print warnings too.
const KERNEL_ARGUMENT: &str = "loglevel=5";

/// A kernel with the modules of its guests.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// The kernel, a vmlinux.
    pub kernel: PathBuf,
    /// Initramfs with init and modules.
    pub initramfs: PathBuf,
    /// Modules before the balloon driver, in loading order.
    pub modules: Vec<String>,
    /// A VM snapshot of a guest that has booted; see [`boot_once`](Self::boot_once).
    pub booted: Option<PathBuf>,
}

impl RunConfig {
    /// Makes the files in `directory`.
    ///
    /// # Errors
    /// A dependency is missing.
    pub fn prepare(program: &Path, release: Release, directory: &Path) -> Result<Self> {
        let kernel = debian::kernel(release)?;
        let own = guest_build::balloon_module(&kernel.tree()?)?;
        let mut files = kernel.modules(&NEEDED)?;
        let name = |path: &PathBuf| Some(path.file_stem()?.to_string_lossy().into_owned());
        let modules = files.iter().filter_map(name).collect();
        files.extend(kernel.modules(&[Driver::Stock.module_name()])?);
        files.push(own);
        let initramfs = directory.join(format!("{release:?}.cpio"));
        Guest::qemu(&kernel).modules(&files).write_initramfs(&initramfs)?;
        let (program, kernel) = (program.to_owned(), kernel.vmlinux()?);
        Ok(Self { program, kernel, initramfs, modules, booted: None })
    }

    /// Environment variables for the process that uses it.
    pub fn variables(&self) -> [(&'static str, OsString); 3] {
        [
            (KERNEL, self.kernel.clone().into()),
            (INITRAMFS, self.initramfs.clone().into()),
            (MODULES, self.modules.join(" ").into()),
        ]
    }

    /// The files named in the environment, if any.
    pub fn given(program: &Path) -> Option<Self> {
        let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let modules = std::env::var(MODULES).ok()?;
        Some(Self {
            program: program.to_owned(),
            kernel: path(KERNEL)?,
            initramfs: path(INITRAMFS)?,
            modules: modules.split_whitespace().map(str::to_owned).collect(),
            booted: None,
        })
    }

    /// Boots a guest and takes a VM snapshot of it in `file`. Every guest without other kernel
    /// arguments is restored from it: a boot on an emulated KVM takes many times as long.
    ///
    /// # Errors
    /// The guest does not boot, or the snapshot fails.
    pub fn boot_once(&mut self, memory_mib: u64, file: PathBuf) -> Result<()> {
        let control = file.with_extension("control");
        let mut guest = self.guest(&CASES[0], memory_mib, &control).boot()?;
        for module in self.modules(None) {
            guest.run(&format!("insmod {module}"))?;
        }
        let saved = Command::new(&self.program).arg("snapshot").args([&control, &file]).output();
        let saved = saved.map_err(host("starting a program"))?;
        if !saved.status.success() {
            let said = String::from_utf8_lossy(&saved.stderr).into_owned();
            return Err(wrong(format!("no VM snapshot: {said}")));
        }
        guest.power_off()?;
        self.booted = Some(file);
        Ok(())
    }

    /// Starts a guest of this case, with all modules except the balloon driver loaded.
    pub(super) fn start(&self, case: &Case, memory_mib: u64, control: &Path) -> Result<Guest> {
        if let (Some(file), true) = (&self.booted, case.words.is_empty()) {
            let mut guest = Guest::restored(&self.program)
                .machine_arguments([file.to_string_lossy()])
                .machine_arguments(["--name", case.name, "--control"])
                .machine_arguments([control.to_string_lossy()])
                .boot()?;
            guest.run_within("free-mib", LIMIT)?;
            return Ok(guest);
        }
        let mut guest = self.guest(case, memory_mib, control).boot()?;
        for module in self.modules(None) {
            guest.run_within(&format!("insmod {module}"), LIMIT)?;
        }
        Ok(guest)
    }

    /// Builds a guest of `aerostat run`.
    fn guest(&self, case: &Case, memory_mib: u64, control: &Path) -> GuestBuilder {
        let builder = Guest::vmm(&self.program, &self.kernel)
            .memory_mib(memory_mib)
            .initramfs(&self.initramfs)
            .machine_arguments(["--name", case.name, "--control"])
            .machine_arguments([control.to_string_lossy()])
            .kernel_argument(KERNEL_ARGUMENT);
        case.words.iter().fold(builder, |builder, word| builder.kernel_argument(*word))
    }

    /// Modules of a guest of this kind.
    fn modules(&self, driver: Option<Driver>) -> impl Iterator<Item = &str> {
        let driver = driver.map(Driver::module_name);
        self.modules.iter().map(String::as_str).chain(driver)
    }

    /// Borrows environment variables for `lab`.
    pub(super) fn borrowed<'a>(
        variables: &'a [(&'static str, OsString)],
    ) -> Vec<(&'static str, &'a OsStr)> {
        variables.iter().map(|(name, value)| (*name, value.as_os_str())).collect()
    }
}
