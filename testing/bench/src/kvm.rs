//! Measurements that need KVM: on this machine, or inside an emulated machine with KVM.
//!
//! The program runs itself again there, with a task in one JSON argument. The lines that it prints
//! are progress, except the last, which is the report.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lab::debian::{DebianKernel, Release};
use lab::kvm::{self, KvmMachine};
use lab::{Guest, GuestBuilder, Scratch, guest_build};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{BenchError, Result, host, wrong};
use crate::testbed::Driver;
use crate::{kvm_host, kvm_inflate, migrate};

/// Arguments that start the program inside. The task follows.
pub const INSIDE: [&str; 2] = ["bench", "inside"];

/// Start of the line with the report.
const REPORT: &str = "report: ";

/// Modules of `aerostat run`'s guests besides the balloon driver, and for a page cache.
const VMM_MODULES: [&str; 1] = ["virtio_mmio"];
const OTHER_MODULES: [&str; 2] = ["virtio_pci", "zram"];

/// Timeout of a command: a guest may allocate gigabytes of an emulated host's memory.
const COMMAND_LIMIT: Duration = Duration::from_secs(600);

/// Which KVM is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmLocation {
    /// This machine's own.
    Hardware,
    /// That of a machine that QEMU emulates.
    Emulated,
}

impl KvmLocation {
    /// The KVM that [`measure`] uses. The first call boots a guest.
    pub fn find() -> Self {
        if kvm::hardware() { Self::Hardware } else { Self::Emulated }
    }
}

/// A measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// `bench inflate --monitor kvm`.
    Inflate(kvm_inflate::KvmInflateOptions),
    /// `bench migrate`.
    Migrate(migrate::MigrateOptions),
}

/// Files of the guests, since nothing can be built inside.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestFiles {
    vmlinuz: PathBuf,
    vmlinux: PathBuf,
    initramfs: PathBuf,
    /// Output of `uname -r`.
    pub release: String,
    /// Names of modules in loading order.
    vmm_modules: Vec<String>,
    /// Modules of guests with a page cache.
    zram_modules: Vec<String>,
    /// Kernel arguments.
    pub kernel_arguments: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct InsideTask {
    task: Task,
    files: GuestFiles,
}

/// Checks that this machine has memory for guests of this size at a time, for [`measure`].
///
/// # Errors
/// The error has the needed and the available amount.
pub fn check_memory(guests_mib: u64) -> Result<()> {
    Ok(kvm::check_memory(guests_mib)?)
}

/// Runs `task` on a KVM, if needed in a machine with memory for guests of `guests_mib` at a time,
/// and returns its report. Calls `progress` with each step.
///
/// # Errors
/// A dependency is missing, or the task fails.
pub fn measure<R: DeserializeOwned>(
    task: Task,
    kernel_arguments: &[String],
    guests_mib: u64,
    limit: Duration,
    progress: &mut dyn FnMut(&str),
) -> Result<R> {
    let directory = Scratch::new("bench")?;
    let files = GuestFiles::prepare(directory.path(), kernel_arguments)?;
    let order =
        serde_json::to_string(&InsideTask { task, files }).map_err(host("writing the task"))?;
    let mut report = None;
    let mut last = String::new();
    let mut print = |line: &str| match line.strip_prefix(REPORT) {
        Some(text) => report = Some(text.to_owned()),
        None => {
            progress(line);
            line.clone_into(&mut last);
        }
    };
    let words = INSIDE.iter().copied().chain([order.as_str()]).map(OsStr::new);
    let words: Vec<&OsStr> = words.collect();
    let place = KvmLocation::find();
    check_memory(guests_mib)?;
    let code = if place == KvmLocation::Hardware {
        print("using this machine's KVM");
        kvm_host::start_again(&words, &mut print)?
    } else {
        print("booting a machine with KVM");
        let mut machine = KvmMachine::boot_populated(guests_mib)?;
        machine.run_with_lines(&kvm_host::this_program()?, &words, &[], limit, &mut print)?.code
    };
    let report = report.ok_or_else(|| {
        wrong(format!("the measurement ended with {code:?} and without a report: {last}"))
    })?;
    serde_json::from_str(&report).map_err(host("reading the report"))
}

/// Runs the task inside. `say` prints a line.
///
/// # Errors
/// The task fails.
pub fn inside(program: &Path, order: &str, say: &mut dyn FnMut(&str)) -> Result<()> {
    let InsideTask { task, files } =
        serde_json::from_str(order).map_err(host("reading the task"))?;
    kvm_host::raise_loopback();
    let report = match task {
        Task::Inflate(options) => {
            serde_json::to_string(&kvm_inflate::run(program, &files, &options, say)?)
        }
        Task::Migrate(options) => {
            serde_json::to_string(&migrate::run(program, &files, &options, say)?)
        }
    };
    say(&format!("{REPORT}{}", report.map_err(host("writing the report"))?));
    Ok(())
}

impl GuestFiles {
    fn prepare(directory: &Path, kernel_arguments: &[String]) -> Result<Self> {
        let kernel = lab::debian::kernel(Release::Cloud6_12)?;
        let mut files = kernel.modules(&VMM_MODULES)?;
        let vmm_modules = names(&files);
        let others = kernel.modules(&OTHER_MODULES)?;
        let zram_modules = names(&others);
        let stock = kernel.modules(&[Driver::Stock.module_name()])?;
        for file in others.into_iter().chain(stock) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
        files.push(guest_build::balloon_module(&kernel.tree()?)?);
        let initramfs = directory.join("initramfs.cpio");
        Guest::qemu(&kernel).modules(&files).write_initramfs(&initramfs)?;
        Ok(Self {
            vmlinux: kernel.vmlinux()?,
            vmlinuz: kernel.vmlinuz,
            initramfs,
            release: kernel.release,
            vmm_modules,
            zram_modules,
            kernel_arguments: kernel_arguments.to_vec(),
        })
    }

    /// Builds a guest of `aerostat run`.
    pub(crate) fn vmm(&self, program: &Path, name: &str, memory_mib: u64) -> GuestBuilder {
        let builder = Guest::vmm(program, &self.vmlinux);
        self.with_words(builder.memory_mib(memory_mib)).machine_arguments(["--name", name])
    }

    /// Builds a guest of QEMU.
    pub(crate) fn qemu(&self, memory_mib: u64) -> GuestBuilder {
        let kernel = DebianKernel::of_file(&self.vmlinuz);
        let builder = Guest::qemu(&kernel).hardware(true).qemu_program("qemu-system-x86_64");
        self.with_words(builder.memory_mib(memory_mib))
    }

    fn with_words(&self, builder: GuestBuilder) -> GuestBuilder {
        let builder = builder.initramfs(&self.initramfs);
        self.kernel_arguments.iter().fold(builder, |builder, word| builder.kernel_argument(word))
    }

    /// Loads the modules of `aerostat run`'s guests, and the balloon driver.
    pub(crate) fn load_balloon_driver(&self, guest: &mut Guest, driver: Driver) -> Result<()> {
        load(guest, &self.vmm_modules)?;
        load(guest, &[driver.module_name().to_owned()])
    }

    /// Loads the modules for a page cache.
    pub(crate) fn load_zram(&self, guest: &mut Guest) -> Result<()> {
        load(guest, &self.zram_modules)
    }
}

/// Runs a command in the guest.
pub(crate) fn command(guest: &mut Guest, command: &str) -> Result<String> {
    Ok(guest.run_within(command, COMMAND_LIMIT)?.text)
}

/// Runs a command in the guest whose answer is a number.
pub(crate) fn number(guest: &mut Guest, line: &str) -> Result<u64> {
    let answer = command(guest, line)?;
    let number = answer.parse();
    number.map_err(|_| BenchError::GuestAnswer { command: line.to_owned(), answer })
}

fn load(guest: &mut Guest, modules: &[String]) -> Result<()> {
    modules.iter().try_for_each(|name| command(guest, &format!("insmod {name}")).map(drop))
}

fn names(files: &[PathBuf]) -> Vec<String> {
    let stem = |file: &PathBuf| Some(file.file_stem()?.to_string_lossy().into_owned());
    files.iter().filter_map(stem).collect()
}
