//! A guest in User Mode Linux and the back end of its balloon.

use std::ops::Deref;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bench::{Backend, Driver};
use control::{BALLOON_PAGE_BYTES, BalloonStatus, Client, Status};
use lab::{Backing, Guest, GuestMemoryDir, guest_build};
use tempfile::TempDir;

use crate::program::{program, told};

/// Balloon pages in a MiB.
pub(crate) const PAGES_PER_MIB: u32 = 256;

/// How long anything may take that has no reason to take long, on a machine
/// with a lot of other work.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// One question to the control API that waits for the guest.
const WAIT: Duration = Duration::from_secs(5);

/// Between two looks at what nobody announces.
const LOOK: Duration = Duration::from_millis(1);

/// Host memory that may be there beyond what the guest has left: where the host
/// cannot split a huge page at once, it only clears the part.
const RESIDENT_SLACK_BYTES: u64 = 8 << 20;

/// Where the guest's memory may be, for as many guests as follow each other.
const MEMORY_DIR_FACTOR: u64 = 2;

/// The host's side: a back end that listens, and room for the guest's memory.
pub(crate) struct Host {
    pub(crate) client: Client,
    pub(crate) backend: Backend,
    memory_mib: u64,
    memory_dir: GuestMemoryDir,
    directory: TempDir,
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
        let directory = tempfile::Builder::new().prefix("aerostat-e2e-").tempdir().unwrap();
        let memory_dir = GuestMemoryDir::mount(backing, MEMORY_DIR_FACTOR * memory_mib).unwrap();
        let backend = Backend::start_with(program(), name, directory.path(), arguments).unwrap();
        let client = backend.client().unwrap();
        Self { client, backend, memory_mib, memory_dir, directory }
    }

    /// Boots a guest that can load `driver`, and has not.
    pub(crate) fn boot(&self, driver: Driver) -> Bed<'_> {
        self.boot_with(driver, &[])
    }

    /// The same with more words on the kernel's command line.
    pub(crate) fn boot_with(&self, driver: Driver, words: &[&str]) -> Bed<'_> {
        let kernel = lab::uml::kernel().unwrap();
        let builder =
            words.iter().fold(Guest::uml(&kernel), |builder, word| builder.kernel_argument(*word));
        let guest = builder
            .memory_mib(self.memory_mib)
            .memory_dir(self.memory_dir.path())
            .balloon(self.backend.socket())
            .modules(driver.modules(&kernel).unwrap())
            .module(guest_build::lab_module(&kernel.tree()).unwrap())
            // Warnings too, not errors alone.
            .kernel_argument("ignore_loglevel")
            .boot()
            .unwrap();
        Bed { host: self, guest, driver }
    }

    /// Asks the back end to end, and returns how it did.
    pub(crate) fn stop(self) -> ExitStatus {
        self.backend.stop().unwrap()
    }

    /// Runs `aerostat`: exit code, standard output, standard error.
    pub(crate) fn aerostat(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(program());
        command.args(arguments).env("AEROSTAT_RUNTIME_DIR", self.directory.path());
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        told(&command.output().unwrap())
    }

    pub(crate) fn status(&self) -> Status {
        self.client.status().unwrap()
    }

    /// Asks for a balloon of so many pages; waits for nothing.
    pub(crate) fn set_target(&self, pages: u32) {
        self.client.set_balloon(bytes(pages), Duration::ZERO).unwrap();
    }

    /// Waits until `done`, which looks at what changes unannounced.
    pub(crate) fn until(&self, what: &str, mut done: impl FnMut(&Status) -> bool) -> Status {
        let end = Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if done(&status) {
                return status;
            }
            assert!(Instant::now() < end, "not {what}: {status:?}\n{}", self.backend.log());
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until the present change is over.
    fn wait_settled(&self) -> BalloonStatus {
        let end = Instant::now() + LIMIT;
        let mut balloon = self.client.balloon().unwrap();
        while !balloon.settled {
            let log = self.backend.log();
            assert!(Instant::now() < end, "not settled: {:?}\n{log}", self.status());
            balloon = self.client.wait(balloon.generation, WAIT).unwrap();
        }
        balloon
    }

    /// Waits until the present change is over, and checks what then holds:
    /// the guest holds what it shall, nobody did anything wrong, and what is in
    /// the balloon costs the host nothing.
    pub(crate) fn settle(&self) -> Status {
        let balloon = self.wait_settled();
        let status = self.status();
        assert_eq!(status.balloon.actual_pages, balloon.target_pages, "{status:?}");
        assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
        // A huge page that came back for one page that the guest touched is noticed
        // after a moment only.
        self.until("released", |status| {
            let (left, resident) = (self.left_bytes(status), status.resident_bytes.unwrap());
            resident <= left + RESIDENT_SLACK_BYTES
        });
        status
    }

    /// What the guest has apart from the balloon, and what waits for the rest
    /// of its huge page.
    fn left_bytes(&self, status: &Status) -> u64 {
        // Not `memory_bytes`: the file has what the guest's kernel keeps to itself, too.
        (self.memory_mib << 20) - status.balloon.actual_bytes + status.release.waiting_bytes
    }
}

/// A booted guest on its host.
pub(crate) struct Bed<'a> {
    host: &'a Host,
    driver: Driver,
    guest: Guest,
}

impl Bed<'_> {
    /// Runs a command in the guest and returns its one-line answer.
    pub(crate) fn run(&mut self, command: &str) -> String {
        self.guest.run(command).unwrap_or_else(|error| panic!("{command}: {error}")).text
    }

    /// Runs a command whose answer is a number.
    pub(crate) fn number(&mut self, command: &str) -> u64 {
        let answer = self.run(command);
        answer.parse().unwrap_or_else(|_| panic!("{command}: {answer}"))
    }

    pub(crate) fn load_driver(&mut self) {
        self.run(&format!("insmod {}", self.driver.module_name()));
    }

    pub(crate) fn unload_driver(&mut self) {
        self.run(&format!("rmmod {}", self.driver.module_name()));
    }

    pub(crate) fn free_mib(&mut self) -> u64 {
        self.number("free-mib")
    }

    /// The sum of some values of `/proc/meminfo`, in bytes.
    pub(crate) fn meminfo_bytes(&mut self, names: &[&str]) -> u64 {
        let lines = self.guest.run("meminfo").unwrap().lines;
        let kib = |name: &&str| -> u64 {
            let line = lines.iter().find_map(|line| line.strip_prefix(*name)?.strip_prefix(':'));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap()
        };
        names.iter().map(kib).sum::<u64>() << 10
    }

    /// A counter of our driver.
    pub(crate) fn counter(&mut self, name: &str) -> u64 {
        let path = format!("/sys/bus/virtio/devices/virtio0/balloon/{name}");
        let lines = self.guest.run(&format!("cat {path}")).unwrap().lines;
        lines.join("").parse().unwrap()
    }

    /// What the guest's kernel has said.
    pub(crate) fn log(&self) -> String {
        self.guest.console_log()
    }

    /// Fills a file and checks each of its pages.
    pub(crate) fn fill_and_verify(&mut self, file: &str, mib: u64, seed: u64) {
        self.run(&format!("fill {file} {mib} {seed}"));
        self.verify(file, mib, seed);
    }

    /// Checks each page of a file.
    pub(crate) fn verify(&mut self, file: &str, mib: u64, seed: u64) {
        let wrong = self.number(&format!("verify {file} {mib} {seed}"));
        assert_eq!(wrong, 0, "wrong pages in {file} ({mib} MiB): {:?}", self.status());
    }

    /// Fragments the guest's free memory but `leave_mib`, until [`Self::defragment`].
    pub(crate) fn fragment(&mut self, leave_mib: u64) {
        self.run("insmod lab_memory");
        self.guest.fragment(leave_mib).unwrap();
    }

    pub(crate) fn defragment(&mut self) {
        self.run("rmmod lab_memory");
    }

    /// What the guest printed so far.
    pub(crate) fn console_log(&self) -> String {
        self.guest.console_log()
    }

    /// The guest alone.
    pub(crate) fn into_guest(self) -> Guest {
        self.guest
    }
}

impl Deref for Bed<'_> {
    type Target = Host;
    fn deref(&self) -> &Host {
        self.host
    }
}

/// Bytes of balloon pages.
pub(crate) fn bytes(pages: u32) -> u64 {
    u64::from(pages) * BALLOON_PAGE_BYTES
}

/// Balloon pages of so many MiB.
pub(crate) fn pages(mib: u64) -> u32 {
    u32::try_from(mib).unwrap() * PAGES_PER_MIB
}
