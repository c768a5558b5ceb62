//! `bench monitors`: the same guest on QEMU's own balloon device and on ours.
//!
//! Two guests run side by side in the same emulator with the same kernel, the stock driver and the
//! same kind of memory. Only the device differs. They alternate in each round.

use std::path::PathBuf;

use lab::debian::Release;
use serde::{Deserialize, Serialize};

use crate::cpu_time::{CpuClock, CpuTime};
use crate::error::{BenchError, Result};
use crate::inflate::MemoryState;
use crate::qemu_fixture::{Device, QemuFixture, QemuFixtureOptions};
use crate::sample::Spread;
use crate::testbed::Driver;

/// Memory that a touched guest has written and freed, in percent.
const TOUCHED_PERCENT: u64 = 85;

/// Maximum of its free memory that it touches, in percent: page tables need some.
const FREE_PERCENT: u64 = 95;

/// Timeout to touch it: in emulation, in small pages, allocated by the host.
const TOUCH_LIMIT: std::time::Duration = std::time::Duration::from_secs(300);

/// The device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Case {
    /// QEMU's own.
    Qemu,
    /// Ours, under QEMU's generic vhost-user device.
    Aerostat,
}

impl Case {
    /// Both, in the order of a round.
    pub const ALL: [Self; 2] = [Self::Qemu, Self::Aerostat];

    const fn device(self) -> Device {
        match self {
            Self::Qemu => Device::Qemu,
            Self::Aerostat => Device::VhostUser,
        }
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct MonitorsOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Rounds. Every case runs once per round.
    pub rounds: usize,
    /// Size of the guests, in MiB.
    pub guest_mib: u64,
    /// States of the guest's memory.
    pub memory: Vec<MemoryState>,
    /// Kernel arguments.
    pub kernel_arguments: Vec<String>,
}

/// Result of one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// The device.
    pub name: Case,
    /// State of the guest's memory.
    pub memory: MemoryState,
    /// Size of the inflate.
    pub asked_mib: u64,
    /// From the request until the guest has inflated and the host has released all.
    pub wall_ms: Spread,
    /// CPU time of VMM and back end, user and system, all threads. It includes the emulated
    /// guest's own work, which is the same in both cases.
    pub cpu_ms: Spread,
    /// That of the vCPU thread. QEMU's own device does its work there, in the guest's write to the
    /// queue's register.
    pub vcpu_ms: Spread,
    /// That of all other threads of VMM and back end.
    pub beside_ms: Spread,
    /// Median of `cpu_ms` without the guest's own work: without the median of `vcpu_ms` of the
    /// vhost-user case, where no device works in that thread.
    pub device_cpu_ms: f64,
    /// Time of the deflate.
    pub deflate_ms: Spread,
    /// Decrease of QEMU's memory, measured on the host: median.
    pub returned_mib: f64,
    /// Median of QEMU's wall time over the median of this case's.
    pub speedup: f64,
    /// `speedup` of a hypothetical device that takes no time: over the guest's own work only (see
    /// `device_cpu_ms`), which no device can shorten.
    pub speedup_limit: f64,
}

/// What `bench monitors --json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Number of rounds.
    pub rounds: usize,
    /// Size of the guests.
    pub guest_mib: u64,
    /// The guests' kernel.
    pub kernel: String,
    /// Further kernel arguments.
    pub kernel_arguments: Vec<String>,
    /// One entry for each case and state.
    pub cases: Vec<CaseReport>,
}

/// One run of one case.
struct Run {
    wall_ms: f64,
    cpu: CpuTime,
    deflate_ms: f64,
    returned_mib: f64,
}

/// Measures what `options` selects. Calls `progress` with each step.
///
/// # Errors
/// The first error. There is no partial report.
pub fn run(options: &MonitorsOptions, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let qemu = lab::qemu::vhost_user()?;
    let qemu = qemu.map_err(|why| BenchError::NotHere { what: "QEMU with vhost-user", why })?;
    let fixture = QemuFixtureOptions {
        program: options.program.clone(),
        qemu,
        kernel: lab::debian::kernel(Release::Cloud6_12)?,
        memory_mib: options.guest_mib,
        kernel_arguments: options.kernel_arguments.clone(),
        disk: None,
    };
    let mut report = Report {
        rounds: options.rounds,
        guest_mib: options.guest_mib,
        kernel: fixture.kernel.release.clone(),
        kernel_arguments: options.kernel_arguments.clone(),
        cases: Vec::new(),
    };
    for memory in &options.memory {
        progress(&format!("booting two emulated guests of {} MiB", options.guest_mib));
        let mut fixtures = Vec::new();
        for case in Case::ALL {
            fixtures.push(QemuFixture::start("monitors", case.device(), Driver::Stock, &fixture)?);
        }
        let mut runs: [Vec<Run>; 2] = Default::default();
        for round in 1..=options.rounds {
            for ((case, fixture), runs) in Case::ALL.into_iter().zip(&mut fixtures).zip(&mut runs) {
                let run = run_once(*memory, options.guest_mib, fixture)?;
                progress(&describe(case, *memory, round, &run));
                runs.push(run);
            }
        }
        summarise(*memory, options.guest_mib, &runs, &mut report);
    }
    Ok(report)
}

fn run_once(memory: MemoryState, guest_mib: u64, fixture: &mut QemuFixture) -> Result<Run> {
    if memory != MemoryState::Idle {
        // The kernel of a small guest needs a larger part.
        let free_mib = fixture.number("free-mib")?;
        let mib = (guest_mib * TOUCHED_PERCENT / 100).min(free_mib * FREE_PERCENT / 100);
        fixture.guest.run_within(&format!("touch {mib}"), TOUCH_LIMIT)?;
    }
    let processes = fixture.processes();
    let resident = fixture.resident_mib()?;
    let clock = CpuClock::read(&processes)?;
    let wall = fixture.inflate_to(asked_mib(guest_mib))?;
    let cpu = CpuClock::read(&processes)?.since(&clock);
    let returned_mib = resident as f64 - fixture.resident_mib()? as f64;
    let deflate = fixture.inflate_to(0)?;
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    Ok(Run { wall_ms: ms(wall), cpu, deflate_ms: ms(deflate), returned_mib })
}

const fn asked_mib(guest_mib: u64) -> u64 {
    guest_mib * 3 / 4
}

fn describe(case: Case, memory: MemoryState, round: usize, run: &Run) -> String {
    format!(
        "round {round}, {memory:?} memory, {case:?}: {:.0} ms, CPU {:.0} ms in addition to the guest's {:.0} ms, {:.0} MiB returned, back in {:.0} ms",
        run.wall_ms, run.cpu.other_ms, run.cpu.vcpu_ms, run.returned_mib, run.deflate_ms
    )
}

fn summarise(memory: MemoryState, guest_mib: u64, runs: &[Vec<Run>; 2], report: &mut Report) {
    let spread = |runs: &[Run], of: fn(&Run) -> f64| Spread::of(runs.iter().map(of));
    let [qemu, vhost_user] = runs;
    let qemu_ms = spread(qemu, |run| run.wall_ms).median;
    let guest_ms = spread(vhost_user, |run| run.cpu.vcpu_ms).median;
    for (name, runs) in Case::ALL.into_iter().zip(runs) {
        let wall_ms = spread(runs, |run| run.wall_ms);
        let cpu_ms = spread(runs, |run| run.cpu.vcpu_ms + run.cpu.other_ms);
        report.cases.push(CaseReport {
            name,
            memory,
            asked_mib: asked_mib(guest_mib),
            wall_ms,
            cpu_ms,
            vcpu_ms: spread(runs, |run| run.cpu.vcpu_ms),
            beside_ms: spread(runs, |run| run.cpu.other_ms),
            device_cpu_ms: cpu_ms.median - guest_ms,
            deflate_ms: spread(runs, |run| run.deflate_ms),
            returned_mib: spread(runs, |run| run.returned_mib).median,
            speedup: qemu_ms / wall_ms.median,
            speedup_limit: qemu_ms / guest_ms,
        });
    }
}
