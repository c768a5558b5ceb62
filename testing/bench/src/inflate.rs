//! `bench inflate`: inflates balloons in three ways and compares.
//!
//! Two guests run side by side, one with the stock driver and one with ours: on a User Mode Linux
//! device a driver cannot negotiate more features than the driver before it. In each round every
//! case runs once, one after the other, so that a disturbance of the machine affects all of them.

use std::path::PathBuf;

use control::{BalloonChange, ReleaseMode};
use lab::{Backing, GuestMemoryDir};
use serde::{Deserialize, Serialize};

use crate::error::{Result, host};
use crate::floor;
use crate::proc_text::kib;
use crate::sample::Spread;
use crate::testbed::{Driver, Testbed, TestbedOptions};

/// Balloon pages in a MiB.
const PAGES_PER_MIB: u64 = 256;

/// Free memory that a fragmented guest keeps, in percent: its own needs and the kernel's reserves.
const KEPT_PERCENT: u64 = 3;

/// Memory that is not fragmented, in MiB.
const UNFRAGMENTED_MIB: u64 = 64;

/// Size of the memory directory, in guests: two guests and the floor.
const GUESTS: u64 = 3;

/// Driver and release mode of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Case {
    /// Stock driver; the host translates and releases page by page.
    Classic,
    /// Stock driver on our device.
    Stock,
    /// Our driver on our device.
    Bitmap,
}

impl Case {
    /// All cases in the order of a round.
    pub const ALL: [Self; 3] = [Self::Classic, Self::Stock, Self::Bitmap];

    const fn driver(self) -> Driver {
        match self {
            Self::Classic | Self::Stock => Driver::Stock,
            Self::Bitmap => Driver::Own,
        }
    }

    const fn release(self) -> ReleaseMode {
        match self {
            Self::Classic => ReleaseMode::PerPage,
            Self::Stock | Self::Bitmap => ReleaseMode::Background,
        }
    }
}

/// State of the guest's memory before it is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryState {
    /// Never touched.
    Idle,
    /// Five sixths were written and freed.
    Touched,
    /// All was written; one page is pinned in the middle of every second 2 MiB.
    Fragmented,
}

impl MemoryState {
    /// All states.
    pub const ALL: [Self; 3] = [Self::Idle, Self::Touched, Self::Fragmented];
}

/// Page size of guest memory on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HostPages {
    /// tmpfs with 4 KiB pages.
    #[serde(rename = "4k")]
    Small,
    /// tmpfs mounted with `huge=always`.
    #[serde(rename = "huge")]
    Huge,
}

impl HostPages {
    /// Both kinds.
    pub const ALL: [Self; 2] = [Self::Small, Self::Huge];

    /// Name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Small => "4k",
            Self::Huge => "huge",
        }
    }

    pub(crate) const fn backing(self) -> Backing {
        match self {
            Self::Small => Backing::Small,
            Self::Huge => Backing::Huge,
        }
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct InflateOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Rounds. Every case runs once per round.
    pub rounds: usize,
    /// Sizes of guests, in MiB.
    pub guest_mib: Vec<u64>,
    /// States of the guest's memory.
    pub memory: Vec<MemoryState>,
    /// Kinds of host pages.
    pub backing: Vec<HostPages>,
}

/// The four stages of a balloon change, medians in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StagesMs {
    /// Guest: from the config read to the next message.
    pub allocate: f64,
    /// Messages in the queue.
    pub send: f64,
    /// Host: messages to host ranges.
    pub translate: f64,
    /// Host: releasing memory.
    pub release: f64,
}

/// Result of one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// Driver and release mode.
    pub name: Case,
    /// State of the guest's memory.
    pub memory: MemoryState,
    /// The host's pages.
    pub backing: HostPages,
    /// Size of the guest.
    pub guest_mib: u64,
    /// Size of the inflate.
    pub asked_mib: u64,
    /// From the request until the guest has inflated and the host has released all.
    pub wall_ms: Spread,
    /// Stages of that time.
    pub stages_ms: StagesMs,
    /// Time of the deflate.
    pub deflate_ms: Spread,
    /// Messages of the inflate.
    pub messages: u64,
    /// System calls that released memory.
    pub release_calls: u64,
    /// Decrease of host memory, measured on the host.
    pub returned_mib: f64,
    /// Free memory of the guest before, according to the guest.
    pub guest_free_mib: u64,
    /// Host memory in tmpfs huge pages before: without free huge pages the kernel silently uses
    /// small ones.
    pub host_huge_mib: u64,
}

/// Lower bound of the release, for one state of memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FloorReport {
    /// State of the guest's memory.
    pub memory: MemoryState,
    /// The host's pages.
    pub backing: HostPages,
    /// Size of the guest.
    pub guest_mib: u64,
    /// One call over as much memory as `bitmap` inflated, as much of it in use: median.
    pub floor_ms: f64,
    /// Its spread.
    pub floor_spread_ms: Spread,
    /// Median of classic over median of bitmap.
    pub speedup: f64,
    /// Median of classic over median of stock.
    pub stock_speedup: f64,
}

/// What `bench inflate --json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Number of rounds.
    pub rounds: usize,
    /// One entry for each case, state, backing and size.
    pub cases: Vec<CaseReport>,
    /// One entry for each state, backing and size.
    pub floors: Vec<FloorReport>,
}

/// One run of one case.
struct Run {
    inflate: BalloonChange,
    deflate: BalloonChange,
    returned_mib: f64,
    guest_free_mib: u64,
    host_huge_mib: u64,
    asked_mib: u64,
}

/// One state of memory on one backing.
#[derive(Clone, Copy)]
struct Scenario {
    memory: MemoryState,
    backing: HostPages,
    guest_mib: u64,
}

/// Measures what `options` selects. Calls `progress` with each step.
///
/// # Errors
/// The first error. There is no partial report.
pub fn run(options: &InflateOptions, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut report = Report { rounds: options.rounds, ..Report::default() };
    for &guest_mib in &options.guest_mib {
        for &backing in &options.backing {
            for &memory in &options.memory {
                let scenario = Scenario { memory, backing, guest_mib };
                measure(scenario, options, &mut report, progress)?;
            }
        }
    }
    Ok(report)
}

fn measure(
    scenario: Scenario,
    options: &InflateOptions,
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let directory = GuestMemoryDir::mount(scenario.backing.backing(), scenario.guest_mib * GUESTS)?;
    let testbed = TestbedOptions {
        program: options.program.clone(),
        kernel: lab::uml::kernel()?,
        memory_mib: scenario.guest_mib,
        memory_dir: directory.path().to_owned(),
    };
    progress(&format!("booting two guests of {} MiB", scenario.guest_mib));
    let mut stock = Testbed::start("stock", Driver::Stock, &testbed)?;
    let mut own = Testbed::start("own", Driver::Own, &testbed)?;
    if scenario.memory == MemoryState::Fragmented {
        for guest in [&mut stock, &mut own] {
            guest.guest.run("insmod lab_memory")?;
            guest.guest.fragment(UNFRAGMENTED_MIB)?;
        }
    }
    // Read once: later, after a stock deflate, Linux keeps up to an eighth of the zone in per-CPU
    // lists, which MemFree does not count.
    let free_mib = [stock.number("free-mib")?, own.number("free-mib")?];
    let mut runs: [Vec<Run>; 3] = Default::default();
    let mut floors = Vec::new();
    for round in 1..=options.rounds {
        for (case, runs) in Case::ALL.into_iter().zip(&mut runs) {
            let (fixture, free_mib) = match case.driver() {
                Driver::Stock => (&mut stock, free_mib[0]),
                Driver::Own => (&mut own, free_mib[1]),
            };
            prepare(scenario, free_mib, fixture)?;
            let run = run_case(case, scenario, fixture)?;
            progress(&describe(case, scenario, round, &run));
            runs.push(run);
        }
        let [.., bitmap] = &runs;
        if let Some(run) = bitmap.last() {
            let took = floor::release_once(directory.path(), run.asked_mib, touched_of(run))?;
            floors.push(took.wall_ms);
        }
    }
    summarise(scenario, &runs, floors, report);
    Ok(())
}

/// Inflates and deflates prepared memory.
fn run_case(case: Case, scenario: Scenario, fixture: &mut Testbed) -> Result<Run> {
    fixture.set_release(case.release())?;
    let guest_free_mib = fixture.number("free-mib")?;
    let asked_mib = match scenario.memory {
        MemoryState::Idle | MemoryState::Touched => scenario.guest_mib * 3 / 4,
        MemoryState::Fragmented => guest_free_mib * (100 - KEPT_PERCENT) / 100,
    };
    let pages = u32::try_from(asked_mib * PAGES_PER_MIB).unwrap_or(u32::MAX);
    let host_huge_mib = host_huge_mib()?;
    let before_mib = fixture.resident_mib()?;
    let inflate = fixture.inflate_to(pages)?;
    let returned_mib = before_mib - fixture.resident_mib()?;
    let deflate = fixture.inflate_to(0)?;
    Ok(Run { inflate, deflate, returned_mib, guest_free_mib, host_huge_mib, asked_mib })
}

/// Restores the state of the guest's memory after a run.
fn prepare(scenario: Scenario, free_mib: u64, fixture: &mut Testbed) -> Result<()> {
    let touch_mib = match scenario.memory {
        MemoryState::Idle => return Ok(()),
        MemoryState::Touched => scenario.guest_mib * 85 / 100,
        // Pinned pages remain. All other pages are touched again.
        MemoryState::Fragmented => free_mib * (100 - KEPT_PERCENT + 1) / 100,
    };
    if scenario.backing == HostPages::Huge {
        // The last case or other processes may have split huge pages.
        lab::memory_dir::gather_huge_pages()?;
    }
    fixture.guest.run(&format!("touch {touch_mib}"))?;
    Ok(())
}

/// Used memory that a run really released, in MiB, and that the floor must release too.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
fn touched_of(run: &Run) -> u64 {
    run.returned_mib.clamp(0.0, run.asked_mib as f64) as u64
}

/// `ShmemHugePages` of this host.
fn host_huge_mib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo");
    let text = text.map_err(host("reading /proc/meminfo"))?;
    Ok(kib(&text, "ShmemHugePages").unwrap_or(0) >> 10)
}

fn describe(case: Case, scenario: Scenario, round: usize, run: &Run) -> String {
    format!(
        "round {round}, {:?} memory on {:?} pages, {case:?}: {} of {} MiB in {:.1} ms, back in {:.1} ms",
        scenario.memory,
        scenario.backing,
        run.asked_mib,
        scenario.guest_mib,
        run.inflate.wall_ms,
        run.deflate.wall_ms,
    )
}

fn summarise(scenario: Scenario, runs: &[Vec<Run>; 3], floors: Vec<f64>, report: &mut Report) {
    let Scenario { memory, backing, guest_mib } = scenario;
    let middle = |runs: &[Run], of: fn(&Run) -> f64| Spread::of(runs.iter().map(of)).median;
    for (name, runs) in Case::ALL.into_iter().zip(runs) {
        report.cases.push(CaseReport {
            name,
            memory,
            backing,
            guest_mib,
            asked_mib: runs.last().map_or(0, |run| run.asked_mib),
            wall_ms: Spread::of(runs.iter().map(|run| run.inflate.wall_ms)),
            stages_ms: StagesMs {
                allocate: middle(runs, |run| run.inflate.stages_ms.allocate),
                send: middle(runs, |run| run.inflate.stages_ms.send),
                translate: middle(runs, |run| run.inflate.stages_ms.translate),
                release: middle(runs, |run| run.inflate.stages_ms.release),
            },
            deflate_ms: Spread::of(runs.iter().map(|run| run.deflate.wall_ms)),
            messages: runs.iter().map(|run| run.inflate.messages).max().unwrap_or(0),
            release_calls: runs.iter().map(|run| run.inflate.release_calls).max().unwrap_or(0),
            returned_mib: middle(runs, |run| run.returned_mib),
            guest_free_mib: runs.last().map_or(0, |run| run.guest_free_mib),
            host_huge_mib: runs.last().map_or(0, |run| run.host_huge_mib),
        });
    }
    let [classic, stock, bitmap] =
        runs.each_ref().map(|runs| middle(runs, |run| run.inflate.wall_ms));
    let floor_spread_ms = Spread::of(floors);
    report.floors.push(FloorReport {
        memory,
        backing,
        guest_mib,
        floor_ms: floor_spread_ms.median,
        floor_spread_ms,
        speedup: classic / bitmap,
        stock_speedup: classic / stock,
    });
}
