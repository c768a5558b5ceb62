//! `bench reporting`: memory that a guest frees and that returns to the host without a target.
//!
//! The stock driver reports free blocks, and the back end releases them. Its cost is measured
//! separately from that of any release: by reports of memory that is not allocated on the host, and
//! by one call over as much used memory.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use lab::GuestMemoryDir;
use serde::{Deserialize, Serialize};

use crate::cpu_time::CpuClock;
use crate::error::{BenchError, Result};
use crate::floor;
use crate::inflate::HostPages;
use crate::sample::Spread;
use crate::testbed::{Driver, Testbed, TestbedOptions};

/// Features besides reporting, which are off.
const REPORTS_ALONE: [&str; 2] = ["--without", "stats,hint,poison"];

/// Measured time, in which the freed memory must return.
const WINDOW: Duration = Duration::from_secs(10);

/// Percentage that must return.
const ENOUGH_PERCENT: u64 = 98;

/// Between two polls of the file system with the guest's memory. Polling the back end instead would
/// cost it time.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Linux reports a part of free memory every 2 s: after this time without a report, reporting is
/// complete. More polls would cost the back end time.
const REPORTS_PAUSE: Duration = Duration::from_secs(5);

/// Size of the memory directory, in guests: the guest and the floor.
const GUESTS: u64 = 2;

const MIB: u64 = 1 << 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct ReportingOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Rounds.
    pub rounds: usize,
    /// Size of the guest, in MiB.
    pub guest_mib: u64,
    /// Memory that it uses and frees, in MiB.
    pub freed_mib: u64,
    /// Kinds of host pages.
    pub backing: Vec<HostPages>,
}

/// Reports on one kind of host pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// The host's pages.
    pub backing: HostPages,
    /// Size of the guest.
    pub guest_mib: u64,
    /// Memory that was freed.
    pub freed_mib: u64,
    /// Percentage returned to the host after 10 s: minimum of the rounds.
    pub back_percent: f64,
    /// Time until 98 % were returned; 10 s if they were not.
    pub back_ms: Spread,
    /// CPU time of the back end in the 10 s, user and system.
    pub cpu_ms: Spread,
    /// The same in percent of a CPU: median.
    pub cpu_percent: f64,
    /// CPU time of one call that releases as much used memory.
    pub floor_ms: Spread,
    /// The same in percent of a CPU over 10 s: median.
    pub floor_percent: f64,
    /// CPU time of the back end for memory that was never touched, per GiB: its own work, since
    /// the release costs next to nothing.
    pub own_cpu_ms_per_gib: f64,
    /// The same for the freed memory, in percent of a CPU over 10 s.
    pub own_percent: f64,
}

/// What `bench reporting --json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Number of rounds.
    pub rounds: usize,
    /// One entry for each kind of host pages.
    pub cases: Vec<CaseReport>,
}

/// Measures what `options` selects. Calls `progress` with each step.
///
/// # Errors
/// The first error. There is no partial report.
pub fn run(options: &ReportingOptions, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut report = Report { rounds: options.rounds, cases: Vec::new() };
    for backing in &options.backing {
        report.cases.push(measure(*backing, options, progress)?);
    }
    Ok(report)
}

/// Figures of one round.
struct Round {
    back_percent: f64,
    back_ms: f64,
    cpu_ms: f64,
    floor_ms: f64,
}

fn measure(
    backing: HostPages,
    options: &ReportingOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<CaseReport> {
    let directory = GuestMemoryDir::mount(backing.backing(), options.guest_mib * GUESTS)?;
    let testbed = TestbedOptions {
        program: options.program.clone(),
        kernel: lab::uml::kernel()?,
        memory_mib: options.guest_mib,
        memory_dir: directory.path().to_owned(),
    };
    progress(&format!("booting a guest of {} MiB", options.guest_mib));
    let mut fixture = Testbed::start_with("reporting", Driver::Stock, &testbed, &REPORTS_ALONE)?;
    let own_cpu_ms_per_gib = untouched(&fixture)?;
    progress(&format!("memory never touched costs {own_cpu_ms_per_gib:.1} ms of CPU per GiB"));
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let round = one_round(number, options, &directory, &mut fixture)?;
        progress(&format!(
            "round {number}, {backing:?} pages: {:.1} % back, {:.1} s, CPU {:.0} ms, one call {:.0} ms",
            round.back_percent,
            round.back_ms / 1e3,
            round.cpu_ms,
            round.floor_ms
        ));
        rounds.push(round);
    }
    let spread = |of: fn(&Round) -> f64| Spread::of(rounds.iter().map(of));
    let percent = |ms: f64| ms / WINDOW.as_secs_f64() / 10.0;
    let (cpu_ms, floor_ms) = (spread(|round| round.cpu_ms), spread(|round| round.floor_ms));
    Ok(CaseReport {
        backing,
        guest_mib: options.guest_mib,
        freed_mib: options.freed_mib,
        back_percent: spread(|round| round.back_percent).min,
        back_ms: spread(|round| round.back_ms),
        cpu_ms,
        cpu_percent: percent(cpu_ms.median),
        floor_ms,
        floor_percent: percent(floor_ms.median),
        own_cpu_ms_per_gib,
        own_percent: percent(own_cpu_ms_per_gib * options.freed_mib as f64 / 1024.0),
    })
}

/// CPU time of the reports of all free memory after the driver loads, per GiB.
fn untouched(fixture: &Testbed) -> Result<f64> {
    let clock = CpuClock::read(&[fixture.backend_pid()])?;
    let before = fixture.status()?.reports;
    let mut last = before;
    let used = loop {
        std::thread::sleep(REPORTS_PAUSE);
        let used = CpuClock::read(&[fixture.backend_pid()])?.since(&clock).other_ms;
        let now = fixture.status()?.reports;
        if now.reported_bytes == last.reported_bytes && now.messages > 0 {
            break used;
        }
        last = now;
    };
    let bytes = last.reported_bytes - before.reported_bytes;
    if bytes == 0 {
        return Err(BenchError::Wrong { what: "the guest reported nothing".to_owned() });
    }
    Ok(used * (1u64 << 30) as f64 / bytes as f64)
}

fn one_round(
    number: usize,
    options: &ReportingOptions,
    directory: &GuestMemoryDir,
    fixture: &mut Testbed,
) -> Result<Round> {
    let freed = options.freed_mib;
    fixture.guest.run(&format!("fill freed {freed} {number}"))?;
    if fixture.number(&format!("verify freed {freed} {number}"))? != 0 {
        return Err(BenchError::Wrong {
            what: "free page reporting corrupted the guest's memory".to_owned(),
        });
    }
    let before = directory.used_bytes()?;
    let clock = CpuClock::read(&[fixture.backend_pid()])?;
    let began = Instant::now();
    fixture.guest.run("drop freed")?;
    let mut back_ms = WINDOW.as_secs_f64() * 1e3;
    let back = |now: u64| before.saturating_sub(now);
    let enough = freed * MIB * ENOUGH_PERCENT / 100;
    let mut reached = false;
    while began.elapsed() < WINDOW {
        if !reached && back(directory.used_bytes()?) >= enough {
            (reached, back_ms) = (true, began.elapsed().as_secs_f64() * 1e3);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    let cpu_ms = CpuClock::read(&[fixture.backend_pid()])?.since(&clock).other_ms;
    let back_percent = back(directory.used_bytes()?) as f64 * 100.0 / (freed * MIB) as f64;
    let floor = floor::release_once(directory.path(), freed, freed)?;
    Ok(Round { back_percent, back_ms, cpu_ms, floor_ms: floor.cpu_ms })
}
