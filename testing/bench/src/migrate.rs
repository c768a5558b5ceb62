//! `bench migrate`: migrates the same guest with `aerostat` and with QEMU, and compares.
//!
//! Each run boots a guest, sets the state of its memory, counts its used memory, migrates it to
//! another process of the same host, and verifies its memory there. In each round every case runs
//! once, one after the other, so that a disturbance of the machine affects all of them.

mod own;
mod qemu;
mod scene;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{BenchError, Result};
use crate::kvm::GuestFiles;
use crate::sample::Spread;

/// How the guest migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// `aerostat` and our driver, without free memory.
    Skip,
    /// The same, after the guest has dropped its caches.
    SkipDropCaches,
    /// `aerostat`, with free memory. Zero pages are detected.
    NoSkip,
    /// QEMU.
    Qemu,
    /// QEMU with `free-page-hint=on`.
    QemuHint,
}

impl Case {
    /// All cases in the order of a round.
    pub const ALL: [Self; 5] =
        [Self::Skip, Self::SkipDropCaches, Self::NoSkip, Self::Qemu, Self::QemuHint];
}

/// State of the guest's memory before the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestState {
    /// Booted, with a file of 32 MiB, as in all states.
    Fresh,
    /// 85 % of its memory were written and freed.
    DirtiedThenFreed,
    /// The same, and then a block device of 256 MiB was read.
    PageCache,
    /// It writes, verifies and frees up to 16 MiB all the time, also during the migration.
    WriteLoad,
}

impl GuestState {
    /// All states.
    pub const ALL: [Self; 4] =
        [Self::Fresh, Self::DirtiedThenFreed, Self::PageCache, Self::WriteLoad];

    /// Dropping caches is only measured with caches.
    const fn has(self, case: Case) -> bool {
        matches!(self, Self::PageCache) || !matches!(case, Case::SkipDropCaches)
    }
}

/// What to measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrateOptions {
    /// Rounds. Every case runs once per round.
    pub rounds: usize,
    /// Sizes of guests, in MiB.
    pub guest_mib: Vec<u64>,
    /// States of the guest.
    pub guests: Vec<GuestState>,
    /// Cases.
    pub cases: Vec<Case>,
}

/// Pages that were not sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedPages {
    /// The guest reported them free. QEMU does not count them: here, pages neither sent nor zero.
    pub free: u64,
    /// They were in the balloon.
    pub ballooned: u64,
    /// They were zero in every round.
    pub zero: u64,
}

/// Result of one case, over the rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// How it migrated.
    pub name: Case,
    /// State of its memory before.
    pub guest: GuestState,
    /// Size of the guest.
    pub guest_mib: u64,
    /// From the command until the guest runs at the destination, with dropping caches.
    pub total_ms: Spread,
    /// Downtime, by the source's clock.
    pub downtime_ms: Spread,
    /// Bytes on the network.
    pub bytes_sent: Spread,
    /// Pages that were not sent, medians.
    pub pages_skipped: SkippedPages,
    /// Memory that the guest had in use and not zero just before the migration, in bytes: the lower
    /// bound of what must be sent.
    pub floor_bytes: Spread,
    /// Memory sent again because the guest had written to it, in bytes. QEMU does not report it.
    pub written_bytes: Option<Spread>,
    /// vCPU throttling at the end, in percent: maximum.
    pub throttle_percent: u8,
}

/// What `bench migrate --json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Number of rounds.
    pub rounds: usize,
    /// The guests' kernel.
    pub kernel: String,
    /// Further kernel arguments.
    pub kernel_arguments: Vec<String>,
    /// Version of QEMU.
    pub qemu: String,
    /// One entry for each case, state and size.
    pub cases: Vec<CaseReport>,
}

/// Result of one migration.
#[derive(Clone, Debug, Default)]
struct MigrationSample {
    total_ms: f64,
    downtime_ms: f64,
    bytes_sent: u64,
    skipped: SkippedPages,
    written_bytes: Option<u64>,
    throttle_percent: u8,
    /// Details in words.
    detail: String,
}

struct Run {
    moved: MigrationSample,
    floor_bytes: u64,
}

/// One state of one guest.
#[derive(Clone, Copy)]
struct Scenario {
    state: GuestState,
    guest_mib: u64,
}

/// Memory of guests at a time, in MiB, for [`crate::kvm::measure`].
pub fn guests_mib(options: &MigrateOptions) -> u64 {
    // At the source and at the destination.
    2 * options.guest_mib.iter().copied().max().unwrap_or_default() + qemu::OWN_MEMORY_MIB
}

/// Measures what `options` selects, on a KVM.
///
/// # Errors
/// The first error, which may be a lost page. There is no partial report.
pub(crate) fn run(
    program: &Path,
    files: &GuestFiles,
    options: &MigrateOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut report = Report {
        rounds: options.rounds,
        kernel: files.release.clone(),
        kernel_arguments: files.kernel_arguments.clone(),
        qemu: qemu::version()?,
        cases: Vec::new(),
    };
    for &guest_mib in &options.guest_mib {
        for &state in &options.guests {
            let cases: Vec<_> =
                options.cases.iter().copied().filter(|case| state.has(*case)).collect();
            let mut runs: Vec<Vec<Run>> = cases.iter().map(|_| Vec::new()).collect();
            for round in 1..=options.rounds {
                // No case is always first.
                let order = (0..cases.len()).map(|index| (index + round - 1) % cases.len());
                for index in order {
                    let (Some(case), Some(runs)) = (cases.get(index), runs.get_mut(index)) else {
                        continue;
                    };
                    let scenario = Scenario { state, guest_mib };
                    let run = run_once(*case, scenario, program, files)?;
                    progress(&describe(*case, scenario, round, &run));
                    runs.push(run);
                }
            }
            for (name, runs) in cases.into_iter().zip(&runs) {
                report.cases.push(summarise(name, state, guest_mib, runs));
            }
        }
    }
    Ok(report)
}

fn run_once(case: Case, scenario: Scenario, program: &Path, files: &GuestFiles) -> Result<Run> {
    let (mut there, floor_bytes, moved) = match case {
        Case::Qemu | Case::QemuHint => {
            let mut fixture = qemu::Fixture::start(case == Case::QemuHint, scenario, files)?;
            let floor_bytes = scene::set(&mut fixture.source, scenario, files)?;
            let (there, moved) = fixture.go()?;
            (there, floor_bytes, moved)
        }
        Case::Skip | Case::SkipDropCaches | Case::NoSkip => {
            let mut fixture = own::Fixture::start(scenario, program, files)?;
            let floor_bytes = scene::set(&mut fixture.source, scenario, files)?;
            let (there, moved) = fixture.go(case)?;
            (there, floor_bytes, moved)
        }
    };
    scene::verify(&mut there, scenario)?;
    if moved.downtime_ms <= 0.0 || moved.bytes_sent == 0 {
        return Err(BenchError::Wrong { what: format!("a guest that did not migrate: {moved:?}") });
    }
    Ok(Run { moved, floor_bytes })
}

fn describe(case: Case, scenario: Scenario, round: usize, run: &Run) -> String {
    let Scenario { state, guest_mib } = scenario;
    let Run { moved, floor_bytes } = run;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    format!(
        "round {round}, {state:?} of {guest_mib} MiB, {case:?}: {:.0} ms, downtime {:.1} ms, {:.1} MiB sent of {:.1} MiB in use, {:.1} MiB again; {}",
        moved.total_ms,
        moved.downtime_ms,
        mib(moved.bytes_sent),
        mib(*floor_bytes),
        mib(moved.written_bytes.unwrap_or_default()),
        moved.detail,
    )
}

fn summarise(name: Case, guest: GuestState, guest_mib: u64, runs: &[Run]) -> CaseReport {
    let spread = |of: &dyn Fn(&Run) -> f64| Spread::of(runs.iter().map(of));
    let pages = |of: fn(&SkippedPages) -> u64| {
        let mut pages: Vec<u64> = runs.iter().map(|run| of(&run.moved.skipped)).collect();
        pages.sort_unstable();
        pages.get(pages.len() / 2).copied().unwrap_or_default()
    };
    let written = runs.iter().filter_map(|run| run.moved.written_bytes);
    let written: Vec<f64> = written.map(|bytes| bytes as f64).collect();
    CaseReport {
        name,
        guest,
        guest_mib,
        total_ms: spread(&|run| run.moved.total_ms),
        downtime_ms: spread(&|run| run.moved.downtime_ms),
        bytes_sent: spread(&|run| run.moved.bytes_sent as f64),
        pages_skipped: SkippedPages {
            free: pages(|skipped| skipped.free),
            ballooned: pages(|skipped| skipped.ballooned),
            zero: pages(|skipped| skipped.zero),
        },
        floor_bytes: spread(&|run| run.floor_bytes as f64),
        written_bytes: (written.len() == runs.len()).then(|| Spread::of(written)),
        throttle_percent: runs.iter().map(|run| run.moved.throttle_percent).max().unwrap_or(0),
    }
}
