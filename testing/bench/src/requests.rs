//! `bench requests`: requests to a guest's kernel, and their cost to host and guest.

mod drop_caches;
mod free_pages;
mod stall;
mod storm;
mod tour;

use std::path::PathBuf;
use std::time::Duration;

use lab::{Backing, GuestMemoryDir};
use serde::{Deserialize, Serialize};

pub use drop_caches::DropCachesReport;
pub use free_pages::{FreePagesReport, State, used_pages};
pub use stall::StallReport;
pub use storm::StormReport;
pub use tour::{Tour, tour};

use crate::error::{BenchError, Result};
use crate::proc_text::kib;
use crate::testbed::{Driver, Testbed, TestbedOptions};

const MIB: u64 = 1 << 20;

/// Timeout of a request on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Size of the guest of most measurements, in MiB.
const GUEST_MIB: u64 = 4096;

/// Memory that is not fragmented, in MiB.
const UNFRAGMENTED_MIB: u64 = 64;

/// What to measure.
#[derive(Clone, Debug)]
pub struct RequestsOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Rounds; everything is done once in each.
    pub rounds: usize,
    /// Sizes of idle guests for free-page reports, in MiB.
    pub guest_mib: Vec<u64>,
    /// Requests of the storm.
    pub storm: u64,
}

/// What `bench requests --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Number of rounds.
    pub rounds: usize,
    /// Dropping the cache of a file of 2 GiB.
    pub drop_caches: DropCachesReport,
    /// Free-page reports, for each state and size.
    pub free_pages: Vec<FreePagesReport>,
    /// How long guest processes wait for memory meanwhile.
    pub stall: StallReport,
    /// Requests of random kinds.
    pub storm: StormReport,
}

/// Runs all measurements. Calls `progress` with each step.
///
/// # Errors
/// The first error. There is no partial report.
pub fn run(options: &RequestsOptions, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    Ok(Report {
        rounds: options.rounds,
        drop_caches: drop_caches::measure(options, progress)?,
        free_pages: free_pages::measure(options, progress)?,
        stall: stall::measure(options, progress)?,
        storm: storm::measure(options, progress)?,
    })
}

/// Starts a guest with our driver, ready for requests. Returns it and its memory directory.
fn start(options: &RequestsOptions, guest_mib: u64) -> Result<(Testbed, GuestMemoryDir)> {
    let directory = GuestMemoryDir::mount(Backing::Small, guest_mib)?;
    let testbed = TestbedOptions {
        program: options.program.clone(),
        kernel: lab::uml::kernel()?,
        memory_mib: guest_mib,
        memory_dir: directory.path().to_owned(),
    };
    let fixture = Testbed::start("requests", Driver::Own, &testbed)?;
    fixture.wait_for_requests(LIMIT)?;
    Ok((fixture, directory))
}

/// A value of the guest's /proc/meminfo, in bytes.
fn meminfo_bytes(fixture: &mut Testbed, name: &str) -> Result<u64> {
    let answer = fixture.guest.run("meminfo")?;
    let answer = answer.lines.join("\n");
    match kib(&answer, name) {
        Some(kib) => Ok(kib << 10),
        None => Err(BenchError::GuestAnswer { command: "meminfo".to_owned(), answer }),
    }
}

/// Difference of `found` and `wanted`, in percent of `wanted`.
#[expect(clippy::cast_precision_loss, reason = "a percentage of bytes")]
fn off_percent(found: u64, wanted: u64) -> f64 {
    found.abs_diff(wanted) as f64 * 100.0 / wanted.max(1) as f64
}
