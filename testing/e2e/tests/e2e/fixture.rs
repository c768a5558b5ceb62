//! A guest in User Mode Linux and its balloon back end, for tests. Errors panic.

use std::fs::{File, OpenOptions};
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use bench::{Driver, TestbedOptions};
use control::{BALLOON_PAGE_BYTES, Status};
use lab::{Backing, Guest, GuestMemoryDir};

use crate::program::{outcome, program};

pub(crate) use bench::{LIMIT, REPORTED_MIB};

/// Balloon pages in a MiB.
pub(crate) const PAGES_PER_MIB: u32 = 256;

/// Size of the guest's memory directory, as a multiple: a new guest may overlap an ending one.
const MEMORY_DIR_FACTOR: u64 = 2;

/// Host side: a listening back end, and a directory for guest memory.
pub(crate) struct Host {
    host: bench::Host,
    _memory: GuestMemoryDir,
}

impl Deref for Host {
    type Target = bench::Host;
    fn deref(&self) -> &bench::Host {
        &self.host
    }
}

impl Host {
    pub(crate) fn start(name: &str, backing: Backing, memory_mib: u64) -> Self {
        Self::start_with(name, backing, memory_mib, &[])
    }

    /// Starts a host with more arguments for the back end.
    pub(crate) fn start_with(
        name: &str,
        backing: Backing,
        memory_mib: u64,
        arguments: &[&str],
    ) -> Self {
        let memory = GuestMemoryDir::mount(backing, MEMORY_DIR_FACTOR * memory_mib).unwrap();
        let options = TestbedOptions {
            program: program().to_owned(),
            kernel: lab::uml::kernel().unwrap(),
            memory_mib,
            memory_dir: memory.path().to_owned(),
        };
        Self { host: bench::Host::start(name, &options, arguments).unwrap(), _memory: memory }
    }

    /// Boots a guest that can load `driver`. Does not load it.
    pub(crate) fn boot(&self, driver: Driver) -> Fixture<'_> {
        self.boot_with(driver, &[])
    }

    /// Boots a guest with more kernel arguments.
    pub(crate) fn boot_with(&self, driver: Driver, words: &[&str]) -> Fixture<'_> {
        let fixture = self.host.boot(driver, |guest| {
            words.iter().fold(guest, |guest, word| guest.kernel_argument(*word))
        });
        Fixture { host: self, fixture: fixture.unwrap() }
    }

    /// Stops the back end and returns its exit status.
    pub(crate) fn stop(self) -> ExitStatus {
        self.host.stop().unwrap()
    }

    /// Runs `aerostat`. Returns exit code, standard output, standard error.
    pub(crate) fn aerostat(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(program());
        command.args(arguments).env("AEROSTAT_RUNTIME_DIR", self.directory());
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        outcome(&command.output().unwrap())
    }

    pub(crate) fn status(&self) -> Status {
        self.host.status().unwrap()
    }

    /// Sets the balloon target in pages. Does not wait.
    pub(crate) fn set_target(&self, pages: u32) {
        self.client.set_balloon(bytes(pages), Duration::ZERO).unwrap();
    }

    /// Polls the status until `done`.
    pub(crate) fn until(&self, what: &str, done: impl FnMut(&Status) -> bool) -> Status {
        well(self.host.until(what, done))
    }

    /// Waits until the balloon is at its target, and checks the invariants.
    pub(crate) fn wait_at_target(&self) -> Status {
        well(self.host.wait_at_target())
    }
}

/// A booted guest with its host.
pub(crate) struct Fixture<'a> {
    host: &'a Host,
    fixture: bench::Fixture<'a>,
}

impl<'a> Fixture<'a> {
    /// Runs a command in the guest and returns its one-line answer.
    pub(crate) fn run(&mut self, command: &str) -> String {
        well(self.fixture.run(command))
    }

    pub(crate) fn load_driver(&mut self) {
        well(self.fixture.load_driver());
    }

    pub(crate) fn unload_driver(&mut self) {
        well(self.fixture.unload_driver());
    }

    pub(crate) fn free_mib(&mut self) -> u64 {
        well(self.fixture.free_mib())
    }

    /// Sum of some values of `/proc/meminfo`, in bytes.
    pub(crate) fn meminfo_bytes(&mut self, names: &[&str]) -> u64 {
        let lines = self.lines("meminfo");
        let kib = |name: &&str| -> u64 {
            let line = lines.iter().find_map(|line| line.strip_prefix(*name)?.strip_prefix(':'));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap()
        };
        names.iter().map(kib).sum::<u64>() << 10
    }

    /// A counter of our driver.
    pub(crate) fn counter(&mut self, name: &str) -> u64 {
        let path = format!("/sys/bus/virtio/devices/virtio0/balloon/{name}");
        self.lines(&format!("cat {path}")).join("").parse().unwrap()
    }

    /// Runs a command in the guest and returns the lines of its answer.
    pub(crate) fn lines(&mut self, command: &str) -> Vec<String> {
        self.fixture.guest.run(command).unwrap().lines
    }

    /// Output of the guest's kernel and init so far.
    pub(crate) fn log(&self) -> String {
        self.fixture.guest.console_log()
    }

    /// Fills a file and verifies each of its pages.
    pub(crate) fn fill_and_verify(&mut self, file: &str, mib: u64, seed: u64) {
        self.run(&format!("fill {file} {mib} {seed}"));
        self.verify(file, mib, seed);
    }

    /// Verifies each page of a file.
    pub(crate) fn verify(&mut self, file: &str, mib: u64, seed: u64) {
        well(self.fixture.verify(file, mib, seed));
    }

    /// Fragments the guest's free memory except `leave_mib`, until [`Self::defragment`].
    pub(crate) fn fragment(&mut self, leave_mib: u64) {
        well(self.fixture.fragment(leave_mib));
    }

    pub(crate) fn defragment(&mut self) {
        well(self.fixture.defragment());
    }

    /// Returns the guest without its host.
    pub(crate) fn into_guest(self) -> Guest {
        self.fixture.guest
    }

    /// The benchmark fixture below.
    pub(crate) fn bench(&mut self) -> &mut bench::Fixture<'a> {
        &mut self.fixture
    }
}

impl Deref for Fixture<'_> {
    type Target = Host;
    fn deref(&self) -> &Host {
        self.host
    }
}

/// Unwraps a result, with the error's text in the panic.
pub(crate) fn well<T>(outcome: bench::Result<T>) -> T {
    outcome.unwrap_or_else(|error| panic!("{error}"))
}

/// Memory file of the guest that the process `pid` serves: deleted, and by far the largest of its
/// open files. `None` if the back end has not received it yet.
pub(crate) fn guest_memory(pid: u32) -> Option<File> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten().map(|fd| fd.path());
    let is_deleted = |fd: &PathBuf| {
        std::fs::read_link(fd).is_ok_and(|name| name.to_string_lossy().ends_with("(deleted)"))
    };
    let size = |fd: &PathBuf| std::fs::metadata(fd).map_or(0, |metadata| metadata.len());
    let path = fds.filter(is_deleted).max_by_key(size)?;
    OpenOptions::new().read(true).write(true).open(path).ok()
}

/// Balloon pages in bytes.
pub(crate) fn bytes(pages: u32) -> u64 {
    u64::from(pages) * BALLOON_PAGE_BYTES
}

/// MiB in balloon pages.
pub(crate) fn pages(mib: u64) -> u32 {
    u32::try_from(mib).unwrap() * PAGES_PER_MIB
}
