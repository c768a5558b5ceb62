//! A running guest: how it is described, booted, asked and ended.

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

/// How long a boot may take: seconds in User Mode Linux, half a minute in emulation on a machine
/// with other work to do.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// How long a command may take unless the caller says otherwise: touching 4 GiB of small pages
/// in emulation takes a minute.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// How long the processes of a killed guest may take to give back gigabytes of memory.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Where the laboratory's module is told what to do.
const LAB_PARAMETERS: &str = "/sys/module/lab_memory/parameters";

/// Memory of a guest that does not say: the main measurement's.
const DEFAULT_MEMORY_MIB: u64 = 4096;

/// A guest that is not booted yet.
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

    /// Sets the directory where User Mode Linux makes the file that is its memory.
    pub fn memory_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.memory_dir = path.into();
        self
    }

    /// Adds a balloon whose vhost-user back end listens at this socket (User Mode Linux only).
    pub fn balloon(mut self, socket: impl Into<PathBuf>) -> Self {
        self.balloons.push(socket.into());
        self
    }

    /// Keeps the guest on one core of this machine.
    pub fn cpu(mut self, cpu: Option<usize>) -> Self {
        self.cpu = cpu;
        self
    }

    /// Packs a module, which the guest loads by `insmod NAME`.
    pub fn module(mut self, path: impl Into<PathBuf>) -> Self {
        self.modules.push(path.into());
        self
    }

    /// Packs several modules.
    pub fn modules(mut self, paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        self.modules.extend(paths.into_iter().map(Into::into));
        self
    }

    /// Adds a word to the kernel command line.
    pub fn kernel_argument(mut self, argument: impl Into<String>) -> Self {
        self.kernel_arguments.push(argument.into());
        self
    }

    /// Adds words to the command line of QEMU or of our own monitor, for instance devices.
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

    /// Boots with an archive made by [`write_initramfs`](Self::write_initramfs), instead of one
    /// that is packed now.
    pub fn initramfs(mut self, path: impl Into<PathBuf>) -> Self {
        self.initramfs = Some(path.into());
        self
    }

    /// Packs init and the modules into an archive, for who has no compiler when the guest boots.
    ///
    /// # Errors
    /// What is missing on this machine, or the file cannot be written.
    pub fn write_initramfs(&self, path: &Path) -> Result<()> {
        boot::write_initramfs(self, path)
    }

    /// Boots on this QEMU instead of the machine's own.
    pub fn qemu_program(mut self, path: impl Into<PathBuf>) -> Self {
        self.qemu_program = Some(path.into());
        self
    }

    /// Boots nothing, but waits for a guest that another QEMU sends to this address, such as
    /// `tcp:127.0.0.1:7000`. [`boot`](Self::boot) does not wait until it has come.
    pub fn incoming(mut self, address: impl Into<String>) -> Self {
        self.incoming = Some(address.into());
        self
    }

    /// Writes all that the guest prints to a file, with times.
    pub fn log_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.log_file = Some(path.into());
        self
    }

    /// Sets how long the boot may take.
    pub fn boot_limit(mut self, limit: Duration) -> Self {
        self.boot_limit = limit;
        self
    }

    /// Boots the guest and waits until it takes commands.
    ///
    /// # Errors
    /// What is missing on this machine, or why the guest did not come up, with the end of what it
    /// printed.
    pub fn boot(self) -> Result<Guest> {
        let started = Instant::now();
        let directory = tempfile::Builder::new()
            .prefix("aerostat-lab-")
            .tempdir()
            .context(|| "make a temporary directory".to_owned())?;
        let launch = boot::prepare(&self, directory.path())?;
        let record = Record::new(self.log_file.as_deref())?;
        let mut kept = GuardedChild::start(&launch.words, directory.path(), &launch.variables())?;
        let child = kept.child();
        let missing = || LabError::Unexpected {
            what: "the guest's streams".to_owned(),
            detail: "they are not there".to_owned(),
        };
        let input = child.stdin.take().ok_or_else(missing)?;
        let output = child.stdout.take().ok_or_else(missing)?;
        let messages = child.stderr.take().ok_or_else(missing)?;
        let (last_word, ended) = channel::<()>();
        record.follow("kernel", messages, move |_, _| {
            // Held only to be dropped when the last process of the guest has gone.
            let _ = &last_word;
        });
        let console = Box::new(Console::new(input, output, record.clone()));
        let mut guest = Guest { console, kept, record, ended, _directory: directory };
        if self.incoming.is_some() || matches!(self.machine, Machine::Resumed { .. }) {
            return Ok(guest);
        }
        let ready = guest.console.wait_ready(self.boot_limit);
        guest.explain(ready)?;
        tracing::info!(milliseconds = started.elapsed().as_millis(), "guest booted");
        Ok(guest)
    }
}

/// A running guest; it ends when this is dropped.
pub struct Guest {
    console: Box<Console>,
    kept: GuardedChild,
    record: Record,
    /// Disconnects when no process holds the guest's standard error any more.
    ended: Receiver<()>,
    _directory: tempfile::TempDir,
}

impl Guest {
    /// A guest in User Mode Linux.
    pub fn uml(kernel: &UmlKernel) -> GuestBuilder {
        GuestBuilder::new(Machine::Uml(kernel.clone()))
    }

    /// A guest in QEMU, emulated.
    pub fn qemu(kernel: &DebianKernel) -> GuestBuilder {
        GuestBuilder::new(Machine::Qemu(kernel.clone()))
    }

    /// A guest of our own monitor, which needs a KVM; `program` is `aerostat`, and `kernel` a
    /// vmlinuz or a vmlinux.
    pub fn monitor(program: impl Into<PathBuf>, kernel: impl Into<PathBuf>) -> GuestBuilder {
        GuestBuilder::new(Machine::Monitor { program: program.into(), kernel: kernel.into() })
    }

    /// Our own monitor, which waits for a guest from another one and tells where on standard
    /// error. [`boot`](GuestBuilder::boot) does not wait until the guest has come.
    pub fn receiver(program: impl Into<PathBuf>) -> GuestBuilder {
        GuestBuilder::new(Machine::Resumed { program: program.into(), command: "receive" })
    }

    /// Our own monitor with a guest from a file. [`boot`](GuestBuilder::boot) does not wait until
    /// it runs, since it is ready when it does.
    pub fn restored(program: impl Into<PathBuf>) -> GuestBuilder {
        GuestBuilder::new(Machine::Resumed { program: program.into(), command: "restore" })
    }

    /// Runs a command of the guest's init and returns its answer.
    ///
    /// # Errors
    /// The guest's refusal, its silence, or its end.
    pub fn run(&mut self, command: &str) -> Result<Reply> {
        self.run_within(command, COMMAND_LIMIT)
    }

    /// Runs a command that may take this long.
    ///
    /// # Errors
    /// The guest's refusal, its silence, or its end.
    pub fn run_within(&mut self, command: &str, limit: Duration) -> Result<Reply> {
        let reply = self.console.run(command, limit);
        self.explain(reply)
    }

    /// Runs a command that may take this long; `tell` hears each line of its answer as it comes.
    ///
    /// # Errors
    /// The guest's refusal, its silence, or its end.
    pub fn run_telling(
        &mut self,
        command: &str,
        limit: Duration,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        let reply = self.console.run_telling(command, limit, tell);
        self.explain(reply)
    }

    /// Sends a command whose answer is waited for later, if the guest is still here then; returns its
    /// number.
    ///
    /// # Errors
    /// The guest's end.
    pub fn ask(&mut self, command: &str) -> Result<u64> {
        let asked = self.console.send(command);
        self.explain(asked)
    }

    /// The answer to a command that was [asked](Self::ask).
    ///
    /// # Errors
    /// The guest's refusal, its silence, or its end; and [`LabError::NotHeard`] where the guest has
    /// answered a later command, and so did not hear this one.
    pub fn answer(&mut self, number: u64, command: &str, limit: Duration) -> Result<Reply> {
        let reply = self.console.wait(number, command, limit);
        self.explain(reply)
    }

    /// Types the end of a line that has no command in it.
    pub(crate) fn press_return(&mut self) -> Result<()> {
        self.console.press_return().context(|| "type on a guest's console".to_owned())
    }

    /// Goes on with the conversation with a guest that was moved here from `from`, which has ended.
    pub fn continue_from(&mut self, from: &mut Self) {
        self.console.continue_from(&mut from.console);
    }

    /// Loads packed modules in this order, by the paths they were packed from.
    ///
    /// # Errors
    /// The first module that the guest refuses.
    pub fn load(&mut self, modules: &[PathBuf]) -> Result<()> {
        for module in modules {
            self.run(&format!("insmod {}", module_name(module)?))?;
        }
        Ok(())
    }

    /// Fragments all free memory but `leave_mib` MiB: pins one page in every second 2 MiB, and
    /// returns how many pages that is. Needs [`crate::guest_build::lab_module`] packed and loaded.
    ///
    /// # Errors
    /// When the module is not loaded.
    pub fn fragment(&mut self, leave_mib: u64) -> Result<u64> {
        self.run(&format!("write {LAB_PARAMETERS}/fragment {leave_mib}"))?;
        let pinned = self.run(&format!("cat {LAB_PARAMETERS}/pinned_pages"))?.lines.join(" ");
        pinned.parse().map_err(|_| LabError::Unexpected {
            what: "the number of pinned pages".to_owned(),
            detail: pinned,
        })
    }

    /// The main process of the guest, which leads its process group.
    pub fn pid(&self) -> u32 {
        self.kept.pid()
    }

    /// Everything the guest printed, with times.
    pub fn console_log(&self) -> String {
        self.record.tail(usize::MAX)
    }

    /// Switches the guest off and returns how its main process ended.
    ///
    /// # Errors
    /// When the guest stays on.
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
        self.kept.end()
    }

    /// Waits until the guest's main process ends by itself, and returns how it did. All that it
    /// printed is in the record then.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.wait_end()?;
        let status = self.kept.end()?;
        // It disconnects when standard error has been read to its end.
        let _ = self.ended.recv_timeout(END_LIMIT);
        Ok(status)
    }

    /// Waits until the main process ended by itself.
    fn wait_end(&mut self) -> Result<()> {
        let deadline = Instant::now() + END_LIMIT;
        while self.kept.status()?.is_none() {
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

    /// Replaces the mere end of the console by how the guest's process ended.
    fn explain<T>(&mut self, outcome: Result<T>) -> Result<T> {
        let Err(LabError::Ended { command, tail, .. }) = outcome else {
            return outcome;
        };
        let status = match self.kept.status()? {
            Some(status) => status.to_string(),
            None => "it closed its console".to_owned(),
        };
        Err(LabError::Ended { command, status, tail })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.kept.end() {
            tracing::error!("a guest may still be running: {error}");
        }
        // Its other processes die at the same time, but only their open files tell when.
        let end = self.ended.recv_timeout(END_LIMIT);
        if end == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            tracing::error!("processes of the guest {} do not end", self.pid());
        }
    }
}

/// What a path is called without its directory and ending.
pub(crate) fn module_name(path: &Path) -> Result<String> {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    stem.ok_or_else(|| LabError::Unexpected {
        what: format!("the module path {}", path.display()),
        detail: "it has no file name".to_owned(),
    })
}
