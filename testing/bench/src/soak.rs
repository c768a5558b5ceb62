//! `soak`: random operations on guests and their balloons, for any duration, with guests that
//! verify their memory.
//!
//! A pure [`plan`] is made from a seed. A [`soak_run`] executes it with a real guest and a back end
//! process, in its sandbox, whose memory is [watched](resident). [`moves`] is a separate soak that
//! migrates guests of `aerostat run` repeatedly.

pub mod moves;
pub mod plan;
mod report;
pub mod resident;
pub mod soak_run;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lab::uml::UmlKernel;
use lab::{GuestMemoryDir, guest_build};

pub use report::{GuestReport, Report};

use crate::error::{BenchError, Result};
use crate::host::Host;
use crate::inflate::HostPages;
use crate::logs::{backend_complaints, guest_complaints};
use crate::testbed::{Driver, TestbedOptions};
use plan::Plan;
use resident::{Resident, Watch};
use soak_run::SoakRun;

/// Minimum memory of a guest, in MiB: below, its kernel needs more than the plan's reserve.
pub const LEAST_MEMORY_MIB: u64 = 256;

/// Between two lines of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Options of a soak.
#[derive(Clone, Debug)]
pub struct SoakOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Duration.
    pub duration: Duration,
    /// The same seed gives the same sequence of steps.
    pub seed: u64,
    /// Drivers. One guest runs for each driver and backing, all at the same time.
    pub drivers: Vec<Driver>,
    /// Host page sizes of guest memory.
    pub backings: Vec<HostPages>,
    /// Memory of each guest.
    pub memory_mib: u64,
}

/// A random seed, short enough to type.
pub fn any_seed() -> u64 {
    u64::from(fastrand::u32(..))
}

/// Soaks until the time is over, `stop` is set, or an error. Calls `progress` every second with a
/// status line.
///
/// # Errors
/// The guests cannot be built. Later errors are in the report.
pub fn run(
    options: &SoakOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    progress(&format!("preparing the guests, seed {}", options.seed));
    let kernel = lab::uml::kernel()?;
    guest_build::init()?;
    guest_build::lab_module(&kernel.tree())?;
    for driver in &options.drivers {
        driver.modules(&kernel)?;
    }
    let soaks: Vec<Soak<'_>> = options
        .drivers
        .iter()
        .flat_map(|driver| options.backings.iter().map(|backing| (*driver, *backing)))
        .map(|(driver, backing)| Soak::new(options, &kernel, driver, backing))
        .collect();
    let began = Instant::now();
    let guests = std::thread::scope(|scope| {
        let running: Vec<_> =
            soaks.iter().map(|soak| scope.spawn(move || soak.run(stop))).collect();
        while running.iter().any(|guest| !guest.is_finished()) {
            progress(&progress_line(began.elapsed(), options, &soaks));
            // Guests end at different times, so this polls.
            std::thread::sleep(PROGRESS_INTERVAL);
        }
        running.into_iter().filter_map(|guest| guest.join().ok()).collect()
    });
    Ok(Report::new(options, soaks.len(), guests))
}

/// Plan of a guest with this driver and backing, independent of other guests in the run.
pub fn plan_for(seed: u64, driver: Driver, backing: HostPages, memory_mib: u64) -> Plan {
    // Every guest of a run has a different plan.
    let seed = seed.wrapping_add(driver as u64 * 2 + backing as u64);
    Plan::of_everything(seed, memory_mib, driver)
}

/// One line with the progress of all guests.
fn progress_line(elapsed: Duration, options: &SoakOptions, soaks: &[Soak<'_>]) -> String {
    let minutes = |time: Duration| format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60);
    let mut line = format!("{} of {}", minutes(elapsed), minutes(options.duration));
    let mut verified_bytes = 0;
    for soak in soaks {
        let so_far = soak.so_far();
        line += &format!(", {} {} {}", soak.name, so_far.steps, so_far.step);
        verified_bytes += so_far.verified_bytes;
    }
    line + &format!(", {} MiB verified, seed {}", verified_bytes >> 20, options.seed)
}

/// Progress of one guest.
#[derive(Clone, Copy, Debug, Default)]
struct SoFar {
    steps: u64,
    step: &'static str,
    verified_bytes: u64,
}

/// The soak of one guest.
struct Soak<'a> {
    options: &'a SoakOptions,
    kernel: &'a UmlKernel,
    driver: Driver,
    backing: HostPages,
    name: String,
    so_far: Mutex<SoFar>,
}

impl<'a> Soak<'a> {
    fn new(
        options: &'a SoakOptions,
        kernel: &'a UmlKernel,
        driver: Driver,
        backing: HostPages,
    ) -> Self {
        let name = format!("{}-{}", driver.as_str(), backing.as_str());
        let so_far = Mutex::new(SoFar { step: "boot", ..SoFar::default() });
        Self { options, kernel, driver, backing, name, so_far }
    }

    /// Runs all of it, and stops the other guests if it fails.
    fn run(&self, stop: &AtomicBool) -> GuestReport {
        let mut report = GuestReport::new(&self.name, self.driver, self.backing);
        if let Err(error) = self.soak(&mut report, stop) {
            report.failure = Some(error_text(&error));
        }
        if !report.problems().is_empty() {
            stop.store(true, Ordering::Relaxed);
        }
        report
    }

    fn soak(&self, report: &mut GuestReport, stop: &AtomicBool) -> Result<()> {
        let memory_mib = self.options.memory_mib;
        let memory = GuestMemoryDir::mount(self.backing.backing(), memory_mib)?;
        let testbed = TestbedOptions {
            program: self.options.program.clone(),
            kernel: self.kernel.clone(),
            memory_mib,
            memory_dir: memory.path().to_owned(),
        };
        let host = Host::start(&self.name, &testbed, &[])?;
        let guest_log = host.directory().join("guest.log");
        let watch = Watch::start(host.backend.pid());
        let outcome = self.run_plan(&host, &guest_log, report, stop);
        report.resident = Resident::of(&watch.end());
        let counted = host.status().map(|status| {
            (report.faults, report.reported_bytes) = (status.faults, status.reports.released_bytes);
        });
        let guest_log = std::fs::read_to_string(&guest_log).unwrap_or_default();
        report.guest_complaints = guest_complaints(&guest_log);
        report.backend_complaints = backend_complaints(&host.backend.log());
        if outcome.is_err() || counted.is_err() || !report.problems().is_empty() {
            report.logs = keep(&guest_log, &host.backend.log());
        }
        outcome.and(counted)?;
        let ended = host.stop()?;
        let failed = || std::io::Error::other(ended.to_string());
        match ended.success() {
            true => Ok(()),
            false => Err(BenchError::Backend { what: "ending it", source: failed() }),
        }
    }

    /// Boots a guest, runs its plan, and ends it.
    fn run_plan(
        &self,
        host: &Host,
        guest_log: &Path,
        report: &mut GuestReport,
        stop: &AtomicBool,
    ) -> Result<()> {
        let mut fixture = host.boot(self.driver, |guest| guest.log_file(guest_log))?;
        fixture.load_ready_driver()?;
        let SoakOptions { seed, memory_mib, .. } = *self.options;
        let plan = plan_for(seed, self.driver, self.backing, memory_mib);
        let mut run = SoakRun::new(&mut fixture, plan);
        let mut started = |step: &plan::Step| self.state(|so_far| so_far.step = step.name());
        let began = Instant::now();
        let mut outcome = Ok(());
        while outcome.is_ok()
            && began.elapsed() < self.options.duration
            && !stop.load(Ordering::Relaxed)
        {
            outcome = run.step(&mut started);
            let tally = run.tally();
            self.state(|so_far| {
                so_far.steps = tally.steps_begun();
                so_far.verified_bytes = tally.verified_bytes;
            });
        }
        report.walked_s = began.elapsed().as_secs_f64();
        let outcome = outcome.and_then(|()| run.end(&mut started));
        report.tally = run.tally().clone();
        outcome
    }

    fn state(&self, change: impl FnOnce(&mut SoFar)) {
        change(&mut self.so_far.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn so_far(&self) -> SoFar {
        *self.so_far.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps both logs in a directory that outlives this process; `None` on an error.
fn keep(guest_log: &str, backend_log: &str) -> Option<PathBuf> {
    let directory = tempfile::Builder::new().prefix("aerostat-soak-").tempdir().ok()?.keep();
    std::fs::write(directory.join("guest.log"), guest_log).ok()?;
    std::fs::write(directory.join("back-end.log"), backend_log).ok()?;
    Some(directory)
}

/// An error with its causes.
fn error_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
