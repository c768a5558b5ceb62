//! `bench inflate --monitor kvm`: inflates balloons of guests of `aerostat run`, with both drivers.
//!
//! In each round a guest boots for each driver, one after the other. Its balloon inflates right
//! after the boot, deflates, and inflates again after the guest has touched its memory.

use std::path::Path;
use std::time::{Duration, Instant};

use control::{BALLOON_PAGE_BYTES, BalloonChange, Client};
use lab::Guest;
use serde::{Deserialize, Serialize};

use crate::error::{BenchError, Result};
use crate::inflate::{MemoryState, StagesMs};
use crate::kvm::{self, GuestFiles, Task, command, number};
use crate::sample::Spread;
use crate::testbed::Driver;

/// Memory that a touched guest has written and freed, and its limit of free memory, in percent.
const TOUCHED_PERCENT: u64 = 85;
const FREE_PERCENT: u64 = 95;

/// Timeout of one balloon change.
const CHANGE_LIMIT: Duration = Duration::from_secs(300);

/// Timeout of a round with its boots and touches, per GiB of a guest.
const ROUND_LIMIT: Duration = Duration::from_secs(300);

/// Default kernel argument of the guests: Debian's default clears all allocated memory, which is
/// useless for a balloon and hides all other costs.
pub const KERNEL_ARGUMENT: &str = "init_on_alloc=0";

/// Free page reporting would release memory without the balloon.
const BALLOON_ALONE: [&str; 2] = ["--without", "stats,hint,reporting,poison"];

const MIB: u64 = 1 << 20;

/// Driver, on our device in `aerostat run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Case {
    /// The kernel's.
    Stock,
    /// Ours.
    Bitmap,
}

impl Case {
    /// Both, in the order of a round.
    pub const ALL: [Self; 2] = [Self::Stock, Self::Bitmap];

    const fn driver(self) -> Driver {
        match self {
            Self::Stock => Driver::Stock,
            Self::Bitmap => Driver::Own,
        }
    }
}

/// What to measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KvmInflateOptions {
    /// Rounds. Every case runs once per round.
    pub rounds: usize,
    /// Sizes of guests, in MiB.
    pub guest_mib: Vec<u64>,
    /// States of the guest's memory: idle and touched.
    pub memory: Vec<MemoryState>,
}

/// Result of one case, over the rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// The driver.
    pub name: Case,
    /// State of the guest's memory.
    pub memory: MemoryState,
    /// Size of the guest.
    pub guest_mib: u64,
    /// Size of the inflate.
    pub asked_mib: u64,
    /// From the request until the guest has inflated and the host has released all.
    pub wall_ms: Spread,
    /// Stages of that time.
    pub stages_ms: StagesMs,
    /// vCPU exits because of the balloon, during the inflate.
    pub exits: Spread,
    /// Queue notifications among them.
    pub kicks: Spread,
    /// Time of the deflate.
    pub deflate_ms: Spread,
    /// Exits during the deflate.
    pub deflate_exits: Spread,
    /// Messages of the inflate: maximum.
    pub messages: u64,
    /// System calls that released memory: maximum.
    pub release_calls: u64,
    /// Decrease of host memory, measured on the host.
    pub returned_mib: f64,
}

/// What `bench inflate --monitor kvm --json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Number of rounds.
    pub rounds: usize,
    /// The guests' kernel.
    pub kernel: String,
    /// Further kernel arguments.
    pub kernel_arguments: Vec<String>,
    /// One entry for each case, state and size.
    pub cases: Vec<CaseReport>,
}

/// One run of one case.
struct Run {
    inflate: BalloonChange,
    deflate: BalloonChange,
    exits: u64,
    kicks: u64,
    deflate_exits: u64,
    returned_mib: f64,
}

/// Measures what `options` selects on this machine's KVM, or inside a machine with KVM. Calls
/// `progress` with each step.
///
/// # Errors
/// As those of [`kvm::measure`].
pub fn measure(
    options: KvmInflateOptions,
    kernel_arguments: &[String],
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let gib: u64 = options.guest_mib.iter().map(|mib| mib.div_ceil(1 << 10)).sum();
    let rounds = gib.saturating_mul(options.rounds as u64);
    let limit = ROUND_LIMIT.saturating_mul(u32::try_from(rounds).unwrap_or(u32::MAX));
    // One guest at a time.
    let guests_mib = options.guest_mib.iter().copied().max().unwrap_or_default();
    kvm::measure(Task::Inflate(options), kernel_arguments, guests_mib, limit, progress)
}

/// Measures what `options` selects, on a KVM.
///
/// # Errors
/// The first error. There is no partial report.
pub(crate) fn run(
    program: &Path,
    files: &GuestFiles,
    options: &KvmInflateOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut report = Report {
        rounds: options.rounds,
        kernel: files.release.clone(),
        kernel_arguments: files.kernel_arguments.clone(),
        cases: Vec::new(),
    };
    for &guest_mib in &options.guest_mib {
        let mut runs: Vec<(MemoryState, Case, Vec<Run>)> = Vec::new();
        for &memory in &options.memory {
            runs.extend(Case::ALL.map(|case| (memory, case, Vec::new())));
        }
        for round in 1..=options.rounds {
            for case in Case::ALL {
                let mut fixture = Fixture::start(case, guest_mib, program, files)?;
                // Idle first: touched memory is never idle again.
                for memory in [MemoryState::Idle, MemoryState::Touched] {
                    let wanted = runs.iter_mut().find(|run| (run.0, run.1) == (memory, case));
                    let Some((.., runs)) = wanted else { continue };
                    let run = fixture.run(memory, guest_mib)?;
                    progress(&describe(case, memory, round, &run));
                    runs.push(run);
                }
            }
        }
        let summaries =
            runs.iter().map(|(memory, case, runs)| summarise(*case, *memory, guest_mib, runs));
        report.cases.extend(summaries);
    }
    Ok(report)
}

/// A guest with its driver.
struct Fixture {
    guest: Guest,
    client: Client,
    _directory: lab::Scratch,
}

impl Fixture {
    fn start(case: Case, guest_mib: u64, program: &Path, files: &GuestFiles) -> Result<Self> {
        let directory = lab::Scratch::new("bench")?;
        let control = directory.path().join("control");
        let mut guest = files
            .vmm(program, "bench-inflate", guest_mib)
            .machine_arguments(["--control", &control.to_string_lossy()])
            .machine_arguments(BALLOON_ALONE)
            .boot()?;
        files.load_balloon_driver(&mut guest, case.driver())?;
        let client = Client::connect(&control)?;
        Ok(Self { guest, client, _directory: directory })
    }

    fn run(&mut self, memory: MemoryState, guest_mib: u64) -> Result<Run> {
        if memory == MemoryState::Touched {
            let free_mib = number(&mut self.guest, "free-mib")?;
            let most_mib = guest_mib * TOUCHED_PERCENT / 100;
            let touched_mib = most_mib.min(free_mib * FREE_PERCENT / 100);
            command(&mut self.guest, &format!("touch {touched_mib}"))?;
        }
        let before = self.client.status()?;
        let inflate = self.inflate_to(asked_mib(guest_mib))?;
        let inflated = self.client.status()?;
        let deflate = self.inflate_to(0)?;
        let deflated = self.client.status()?;
        if deflated.faults.total() > 0 {
            let name = "bench-inflate".to_owned();
            return Err(BenchError::Faults { name, faults: deflated.faults });
        }
        let resident = |bytes: Option<u64>| bytes.unwrap_or_default() as f64 / MIB as f64;
        let exits = [&before, &inflated, &deflated].map(|status| status.exits.unwrap_or_default());
        let kicks = [&before, &inflated].map(|status| status.kicks.unwrap_or_default());
        Ok(Run {
            inflate,
            deflate,
            exits: exits[1] - exits[0],
            kicks: kicks[1] - kicks[0],
            deflate_exits: exits[2] - exits[1],
            returned_mib: resident(before.resident_bytes) - resident(inflated.resident_bytes),
        })
    }

    fn inflate_to(&self, mib: u64) -> Result<BalloonChange> {
        let end = Instant::now() + CHANGE_LIMIT;
        let target_bytes = mib * MIB;
        let mut balloon = self.client.set_balloon(target_bytes, CHANGE_LIMIT)?;
        while !balloon.at_target && Instant::now() < end {
            balloon = self.client.wait(balloon.generation, CHANGE_LIMIT)?;
        }
        let reached = u64::from(balloon.actual_pages) * BALLOON_PAGE_BYTES == target_bytes;
        balloon.last_change.filter(|_| balloon.at_target && reached).ok_or(BenchError::NotReached {
            name: "bench-inflate".to_owned(),
            actual_pages: balloon.actual_pages,
            target_pages: balloon.target_pages,
        })
    }
}

const fn asked_mib(guest_mib: u64) -> u64 {
    guest_mib * 3 / 4
}

fn describe(case: Case, memory: MemoryState, round: usize, run: &Run) -> String {
    format!(
        "round {round}, {memory:?} memory, {case:?}: {:.1} ms, {} exits, {} of them kicks, {:.0} MiB returned, back in {:.1} ms",
        run.inflate.wall_ms, run.exits, run.kicks, run.returned_mib, run.deflate.wall_ms
    )
}

fn summarise(name: Case, memory: MemoryState, guest_mib: u64, runs: &[Run]) -> CaseReport {
    let spread = |of: fn(&Run) -> f64| Spread::of(runs.iter().map(of));
    let middle = |of: fn(&Run) -> f64| spread(of).median;
    let most = |of: fn(&Run) -> u64| runs.iter().map(of).max().unwrap_or_default();
    CaseReport {
        name,
        memory,
        guest_mib,
        asked_mib: asked_mib(guest_mib),
        wall_ms: spread(|run| run.inflate.wall_ms),
        stages_ms: StagesMs {
            allocate: middle(|run| run.inflate.stages_ms.allocate),
            send: middle(|run| run.inflate.stages_ms.send),
            translate: middle(|run| run.inflate.stages_ms.translate),
            release: middle(|run| run.inflate.stages_ms.release),
        },
        exits: spread(|run| run.exits as f64),
        kicks: spread(|run| run.kicks as f64),
        deflate_ms: spread(|run| run.deflate.wall_ms),
        deflate_exits: spread(|run| run.deflate_exits as f64),
        messages: most(|run| run.inflate.messages),
        release_calls: most(|run| run.inflate.release_calls),
        returned_mib: middle(|run| run.returned_mib),
    }
}
