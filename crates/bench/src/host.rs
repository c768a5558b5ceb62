//! The host's side of a guest: the back end of its balloon, and what can be waited for there.

use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use control::{BALLOON_PAGE_BYTES, BalloonStatus, Client, Status};
use lab::{Guest, GuestBuilder, Scratch, guest_build};

use crate::backend::Backend;
use crate::error::{BenchError, Result};
use crate::fixture::Fixture;
use crate::testbed::{Driver, TestbedOptions};

/// How long anything may take that has no reason to take long, on a machine
/// with a lot of other work.
pub const LIMIT: Duration = Duration::from_secs(120);

/// One question to the control API that waits for the guest.
const WAIT: Duration = Duration::from_secs(5);

/// Between two looks at what nobody announces.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Host memory that may be there beyond what the guest has left: where the host
/// cannot split a huge page at once, it only clears the part.
const RESIDENT_SLACK_BYTES: u64 = 8 << 20;

/// A back end that listens, and what guests on it have in common.
pub struct Host {
    /// A client of the control API.
    pub client: Client,
    /// The process that serves.
    pub backend: Backend,
    name: String,
    options: TestbedOptions,
    directory: Scratch,
}

impl Host {
    /// Starts the back end of the guest `name`, with more `arguments`.
    ///
    /// # Errors
    /// It does not start, with what it said.
    pub fn start(name: &str, options: &TestbedOptions, arguments: &[&str]) -> Result<Self> {
        let directory = Scratch::new("bench")?;
        let backend = Backend::start_with(&options.program, name, directory.path(), arguments)?;
        let client = backend.client()?;
        Ok(Self { client, backend, name: name.to_owned(), options: options.clone(), directory })
    }

    /// A guest on it that can load `driver`, not booted yet.
    ///
    /// # Errors
    /// Its modules cannot be built.
    pub fn guest(&self, driver: Driver) -> Result<GuestBuilder> {
        let kernel = &self.options.kernel;
        Ok(Guest::uml(kernel)
            .memory_mib(self.options.memory_mib)
            .memory_dir(&self.options.memory_dir)
            .balloon(self.backend.socket())
            .modules(driver.modules(kernel)?)
            .module(guest_build::lab_module(&kernel.tree())?))
    }

    /// Boots a guest that can load `driver`, and has not. `change` has the last word
    /// on how.
    ///
    /// # Errors
    /// The guest does not come up.
    pub fn boot(
        &self,
        driver: Driver,
        change: impl FnOnce(GuestBuilder) -> GuestBuilder,
    ) -> Result<Fixture<'_>> {
        // Warnings too, not errors alone.
        let builder = self.guest(driver)?.kernel_argument("ignore_loglevel");
        Ok(Fixture { host: self, guest: change(builder).boot()?, driver })
    }

    /// The guest's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Memory of guests on it, in MiB.
    pub const fn memory_mib(&self) -> u64 {
        self.options.memory_mib
    }

    /// Where sockets and logs are, which suits `AEROSTAT_RUNTIME_DIR`.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Asks the back end to end, and returns how it did.
    ///
    /// # Errors
    /// It had to be killed.
    pub fn stop(self) -> Result<ExitStatus> {
        self.backend.stop()
    }

    /// Everything that the back end knows.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self) -> Result<Status> {
        Ok(self.client.status()?)
    }

    /// Asks for a balloon of so many pages; waits for nothing.
    ///
    /// # Errors
    /// The target is refused.
    pub fn set_target(&self, pages: u32) -> Result<()> {
        self.client.set_balloon(u64::from(pages) * BALLOON_PAGE_BYTES, Duration::ZERO)?;
        Ok(())
    }

    /// Waits until `done`, which looks at what changes unannounced.
    ///
    /// # Errors
    /// It did not come to that in time.
    pub fn until(&self, what: &str, mut done: impl FnMut(&Status) -> bool) -> Result<Status> {
        let end = Instant::now() + LIMIT;
        loop {
            let status = self.status()?;
            if done(&status) {
                return Ok(status);
            }
            if Instant::now() >= end {
                return Err(self.not_in_time(what, status));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until the present change is over, and checks what then holds:
    /// the guest holds what it shall, nobody did anything wrong, and what is in
    /// the balloon costs the host nothing.
    ///
    /// # Errors
    /// What does not hold.
    pub fn wait_at_target(&self) -> Result<Status> {
        let balloon = self.wait_idle()?;
        let status = self.status()?;
        if status.balloon.actual_pages != balloon.target_pages {
            return Err(BenchError::NotReached {
                name: self.name.clone(),
                actual_pages: status.balloon.actual_pages,
                target_pages: balloon.target_pages,
            });
        }
        if status.faults.total() > 0 {
            return Err(BenchError::Faults { name: self.name.clone(), faults: status.faults });
        }
        // A huge page that came back for one page that the guest touched is noticed
        // after a moment only.
        self.until("released", |status| {
            let (left, resident) = (self.left_bytes(status), status.resident_bytes);
            resident.is_some_and(|resident| resident <= left + RESIDENT_SLACK_BYTES)
        })?;
        Ok(status)
    }

    fn wait_idle(&self) -> Result<BalloonStatus> {
        let end = Instant::now() + LIMIT;
        let mut balloon = self.client.balloon()?;
        while !balloon.at_target {
            if Instant::now() >= end {
                return Err(self.not_in_time("at_target", self.status()?));
            }
            balloon = self.client.wait(balloon.generation, WAIT)?;
        }
        Ok(balloon)
    }

    pub(crate) fn not_in_time(&self, what: &str, status: Status) -> BenchError {
        BenchError::NotInTime {
            name: self.name.clone(),
            what: what.to_owned(),
            status: Box::new(status),
            log: self.backend.log(),
        }
    }

    /// What the guest has apart from the balloon, and what waits for the rest
    /// of its huge page.
    fn left_bytes(&self, status: &Status) -> u64 {
        // Not the status's `memory_bytes`: the file has what the guest's kernel keeps to
        // itself, too.
        (self.options.memory_mib << 20) + status.release.waiting_bytes - status.balloon.actual_bytes
    }
}
