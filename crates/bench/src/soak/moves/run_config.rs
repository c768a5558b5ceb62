//! What guests of our monitor are made of, as files, for where a KVM is.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::debian::{self, Release};
use lab::{Guest, GuestBuilder, guest_build};

use super::case::{CASES, Case};
use super::migrating_guest::LIMIT;
use crate::error::{Result, host, wrong};
use crate::testbed::Driver;

/// What the guests need besides the balloon's driver.
const NEEDED: [&str; 2] = ["virtio_mmio", "pvpanic_mmio"];

/// Name the files to who runs in a machine with a KVM.
const KERNEL: &str = "AEROSTAT_MOVES_KERNEL";
const INITRAMFS: &str = "AEROSTAT_MOVES_INITRAMFS";
const MODULES: &str = "AEROSTAT_MOVES_MODULES";

/// Words for every guest: warnings are to be seen too.
const KERNEL_ARGUMENT: &str = "loglevel=5";

/// A kernel with all that its guests load.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// A vmlinux.
    pub kernel: PathBuf,
    /// The guests' init, with modules.
    pub initramfs: PathBuf,
    /// What guests load before the balloon's driver, in this order.
    pub modules: Vec<String>,
    /// A VM snapshot of a guest that has booted; see [`boot_once`](Self::boot_once).
    pub booted: Option<PathBuf>,
}

impl RunConfig {
    /// Puts one together in `directory`.
    ///
    /// # Errors
    /// What is missing on this machine.
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

    /// For the process that is to use it.
    pub fn variables(&self) -> [(&'static str, OsString); 3] {
        [
            (KERNEL, self.kernel.clone().into()),
            (INITRAMFS, self.initramfs.clone().into()),
            (MODULES, self.modules.join(" ").into()),
        ]
    }

    /// The one that this process was given, if it was.
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

    /// Boots a guest and writes it to `file`, from which every guest is restored that needs no other
    /// kernel arguments: a boot on an emulated KVM takes many times as long.
    ///
    /// # Errors
    /// The guest does not come up, or cannot be saved.
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

    /// A guest of this case that takes commands, with all modules but the balloon's driver.
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

    /// A guest of our monitor.
    fn guest(&self, case: &Case, memory_mib: u64, control: &Path) -> GuestBuilder {
        let builder = Guest::monitor(&self.program, &self.kernel)
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

    /// Variables as the lab takes them.
    pub(super) fn borrowed<'a>(
        variables: &'a [(&'static str, OsString)],
    ) -> Vec<(&'static str, &'a OsStr)> {
        variables.iter().map(|(name, value)| (*name, value.as_os_str())).collect()
    }
}
