//! Measurements that need a KVM: on this machine, or inside of a machine of the lab that has one.
//!
//! The program starts itself again there, with all that it needs named by one word of JSON. Lines
//! that it prints are progress, but for the last, which is the report.

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

/// Words that start the program inside; the order is the last one.
pub const INSIDE: [&str; 2] = ["bench", "inside"];

/// Begins the line with the report.
const REPORT: &str = "report: ";

/// What our monitor's guests need besides the balloon's driver, and what fills their page cache.
const MONITOR_MODULES: [&str; 1] = ["virtio_mmio"];
const OTHER_MODULES: [&str; 2] = ["virtio_pci", "zram"];

/// A guest may have to get gigabytes of memory from an emulated host for one command.
const COMMAND_LIMIT: Duration = Duration::from_secs(600);

/// Whose KVM it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// This machine's own.
    Hardware,
    /// That of a machine which QEMU emulates.
    Emulated,
}

impl Place {
    /// Where [`measure`] measures. Asked first, it boots a guest.
    pub fn find() -> Self {
        if kvm::hardware() { Self::Hardware } else { Self::Emulated }
    }
}

/// What is measured there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// `bench inflate --monitor kvm`.
    Inflate(kvm_inflate::KvmInflateOptions),
    /// `bench migrate`.
    Migrate(migrate::MigrateOptions),
}

/// What guests boot there, where nothing can be built.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestFiles {
    vmlinuz: PathBuf,
    vmlinux: PathBuf,
    initramfs: PathBuf,
    /// What `uname -r` says.
    pub release: String,
    /// Names of modules, in loading order.
    monitor_modules: Vec<String>,
    /// Those of guests with a page cache.
    zram_modules: Vec<String>,
    /// Words for the kernel.
    pub kernel_arguments: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Order {
    task: Task,
    files: GuestFiles,
}

/// Whether this machine has memory for guests of so much at a time, where [`measure`] measures.
///
/// # Errors
/// How much there is, and how much is needed.
pub fn has_room(guests_mib: u64) -> Result<()> {
    Ok(kvm::has_room(guests_mib)?)
}

/// Carries out `task` where a KVM is, in a machine with room for guests of `guests_mib` at a time
/// if need be, and returns its report. `progress` hears of each step.
///
/// # Errors
/// What is missing on this machine, or what went wrong inside.
pub fn measure<R: DeserializeOwned>(
    task: Task,
    kernel_arguments: &[String],
    guests_mib: u64,
    limit: Duration,
    progress: &mut dyn FnMut(&str),
) -> Result<R> {
    let directory = Scratch::new("bench")?;
    let files = GuestFiles::prepare(directory.path(), kernel_arguments)?;
    let order = serde_json::to_string(&Order { task, files }).map_err(host("writing an order"))?;
    let mut report = None;
    let mut last = String::new();
    let mut tell = |line: &str| match line.strip_prefix(REPORT) {
        Some(text) => report = Some(text.to_owned()),
        None => {
            progress(line);
            line.clone_into(&mut last);
        }
    };
    let words = INSIDE.iter().copied().chain([order.as_str()]).map(OsStr::new);
    let words: Vec<&OsStr> = words.collect();
    let place = Place::find();
    has_room(guests_mib)?;
    let code = if place == Place::Hardware {
        tell("this machine's KVM boots guests");
        kvm_host::start_again(&words, &mut tell)?
    } else {
        tell("booting a machine with a KVM");
        let mut machine = KvmMachine::boot_populated(guests_mib)?;
        machine.run_telling(&kvm_host::this_program()?, &words, &[], limit, &mut tell)?.code
    };
    let report = report.ok_or_else(|| {
        wrong(format!("the measurement ended with {code:?} and without a report: {last}"))
    })?;
    serde_json::from_str(&report).map_err(host("reading the report"))
}

/// What the program does inside; `say` prints a line.
///
/// # Errors
/// What went wrong.
pub fn inside(program: &Path, order: &str, say: &mut dyn FnMut(&str)) -> Result<()> {
    let Order { task, files } = serde_json::from_str(order).map_err(host("reading the order"))?;
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
        let mut files = kernel.modules(&MONITOR_MODULES)?;
        let monitor_modules = names(&files);
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
            monitor_modules,
            zram_modules,
            kernel_arguments: kernel_arguments.to_vec(),
        })
    }

    /// A guest of our monitor.
    pub(crate) fn monitor(&self, program: &Path, name: &str, memory_mib: u64) -> GuestBuilder {
        let builder = Guest::monitor(program, &self.vmlinux);
        self.with_words(builder.memory_mib(memory_mib)).machine_arguments(["--name", name])
    }

    /// A guest of QEMU.
    pub(crate) fn qemu(&self, memory_mib: u64) -> GuestBuilder {
        let kernel = DebianKernel::of_file(&self.vmlinuz);
        let builder = Guest::qemu(&kernel).hardware(true).qemu_program("qemu-system-x86_64");
        self.with_words(builder.memory_mib(memory_mib))
    }

    fn with_words(&self, builder: GuestBuilder) -> GuestBuilder {
        let builder = builder.initramfs(&self.initramfs);
        self.kernel_arguments.iter().fold(builder, |builder, word| builder.kernel_argument(word))
    }

    /// Loads what the balloon of our monitor needs, and its driver.
    pub(crate) fn load_monitor(&self, guest: &mut Guest, driver: Driver) -> Result<()> {
        load(guest, &self.monitor_modules)?;
        load(guest, &[driver.module_name().to_owned()])
    }

    /// Loads what a page cache needs.
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
