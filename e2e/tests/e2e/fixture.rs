//! A guest in User Mode Linux and the back end of its balloon, for tests: what goes wrong
//! ends the test.

use std::fs::{File, OpenOptions};
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use bench::{Driver, TestbedOptions};
use control::{BALLOON_PAGE_BYTES, Status};
use lab::{Backing, Guest, GuestMemoryDir};

use crate::program::{program, told};

pub(crate) use bench::{LIMIT, REPORTED_MIB};

/// Balloon pages in a MiB.
pub(crate) const PAGES_PER_MIB: u32 = 256;

/// Where the guest's memory may be, for as many guests as follow each other.
const MEMORY_DIR_FACTOR: u64 = 2;

/// The host's side: a back end that listens, and room for the guest's memory.
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

    /// The same with more arguments for the back end.
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

    /// Boots a guest that can load `driver`, and has not.
    pub(crate) fn boot(&self, driver: Driver) -> Fixture<'_> {
        self.boot_with(driver, &[])
    }

    /// The same with more words on the kernel's command line.
    pub(crate) fn boot_with(&self, driver: Driver, words: &[&str]) -> Fixture<'_> {
        let fixture = self.host.boot(driver, |guest| {
            words.iter().fold(guest, |guest, word| guest.kernel_argument(*word))
        });
        Fixture { host: self, fixture: fixture.unwrap() }
    }

    /// Asks the back end to end, and returns how it did.
    pub(crate) fn stop(self) -> ExitStatus {
        self.host.stop().unwrap()
    }

    /// Runs `aerostat`: exit code, standard output, standard error.
    pub(crate) fn aerostat(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(program());
        command.args(arguments).env("AEROSTAT_RUNTIME_DIR", self.directory());
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        told(&command.output().unwrap())
    }

    pub(crate) fn status(&self) -> Status {
        self.host.status().unwrap()
    }

    /// Asks for a balloon of so many pages; waits for nothing.
    pub(crate) fn set_target(&self, pages: u32) {
        self.client.set_balloon(bytes(pages), Duration::ZERO).unwrap();
    }

    /// Waits until `done`, which looks at what changes unannounced.
    pub(crate) fn until(&self, what: &str, done: impl FnMut(&Status) -> bool) -> Status {
        well(self.host.until(what, done))
    }

    /// Waits until the present change is over, and checks what then holds.
    pub(crate) fn wait_at_target(&self) -> Status {
        well(self.host.wait_at_target())
    }
}

/// A booted guest on its host.
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

    /// The sum of some values of `/proc/meminfo`, in bytes.
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

    /// Runs a command in the guest and returns all but the last line of its answer.
    pub(crate) fn lines(&mut self, command: &str) -> Vec<String> {
        self.fixture.guest.run(command).unwrap().lines
    }

    /// What the guest printed so far, its kernel and its init.
    pub(crate) fn log(&self) -> String {
        self.fixture.guest.console_log()
    }

    /// Fills a file and checks each of its pages.
    pub(crate) fn fill_and_verify(&mut self, file: &str, mib: u64, seed: u64) {
        self.run(&format!("fill {file} {mib} {seed}"));
        self.verify(file, mib, seed);
    }

    /// Checks each page of a file.
    pub(crate) fn verify(&mut self, file: &str, mib: u64, seed: u64) {
        well(self.fixture.verify(file, mib, seed));
    }

    /// Fragments the guest's free memory but `leave_mib`, until [`Self::defragment`].
    pub(crate) fn fragment(&mut self, leave_mib: u64) {
        well(self.fixture.fragment(leave_mib));
    }

    pub(crate) fn defragment(&mut self) {
        well(self.fixture.defragment());
    }

    /// The guest alone.
    pub(crate) fn into_guest(self) -> Guest {
        self.fixture.guest
    }

    /// For what walks on it.
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

/// What came out well; what did not says why in a form that can be read.
pub(crate) fn well<T>(outcome: bench::Result<T>) -> T {
    outcome.unwrap_or_else(|error| panic!("{error}"))
}

/// The file of the memory of a guest that the process `pid` serves: deleted, and by far
/// the largest that it has open. None where it was not given any yet.
pub(crate) fn guest_memory(pid: u32) -> Option<File> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten().map(|fd| fd.path());
    let is_deleted = |fd: &PathBuf| {
        std::fs::read_link(fd).is_ok_and(|name| name.to_string_lossy().ends_with("(deleted)"))
    };
    let size = |fd: &PathBuf| std::fs::metadata(fd).map_or(0, |metadata| metadata.len());
    let path = fds.filter(is_deleted).max_by_key(size)?;
    OpenOptions::new().read(true).write(true).open(path).ok()
}

/// Bytes of balloon pages.
pub(crate) fn bytes(pages: u32) -> u64 {
    u64::from(pages) * BALLOON_PAGE_BYTES
}

/// Balloon pages of so many MiB.
pub(crate) fn pages(mib: u64) -> u32 {
    u32::try_from(mib).unwrap() * PAGES_PER_MIB
}
