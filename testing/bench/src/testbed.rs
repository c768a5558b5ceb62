//! A guest with the back end of its balloon, for measurements.

use std::ops::Deref;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use control::{BalloonChange, BalloonStatus, Client, ReleaseMode};
use lab::uml::UmlKernel;
use lab::{Guest, guest_build};
use serde::{Deserialize, Serialize};

use crate::error::{BenchError, Result};
use crate::fixture;
use crate::host::Host;

/// Timeout of one balloon change: page by page, on used memory and on a busy machine, 3 GiB take
/// some seconds.
const CHANGE_LIMIT: Duration = Duration::from_secs(120);

/// Between two polls of the status.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// CPU of the guest and of the thread that serves it. On one CPU an answer costs a context switch.
/// Across CPUs it costs waking an idle CPU, which in a virtual machine is slower and varies more.
const CORE: usize = 0;

/// Free page reporting would release memory without the balloon.
const BALLOON_ALONE: [&str; 2] = ["--without", "stats,hint,reporting,poison"];

/// The driver in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// The kernel's own.
    Stock,
    /// Aerostat's.
    Own,
}

impl Driver {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Stock, Self::Own];

    /// Name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Own => "own",
        }
    }

    /// Module name.
    pub const fn module_name(self) -> &'static str {
        match self {
            Self::Stock => "virtio_balloon",
            Self::Own => "aerostat_balloon",
        }
    }

    /// Module files for the guest's initramfs.
    ///
    /// # Errors
    /// The module does not build.
    pub fn modules(self, kernel: &UmlKernel) -> Result<Vec<PathBuf>> {
        Ok(match self {
            Self::Stock => kernel.stock_modules.clone(),
            Self::Own => vec![guest_build::balloon_module(&kernel.tree())?],
        })
    }
}

/// Options of a testbed.
#[derive(Clone, Debug)]
pub struct TestbedOptions {
    /// The `aerostat` program, for the back end.
    pub program: PathBuf,
    /// The guest's kernel.
    pub kernel: UmlKernel,
    /// The guest's memory.
    pub memory_mib: u64,
    /// Directory of that memory.
    pub memory_dir: PathBuf,
}

/// A guest with its driver loaded, and the back end of its balloon.
pub struct Testbed {
    /// The guest. It ends before the back end.
    pub guest: Guest,
    /// Its host.
    pub host: Host,
}

impl Deref for Testbed {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Testbed {
    /// Starts the back end, boots a guest on it and loads `driver`.
    pub fn start(name: &str, driver: Driver, options: &TestbedOptions) -> Result<Self> {
        Self::start_with(name, driver, options, &BALLOON_ALONE)
    }

    /// As [`start`](Self::start), with other arguments for the back end.
    pub fn start_with(
        name: &str,
        driver: Driver,
        options: &TestbedOptions,
        arguments: &[&str],
    ) -> Result<Self> {
        let host = Host::start(name, options, arguments)?;
        host.backend.pin(CORE)?;
        let mut guest = host.guest(driver)?.cpu(Some(CORE)).boot()?;
        guest.run(&format!("insmod {}", driver.module_name()))?;
        Ok(Self { guest, host })
    }

    /// Sets the target to `pages` and waits until it is reached.
    pub fn inflate_to(&mut self, pages: u32) -> Result<BalloonChange> {
        let set = self
            .client
            .set_balloon(u64::from(pages) * control::BALLOON_PAGE_BYTES, Duration::ZERO)?;
        let settled = self.wait(set.generation)?;
        settled.last_change.filter(|_| settled.at_target).ok_or(BenchError::NotReached {
            name: self.name().to_owned(),
            actual_pages: settled.actual_pages,
            target_pages: settled.target_pages,
        })
    }

    /// Sets when the host releases memory.
    pub fn set_release(&self, mode: ReleaseMode) -> Result<()> {
        self.client.set_release(mode)?;
        Ok(())
    }

    /// Host memory of the guest, in MiB, measured on the host.
    pub fn resident_mib(&self) -> Result<f64> {
        let bytes = self.status()?.resident_bytes.unwrap_or(0);
        Ok(bytes as f64 / f64::from(1 << 20))
    }

    /// Runs a command in the guest whose answer is a number.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        fixture::number(&mut self.guest, command)
    }

    /// Process id of the back end.
    pub fn backend_pid(&self) -> u32 {
        self.backend.pid()
    }

    /// A second client, for another thread.
    pub fn second_client(&self) -> Result<Client> {
        self.backend.client()
    }

    /// Waits until the guest's driver accepts requests.
    pub fn wait_for_requests(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while !self.status()?.requests.possible {
            if Instant::now() > end {
                return Err(BenchError::NoRequests { name: self.name().to_owned() });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn wait(&self, generation: u64) -> Result<BalloonStatus> {
        let end = Instant::now() + CHANGE_LIMIT;
        loop {
            let status = self.client.wait(generation, Duration::from_secs(5))?;
            if status.is_over(generation) || Instant::now() > end {
                return Ok(status);
            }
        }
    }
}
