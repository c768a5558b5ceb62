//! The host side of a guest: the back end of its balloon, and waits on its status.

use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use control::{BALLOON_PAGE_BYTES, BalloonStatus, Client, Status};
use lab::{Guest, GuestBuilder, Scratch, guest_build};

use crate::backend::Backend;
use crate::error::{BenchError, Result};
use crate::fixture::Fixture;
use crate::testbed::{Driver, TestbedOptions};

/// Timeout of everything that should be fast, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Duration of one long poll of the control API.
const WAIT: Duration = Duration::from_secs(5);

/// Between two polls of a status without an event.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Host memory allowed beyond the guest's own: if the host cannot split a huge page at once, it
/// only clears the part.
const RESIDENT_SLACK_BYTES: u64 = 8 << 20;

/// A listening back end, and options that its guests share.
pub struct Host {
    /// Client of the control API.
    pub client: Client,
    /// Process of the back end.
    pub backend: Backend,
    name: String,
    options: TestbedOptions,
    directory: Scratch,
}

impl Host {
    /// Starts the back end of the guest `name`, with more `arguments`.
    ///
    /// # Errors
    /// It does not start; the error has its log.
    pub fn start(name: &str, options: &TestbedOptions, arguments: &[&str]) -> Result<Self> {
        let directory = Scratch::new("bench")?;
        let backend = Backend::start_with(&options.program, name, directory.path(), arguments)?;
        let client = backend.client()?;
        Ok(Self { client, backend, name: name.to_owned(), options: options.clone(), directory })
    }

    /// Returns a builder of a guest that can load `driver`.
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

    /// Boots a guest that can load `driver`. Does not load it. `change` can modify the builder.
    ///
    /// # Errors
    /// The guest does not boot.
    pub fn boot(
        &self,
        driver: Driver,
        change: impl FnOnce(GuestBuilder) -> GuestBuilder,
    ) -> Result<Fixture<'_>> {
        // Print warnings too.
        let builder = self.guest(driver)?.kernel_argument("ignore_loglevel");
        Ok(Fixture { host: self, guest: change(builder).boot()?, driver })
    }

    /// Name of the guest.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Memory of its guests, in MiB.
    pub const fn memory_mib(&self) -> u64 {
        self.options.memory_mib
    }

    /// Directory of sockets and logs, which can serve as `AEROSTAT_RUNTIME_DIR`.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Stops the back end and returns its exit status.
    ///
    /// # Errors
    /// It did not end on SIGTERM.
    pub fn stop(self) -> Result<ExitStatus> {
        self.backend.stop()
    }

    /// Status of the back end.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self) -> Result<Status> {
        Ok(self.client.status()?)
    }

    /// Sets the balloon target in pages. Does not wait.
    ///
    /// # Errors
    /// The back end rejects the target.
    pub fn set_target(&self, pages: u32) -> Result<()> {
        self.client.set_balloon(u64::from(pages) * BALLOON_PAGE_BYTES, Duration::ZERO)?;
        Ok(())
    }

    /// Polls the status until `done`.
    ///
    /// # Errors
    /// `done` is not true in time.
    pub fn until(&self, what: &str, mut done: impl FnMut(&Status) -> bool) -> Result<Status> {
        let end = Instant::now() + LIMIT;
        loop {
            let status = self.status()?;
            if done(&status) {
                return Ok(status);
            }
            if Instant::now() >= end {
                return Err(self.timeout_error(what, status));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until the balloon is at its target, and checks the invariants: the balloon has its
    /// target size, there are no faults, and ballooned pages cost the host nothing.
    ///
    /// # Errors
    /// The target is not reached, or an invariant does not hold.
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
        // A huge page that came back because the guest touched one page is detected only after a
        // moment.
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
                return Err(self.timeout_error("at_target", self.status()?));
            }
            balloon = self.client.wait(balloon.generation, WAIT)?;
        }
        Ok(balloon)
    }

    pub(crate) fn timeout_error(&self, what: &str, status: Status) -> BenchError {
        BenchError::NotInTime {
            name: self.name.clone(),
            what: what.to_owned(),
            status: Box::new(status),
            log: self.backend.log(),
        }
    }

    /// Memory of the guest without the balloon, and parts of huge pages that wait for the rest of
    /// their page.
    fn left_bytes(&self, status: &Status) -> u64 {
        // Not the status's `memory_bytes`: the file also has memory that the guest's kernel
        // reserves.
        (self.options.memory_mib << 20) + status.release.waiting_bytes - status.balloon.actual_bytes
    }
}
