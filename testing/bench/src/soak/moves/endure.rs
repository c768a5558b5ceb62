//! Migrates a guest many times and verifies it each time.

use std::ops::Range;
use std::time::{Duration, Instant};

use control::Client;
use control::api::{BalloonStatus, MigrationStatus};

use super::case::{Case, Target, Turn};
use super::migrating_guest::{LIMIT, MigratingGuest, POLL_INTERVAL};
use super::report::CaseReport;
use super::run_config::RunConfig;
use crate::error::{BenchError, Result, wrong};
use crate::logs::{backend_complaints, guest_complaints};
use crate::threads;

/// Memory use of a guest with the minimum memory, in MiB: a file that is kept, the memory that a
/// process writes, verifies and frees all the time, and the maximum balloon. The rest is free.
pub const MEMORY_MIB: u64 = 192;
pub(super) const KEPT_MIB: u64 = 24;
const CHURN_MIB: u64 = 8;
const BALLOON_MIB: u64 = 48;

/// Memory that a busy guest rewrites all the time: more than the dirty limit of 300 ms at 12 MiB/s.
const BUSY_MIB: u64 = 6;

/// Memory left free when all is filled.
const RESERVE_MIB: u64 = 24;

/// Migrations between two fills of all memory.
const FILL_EVERY: usize = 10;

/// Line of a guest that has booted.
const BOOTED: &str = "@lab 0 ok ready";

const MIB: u64 = 1 << 20;

/// Migrates a guest there and back, with the options of these numbers. Calls `progress` with each
/// migration. Fills all guest memory after every tenth.
pub fn endure(
    run_config: &RunConfig,
    case: Case,
    moves: Range<usize>,
    progress: &mut dyn FnMut(&str),
) -> CaseReport {
    let began = Instant::now();
    let mut report = CaseReport::new(case.name);
    if let Err(error) = migrate_repeatedly(run_config, case, moves, &mut report, progress) {
        report.failure = Some(error.to_string());
    }
    report.took_s = began.elapsed().as_secs_f64();
    report
}

fn migrate_repeatedly(
    run_config: &RunConfig,
    case: Case,
    moves: Range<usize>,
    report: &mut CaseReport,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut migrating_guest = MigratingGuest::boot(run_config, case, MEMORY_MIB)?;
    migrating_guest.run(&format!("fill kept {KEPT_MIB} 1"))?;
    let mut run = SoakRun { case, migrating_guest, target_mib: 0, report };
    run.begin(0)?;
    for number in moves {
        let turn = case.turn(number);
        let migrated = run.go(&turn);
        let status = migrated.map_err(|error| {
            let guest = &run.migrating_guest.guest;
            let (threads, log) = (threads::of(guest.pid()), guest.console_log());
            wrong(format!("migration {number}, {turn:?}: {error}\n{threads}{log}"))
        })?;
        progress(&line(number, &turn, &status));
        if number % FILL_EVERY == FILL_EVERY - 1 {
            run.fill_everything(number as u64)?;
        }
    }
    run.end()
}

/// State of the run.
struct SoakRun<'a, 'b> {
    case: Case,
    migrating_guest: MigratingGuest<'a>,
    /// Balloon target.
    target_mib: u64,
    report: &'b mut CaseReport,
}

impl SoakRun<'_, '_> {
    /// Starts the background load.
    fn begin(&mut self, seed: u64) -> Result<()> {
        self.migrating_guest.run(&format!("churn {CHURN_MIB} {}", seed + 1))?;
        if self.case.busy {
            self.migrating_guest.run(&format!("busy {BUSY_MIB}"))?;
        }
        Ok(())
    }

    fn calm(&mut self) -> Result<()> {
        if self.case.busy {
            self.migrating_guest.run("idle")?;
        }
        let reply = self.migrating_guest.run("calm")?;
        let number = |name: &str| {
            let word = reply.text.split_whitespace().find_map(|word| word.strip_prefix(name));
            word.and_then(|word| word.parse::<u64>().ok())
        };
        match (number("pages="), number("wrong=")) {
            (Some(pages), Some(0)) => {
                self.report.verified_bytes += pages * control::BALLOON_PAGE_BYTES;
                Ok(())
            }
            (_, Some(pages)) => {
                self.report.wrong_pages += pages;
                let (name, file) = (self.case.name.to_owned(), "its churn".to_owned());
                Err(BenchError::WrongPages { name, file, pages, named: reply.lines })
            }
            _ => Err(BenchError::GuestAnswer { command: "calm".to_owned(), answer: reply.text }),
        }
    }

    /// Migrates once.
    fn go(&mut self, turn: &Turn) -> Result<MigrationStatus> {
        if let Target::Before(percent) = turn.target {
            self.set(percent)?;
            self.resolves()?;
        }
        let receiver = self.migrating_guest.receiver(&turn.receiver)?;
        let mut migrate = self.migrating_guest.start_migrate(&receiver.address, &turn.sender)?;
        let mut wanted = match turn.target {
            Target::Meanwhile(percent) => Some(percent),
            _ => None,
        };
        let target_mib = &mut self.target_mib;
        let mut commands = self.migrating_guest.run_commands(&mut migrate, |migrating_guest| {
            // Fails if the guest is about to leave or has left. It is then set at the destination.
            if let Some(percent) = wanted
                && let Ok(client) = migrating_guest.client()
                && client.set_balloon(mib_of(percent) * MIB, Duration::ZERO).is_ok()
            {
                *target_mib = mib_of(percent);
                wanted = None;
            }
            Ok(())
        })?;
        let said = migrate.end()?;
        let status = said.migrated()?;
        let log = self.migrating_guest.guest.console_log();
        self.report.unheard +=
            u64::from(self.migrating_guest.finish_migration(receiver, &mut commands)?);
        self.report.answered += commands.answered;
        self.add_complaints(&log);
        self.report.add(&status);
        if let Some(percent) = wanted {
            self.set(percent)?;
        }
        self.verify_all()?;
        Ok(status)
    }

    /// Verifies the guest after the migration.
    fn verify_all(&mut self) -> Result<()> {
        let status = self.migrating_guest.client()?.status()?;
        let target_mib = status.balloon.target_bytes / MIB;
        if target_mib != self.target_mib {
            return Err(wrong(format!("its target is {target_mib}, not {} MiB", self.target_mib)));
        }
        if status.faults.total() > 0 {
            let name = self.case.name.to_owned();
            return Err(BenchError::Faults { name, faults: status.faults });
        }
        self.verify("kept", KEPT_MIB, 1)?;
        self.resolves()
    }

    fn verify(&mut self, file: &str, mib: u64, seed: u64) -> Result<()> {
        let verified = self.migrating_guest.verify(file, mib, seed);
        if let Err(BenchError::WrongPages { pages, .. }) = &verified {
            self.report.wrong_pages += pages;
        }
        self.report.verified_bytes += mib * MIB;
        verified
    }

    fn set(&mut self, percent: u64) -> Result<()> {
        self.target_mib = mib_of(percent);
        self.migrating_guest.client()?.set_balloon(self.target_mib * MIB, Duration::ZERO)?;
        Ok(())
    }

    fn resolves(&mut self) -> Result<()> {
        if self.case.driver.is_none() {
            return Ok(());
        }
        let client: Client = self.migrating_guest.client()?;
        let end = Instant::now() + LIMIT;
        loop {
            let status: BalloonStatus = client.status()?.balloon;
            if status.at_target && status.actual_bytes == self.target_mib * MIB {
                return Ok(());
            }
            if Instant::now() > end {
                let (name, actual_pages) = (self.case.name.to_owned(), status.actual_pages);
                let target_pages = status.target_pages;
                return Err(BenchError::NotReached { name, actual_pages, target_pages });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Fills and verifies all free and all ballooned memory.
    fn fill_everything(&mut self, seed: u64) -> Result<()> {
        self.calm()?;
        if self.case.driver.is_some() {
            self.set(0)?;
            self.resolves()?;
        }
        let free_mib = self.migrating_guest.number("free-mib")?;
        let all_mib = free_mib.saturating_sub(RESERVE_MIB);
        if all_mib < MEMORY_MIB / 4 {
            return Err(wrong(format!("{free_mib} MiB are free")));
        }
        self.migrating_guest.run(&format!("fill all {all_mib} {seed}"))?;
        self.verify("all", all_mib, seed)?;
        self.migrating_guest.run("drop all")?;
        self.begin(seed)
    }

    fn add_complaints(&mut self, log: &str) {
        self.report.complaints.extend(complaints(log));
        self.report.complaints.extend(backend_complaints(log));
    }

    fn end(mut self) -> Result<()> {
        self.calm()?;
        let log = self.migrating_guest.guest.console_log();
        self.add_complaints(&log);
        let ended = self.migrating_guest.guest.power_off()?;
        if ended.success() { Ok(()) } else { Err(wrong(format!("the VMM: {ended}"))) }
    }
}

/// Error lines of a guest. Its boot is excluded, which logs oddities of the emulated machine.
pub(super) fn complaints(log: &str) -> Vec<String> {
    guest_complaints(log.find(BOOTED).and_then(|at| log.get(at..)).unwrap_or(log))
}

const fn mib_of(percent: u64) -> u64 {
    BALLOON_MIB * percent / 100
}

fn line(number: usize, turn: &Turn, status: &MigrationStatus) -> String {
    let summary = status.summary.clone().unwrap_or_default();
    format!(
        "migration {number} {} {} {:?}: {:.0} ms, downtime {:.0} ms, {} rounds, {} MiB sent, throttle {} %",
        turn.receiver.join(" "),
        turn.sender.join(" "),
        turn.target,
        summary.total_ms,
        summary.downtime.total_ms,
        summary.rounds.len(),
        summary.sent_bytes / MIB,
        summary.throttle_percent
    )
}
