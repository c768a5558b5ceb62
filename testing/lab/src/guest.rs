//! A running Linux guest: builder, commands and end.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::boot::{self, Machine};
use crate::console::{Console, Record, Reply};
use crate::debian::DebianKernel;
use crate::error::{Context, LabError, Result};
use crate::keeper::GuardedChild;
use crate::uml::UmlKernel;

/// Timeout of a boot: it takes seconds in User Mode Linux, half a minute in emulation on a busy
/// machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Default timeout of a command: touching 4 GiB of small pages in emulation takes a minute.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// Timeout for a killed guest's processes to free gigabytes of memory.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Parameters of the module `lab_memory`.
const LAB_PARAMETERS: &str = "/sys/module/lab_memory/parameters";

/// Default memory of a guest: that of the main benchmark.
const DEFAULT_MEMORY_MIB: u64 = 4096;

/// Describes a guest before its boot.
#[derive(Debug, Clone)]
#[must_use]
pub struct GuestBuilder {
    pub(crate) machine: Machine,
    pub(crate) memory_mib: u64,
    pub(crate) memory_dir: PathBuf,
    pub(crate) balloons: Vec<PathBuf>,
    pub(crate) cpu: Option<usize>,
    pub(crate) modules: Vec<PathBuf>,
    pub(crate) kernel_arguments: Vec<String>,
    pub(crate) machine_arguments: Vec<String>,
    pub(crate) hardware: bool,
    pub(crate) initramfs: Option<PathBuf>,
    pub(crate) qemu_program: Option<PathBuf>,
    pub(crate) incoming: Option<String>,
    log_file: Option<PathBuf>,
    boot_limit: Duration,
}

impl GuestBuilder {
    fn new(machine: Machine) -> Self {
        Self {
            machine,
            memory_mib: DEFAULT_MEMORY_MIB,
            memory_dir: PathBuf::from("/dev/shm"),
            balloons: Vec::new(),
            cpu: None,
            modules: Vec::new(),
            kernel_arguments: Vec::new(),
            machine_arguments: Vec::new(),
            hardware: false,
            initramfs: None,
            qemu_program: None,
            incoming: None,
            log_file: None,
            boot_limit: BOOT_LIMIT,
        }
    }

    /// Sets the guest's memory in MiB.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Sets the directory of User Mode Linux's memory file.
    pub fn memory_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.memory_dir = path.into();
        self
    }

    /// Adds a balloon whose vhost-user back end listens at this socket (User Mode Linux only).
    pub fn balloon(mut self, socket: impl Into<PathBuf>) -> Self {
        self.balloons.push(socket.into());
        self
    }

    /// Pins the guest to one host CPU.
    pub fn cpu(mut self, cpu: Option<usize>) -> Self {
        self.cpu = cpu;
        self
    }

    /// Adds a module to the initramfs. The command `insmod NAME` loads it.
    pub fn module(mut self, path: impl Into<PathBuf>) -> Self {
        self.modules.push(path.into());
        self
    }

    /// Adds modules to the initramfs.
    pub fn modules(mut self, paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        self.modules.extend(paths.into_iter().map(Into::into));
        self
    }

    /// Adds an argument to the kernel command line.
    pub fn kernel_argument(mut self, argument: impl Into<String>) -> Self {
        self.kernel_arguments.push(argument.into());
        self
    }

    /// Adds arguments to the command line of QEMU or `aerostat run`, such as devices.
    pub fn machine_arguments(
        mut self,
        arguments: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        self.machine_arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Uses this machine's KVM instead of emulation (QEMU only).
    pub fn hardware(mut self, hardware: bool) -> Self {
        self.hardware = hardware;
        self
    }

    /// Boots with an archive of [`write_initramfs`](Self::write_initramfs) instead of packing one
    /// now.
    pub fn initramfs(mut self, path: impl Into<PathBuf>) -> Self {
        self.initramfs = Some(path.into());
        self
    }

    /// Writes an initramfs with init and the modules, for a boot without a compiler.
    ///
    /// # Errors
    /// A build dependency is missing, or the file cannot be written.
    pub fn write_initramfs(&self, path: &Path) -> Result<()> {
        boot::write_initramfs(self, path)
    }

    /// Uses this QEMU instead of the installed one.
    pub fn qemu_program(mut self, path: impl Into<PathBuf>) -> Self {
        self.qemu_program = Some(path.into());
        self
    }

    /// Does not boot, but waits for a guest that another QEMU migrates to this address, such as
    /// `tcp:127.0.0.1:7000`. [`boot`](Self::boot) does not wait for its arrival.
    pub fn incoming(mut self, address: impl Into<String>) -> Self {
        self.incoming = Some(address.into());
        self
    }

    /// Writes all guest output to a file, with times.
    pub fn log_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.log_file = Some(path.into());
        self
    }

    /// Sets the boot timeout.
    pub fn boot_limit(mut self, limit: Duration) -> Self {
        self.boot_limit = limit;
        self
    }

    /// Boots the guest and waits until it accepts commands.
    ///
    /// # Errors
    /// A dependency is missing, or the guest does not boot; then the error quotes its last output.
    pub fn boot(self) -> Result<Guest> {
        let started = Instant::now();
        let directory = tempfile::Builder::new()
            .prefix("aerostat-lab-")
            .tempdir()
            .context(|| "make a temporary directory".to_owned())?;
        let launch = boot::prepare(&self, directory.path())?;
        let record = Record::new(self.log_file.as_deref())?;
        let mut process =
            GuardedChild::start(&launch.words, directory.path(), &launch.variables())?;
        let child = process.child();
        let missing = || LabError::Unexpected {
            what: "the guest's streams".to_owned(),
            detail: "they are missing".to_owned(),
        };
        let input = child.stdin.take().ok_or_else(missing)?;
        let output = child.stdout.take().ok_or_else(missing)?;
        let messages = child.stderr.take().ok_or_else(missing)?;
        let (last_word, ended) = channel::<()>();
        record.follow("kernel", messages, move |_, _| {
            // Dropped when the last process of the guest has closed its standard error.
            let _ = &last_word;
        });
        let console = Box::new(Console::new(input, output, record.clone()));
        let mut guest = Guest { console, process, record, ended, _directory: directory };
        if self.incoming.is_some() || matches!(self.machine, Machine::Resumed { .. }) {
            return Ok(guest);
        }
        let ready = guest.console.wait_ready(self.boot_limit);
        guest.explain(ready)?;
        tracing::info!(milliseconds = started.elapsed().as_millis(), "guest booted");
        Ok(guest)
    }
}

/// A running guest. Dropping this ends it.
pub struct Guest {
    console: Box<Console>,
    process: GuardedChild,
    record: Record,
    /// Disconnects when no process holds the guest's standard error.
    ended: Receiver<()>,
    _directory: tempfile::TempDir,
}

impl Guest {
    /// Builds a guest in User Mode Linux.
    pub fn uml(kernel: &UmlKernel) -> GuestBuilder {
        GuestBuilder::new(Machine::Uml(kernel.clone()))
    }

    /// Builds an emulated guest in QEMU.
    pub fn qemu(kernel: &DebianKernel) -> GuestBuilder {
        GuestBuilder::new(Machine::Qemu(kernel.clone()))
    }

    /// Builds a guest of `aerostat run`, which needs KVM. `program` is `aerostat`, and `kernel` a
    /// vmlinuz or a vmlinux.
    pub fn vmm(program: impl Into<PathBuf>, kernel: impl Into<PathBuf>) -> GuestBuilder {
        GuestBuilder::new(Machine::Vmm { program: program.into(), kernel: kernel.into() })
    }

    /// Builds an `aerostat receive`, which prints its listening address on standard error.
    /// [`boot`](GuestBuilder::boot) does not wait for a guest.
    pub fn receiver(program: impl Into<PathBuf>) -> GuestBuilder {
        GuestBuilder::new(Machine::Resumed { program: program.into(), command: "receive" })
    }

    /// Builds an `aerostat restore`. [`boot`](GuestBuilder::boot) does not wait until the guest
    /// runs: it is ready when it does.
    pub fn restored(program: impl Into<PathBuf>) -> GuestBuilder {
        GuestBuilder::new(Machine::Resumed { program: program.into(), command: "restore" })
    }

    /// Runs a command of the guest's init and returns its answer.
    ///
    /// # Errors
    /// The command fails, times out, or the guest ends.
    pub fn run(&mut self, command: &str) -> Result<Reply> {
        self.run_within(command, COMMAND_LIMIT)
    }

    /// Runs a command with this timeout.
    ///
    /// # Errors
    /// The command fails, times out, or the guest ends.
    pub fn run_within(&mut self, command: &str, limit: Duration) -> Result<Reply> {
        let reply = self.console.run(command, limit);
        self.explain(reply)
    }

    /// Runs a command with this timeout. Calls `each` with each line of its answer at once.
    ///
    /// # Errors
    /// The command fails, times out, or the guest ends.
    pub fn run_with_lines(
        &mut self,
        command: &str,
        limit: Duration,
        each: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        let reply = self.console.run_with_lines(command, limit, each);
        self.explain(reply)
    }

    /// Sends a command and returns its id, for [`answer`](Self::answer). The guest may migrate in
    /// between.
    ///
    /// # Errors
    /// The guest ends.
    pub fn send(&mut self, command: &str) -> Result<u64> {
        let sent = self.console.send(command);
        self.explain(sent)
    }

    /// Waits for the answer to a command that was [sent](Self::send).
    ///
    /// # Errors
    /// The command fails, times out, or the guest ends; [`LabError::CommandLost`] if the guest has
    /// answered a later command.
    pub fn answer(&mut self, number: u64, command: &str, limit: Duration) -> Result<Reply> {
        let reply = self.console.wait(number, command, limit);
        self.explain(reply)
    }

    /// Types an empty line.
    pub(crate) fn press_return(&mut self) -> Result<()> {
        self.console.press_return().context(|| "type on a guest's console".to_owned())
    }

    /// Takes over the console state of a guest that migrated here from `from`, which has ended.
    pub fn continue_from(&mut self, from: &mut Self) {
        self.console.continue_from(&mut from.console);
    }

    /// Loads modules of the initramfs in this order. Takes their host paths.
    ///
    /// # Errors
    /// The guest cannot load a module.
    pub fn load(&mut self, modules: &[PathBuf]) -> Result<()> {
        for module in modules {
            self.run(&format!("insmod {}", module_name(module)?))?;
        }
        Ok(())
    }

    /// Fragments all free memory except `leave_mib` MiB: pins one page in every second 2 MiB, and
    /// returns the number of pinned pages. Needs [`crate::guest_build::lab_module`] loaded.
    ///
    /// # Errors
    /// The module is not loaded.
    pub fn fragment(&mut self, leave_mib: u64) -> Result<u64> {
        self.run(&format!("write {LAB_PARAMETERS}/fragment {leave_mib}"))?;
        let pinned = self.run(&format!("cat {LAB_PARAMETERS}/pinned_pages"))?.lines.join(" ");
        pinned.parse().map_err(|_| LabError::Unexpected {
            what: "the number of pinned pages".to_owned(),
            detail: pinned,
        })
    }

    /// Id of the guest's main process and process group.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// All guest output, with times.
    pub fn console_log(&self) -> String {
        self.record.tail(usize::MAX)
    }

    /// Powers the guest off and returns the exit status of its main process.
    ///
    /// # Errors
    /// The guest stays on.
    pub fn power_off(mut self) -> Result<ExitStatus> {
        match self.run_within("poweroff", END_LIMIT) {
            Err(LabError::Ended { .. }) => {}
            Err(other) => return Err(other),
            Ok(_) => {
                return Err(LabError::Refused {
                    command: "poweroff".to_owned(),
                    reason: "it is still on".to_owned(),
                });
            }
        }
        self.wait_end()?;
        self.process.end()
    }

    /// Waits until the guest's main process ends, and returns its exit status. The record then has
    /// all of its output.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.wait_end()?;
        let status = self.process.end()?;
        // It disconnects when standard error has been read to its end.
        let _ = self.ended.recv_timeout(END_LIMIT);
        Ok(status)
    }

    /// Waits until the main process ended without a kill.
    fn wait_end(&mut self) -> Result<()> {
        let deadline = Instant::now() + END_LIMIT;
        while self.process.status()?.is_none() {
            if Instant::now() > deadline {
                let tail = self.record.tail(usize::MAX);
                let command = "poweroff".to_owned();
                return Err(LabError::Timeout { command, limit: END_LIMIT, tail });
            }
            // There is no event to wait for: the console closes just before the process ends.
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Adds the exit status of the guest's process to [`LabError::Ended`].
    fn explain<T>(&mut self, outcome: Result<T>) -> Result<T> {
        let Err(LabError::Ended { command, tail, .. }) = outcome else {
            return outcome;
        };
        let status = match self.process.status()? {
            Some(status) => status.to_string(),
            None => "it closed its console".to_owned(),
        };
        Err(LabError::Ended { command, status, tail })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.process.end() {
            tracing::error!("a guest may still be running: {error}");
        }
        // The other processes die at the same time. Their open standard error shows when.
        let end = self.ended.recv_timeout(END_LIMIT);
        if end == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            tracing::error!("processes of the guest {} have not ended", self.pid());
        }
    }
}

/// File name without directory and extension.
pub(crate) fn module_name(path: &Path) -> Result<String> {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    stem.ok_or_else(|| LabError::Unexpected {
        what: format!("the module path {}", path.display()),
        detail: "it has no file name".to_owned(),
    })
}
