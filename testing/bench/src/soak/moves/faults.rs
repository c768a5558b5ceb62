//! Injects faults into migrations at every stage. The guest must continue on exactly one side.

use std::process::Command;
use std::time::{Duration, Instant};

use control::api::MigrationState;
use lab::LabError;

use super::case::Case;
use super::endure::{KEPT_MIB, MEMORY_MIB, complaints};
use super::migrating_guest::{
    ConsoleCommands, LIMIT, MigratingGuest, POLL_INTERVAL, Receiver, state,
};
use super::proxy::{Fault, FaultKind, Proxy, Side, Stage};
use super::report::CaseReport;
use super::run_config::RunConfig;
use crate::error::{Result, wrong};
use crate::proc_text::kib;

/// Memory that the guest writes all the time, so that there are later rounds, in MiB.
const CHURN_MIB: u64 = 8;

/// Options of the source: slow enough for the guest to write in every round.
const SENDER: [&str; 6] = ["--connections", "2", "--bandwidth", "24MiB", "--max-downtime", "120ms"];

/// Maximum number of frames of a kind to skip.
const MOST_LATER: u32 = 6;

/// Timeout for both sides to know the outcome, with the operator's help: longer than the keepalive
/// timeout.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(90);

/// Timeout for a source to tell its destination to discard the guest. After it, the operator does.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(20);

/// Timeout of a command to a destination without a guest.
const NO_ANSWER_TIMEOUT: Duration = Duration::from_millis(700);

/// Maximum host memory of a process that waits for a guest and has discarded the last one.
const EMPTY_KIB: u64 = 48 << 10;

/// Side of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestLocation {
    Source,
    Destination,
    /// Its process was killed before the commit.
    Lost,
}

/// Injects `count` faults chosen by `seed`. Calls `progress` with each.
pub fn fail(
    run_config: &RunConfig,
    case: Case,
    count: usize,
    seed: u64,
    progress: &mut dyn FnMut(&str),
) -> CaseReport {
    let chosen = faults(seed).into_iter().cycle().take(count).collect();
    let mut report = fail_at(run_config, case, chosen, progress);
    report.seed = Some(seed);
    report
}

/// Injects these faults.
pub fn fail_at(
    run_config: &RunConfig,
    case: Case,
    faults: Vec<Fault>,
    progress: &mut dyn FnMut(&str),
) -> CaseReport {
    let began = Instant::now();
    let mut report = CaseReport::new(case.name);
    if let Err(error) = fail_all(run_config, case, faults.into_iter(), &mut report, progress) {
        report.failure = Some(error.to_string());
    }
    report.took_s = began.elapsed().as_secs_f64();
    report
}

/// All faults, in an order chosen by the seed.
pub fn faults(seed: u64) -> Vec<Fault> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut faults = Vec::new();
    for stage in Stage::ALL {
        for kind in FaultKind::ALL.into_iter().filter(|kind| kind.fits(stage)) {
            let later = if stage.is_repeated() { random.u32(..MOST_LATER) } else { 0 };
            faults.push(Fault { stage, later, kind, seed: random.u64(..) });
        }
    }
    random.shuffle(&mut faults);
    faults
}

fn fail_all(
    run_config: &RunConfig,
    case: Case,
    faults: impl Iterator<Item = Fault>,
    report: &mut CaseReport,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut guest: Option<MigratingGuest<'_>> = None;
    for (number, fault) in faults.enumerate() {
        let mut migrating_guest = match guest.take() {
            Some(migrating_guest) => migrating_guest,
            None => boot(run_config, case)?,
        };
        let began = Instant::now();
        let what = format!("{:?} {:?}", fault.stage, fault.kind);
        let (outcome, verify_all) = match inject(&mut migrating_guest, fault, report) {
            Ok(outcome) => outcome,
            Err(error) => {
                let log = migrating_guest.guest.console_log();
                return Err(wrong(format!("fault {number}, {fault:?}: {error}\n{log}")));
            }
        };
        progress(&format!(
            "fault {number} {what}: {outcome}, {:.1} s",
            began.elapsed().as_secs_f64()
        ));
        report.count_fault(&format!("{what}: {outcome}"));
        guest = verify_all.then_some(migrating_guest);
    }
    Ok(())
}

fn boot(run_config: &RunConfig, case: Case) -> Result<MigratingGuest<'_>> {
    let mut migrating_guest = MigratingGuest::boot(run_config, case, MEMORY_MIB)?;
    migrating_guest.run(&format!("fill kept {KEPT_MIB} 1"))?;
    migrating_guest.run(&format!("churn {CHURN_MIB} 1"))?;
    Ok(migrating_guest)
}

/// Injects one fault. Returns the outcome, and whether the guest still exists.
fn inject(
    migrating_guest: &mut MigratingGuest<'_>,
    fault: Fault,
    report: &mut CaseReport,
) -> Result<(&'static str, bool)> {
    let receiver = migrating_guest.receiver(&[])?;
    let (source, destination) = (migrating_guest.guest.pid(), receiver.guest.pid());
    let kill = Box::new(move |side| {
        let pid = if side == Side::Source { source } else { destination };
        // A dead process cannot be killed.
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
    });
    let proxy = Proxy::start(&receiver.address, Some(fault), kill)?;
    let mut migrate = migrating_guest.start_migrate(&proxy.address, &SENDER)?;
    let mut commands = migrating_guest.run_commands(&mut migrate, |_| Ok(()))?;
    let output = migrate.end()?;
    report.answered += commands.answered;
    let fired = proxy.has_fired();
    let location = wait_for_outcome(migrating_guest, &receiver, fault, fired)?;
    drop(proxy);
    let log = receiver.guest.console_log();
    if let Some(panic) = log.lines().find(|line| line.contains("panicked at")) {
        return Err(wrong(panic.to_owned()));
    }
    match location {
        GuestLocation::Lost => Ok(("killed with its guest", false)),
        GuestLocation::Source => {
            runs_only_here(migrating_guest, receiver, fault, &mut commands)?;
            verify_all(migrating_guest, report)?;
            Ok((if output.code == Some(0) { "migrated" } else { "stayed at the source" }, true))
        }
        // An authenticated source may send any state.
        GuestLocation::Destination
            if fault.kind == FaultKind::Forge && fault.stage == Stage::State && fired =>
        {
            Ok(("forged state accepted", false))
        }
        GuestLocation::Destination => {
            let killed = fired && fault.kind == FaultKind::KillSource;
            let unheard = if killed {
                migrating_guest.switch_to(receiver);
                migrating_guest.wait_for_pending(&mut commands)?
            } else {
                migrating_guest.finish_migration(receiver, &mut commands)?
            };
            report.unheard += u64::from(unheard);
            verify_all(migrating_guest, report)?;
            Ok((
                if fired {
                    "migrated despite the fault"
                } else {
                    "migrated, the stage was not reached"
                },
                true,
            ))
        }
    }
}

/// Waits until the guest's side is known. Resolves in-doubt migrations like an operator.
fn wait_for_outcome(
    migrating_guest: &MigratingGuest<'_>,
    receiver: &Receiver,
    fault: Fault,
    fired: bool,
) -> Result<GuestLocation> {
    use MigrationState::{Arrived, Failed, InDoubt, Moved, Waiting};
    let began = Instant::now();
    let killed = fault.kind.kills().filter(|_| fired);
    loop {
        let (here, there) = (state(&migrating_guest.control), receiver.state());
        match (here, there) {
            (None | Some(Moved), Some(Arrived)) => return Ok(GuestLocation::Destination),
            (Some(Failed), Some(InDoubt)) if began.elapsed() > DISCARD_TIMEOUT => {
                migrating_guest.resolve(&receiver.control, &["--discard"])?;
            }
            (Some(Failed), Some(InDoubt)) => {}
            (Some(Failed), Some(Arrived)) => return Err(wrong("it runs on both sides".into())),
            (Some(Failed), _) => return Ok(GuestLocation::Source),
            (Some(InDoubt), None) => {
                migrating_guest.resolve(&migrating_guest.control, &["--run-here"])?;
            }
            (Some(InDoubt), Some(_)) => {
                migrating_guest.resolve(&migrating_guest.control, &[])?;
            }
            (None, Some(InDoubt)) if killed == Some(Side::Source) => {
                migrating_guest.resolve(&receiver.control, &["--run-here"])?;
            }
            (None, Some(Waiting | Failed)) if killed == Some(Side::Source) => {
                if fault.stage.is_in_doubt() {
                    return Err(wrong("the guest was lost although the destination had it".into()));
                }
                return Ok(GuestLocation::Lost);
            }
            _ => {}
        }
        if began.elapsed() > OUTCOME_TIMEOUT {
            return Err(wrong(format!("source {here:?}, destination {there:?}")));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Checks that the guest answers at the source, and that the destination has none of it.
fn runs_only_here(
    migrating_guest: &mut MigratingGuest<'_>,
    mut receiver: Receiver,
    fault: Fault,
    commands: &mut ConsoleCommands,
) -> Result<()> {
    // No command was lost, since the guest did not leave.
    if migrating_guest.wait_for_pending(commands)? {
        return Err(wrong("a command was lost".into()));
    }
    if fault.kind == FaultKind::KillDestination {
        return Ok(());
    }
    let end = Instant::now() + LIMIT;
    while receiver.state() != Some(MigrationState::Waiting) {
        if Instant::now() > end {
            return Err(wrong(format!("the destination does not wait: {:?}", receiver.state())));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    let resident_kib = resident_kib(receiver.guest.pid());
    if resident_kib > EMPTY_KIB {
        return Err(wrong(format!("{resident_kib} KiB of the guest are not freed")));
    }
    let command = "free-mib";
    let id = receiver.guest.send(command)?;
    migrating_guest.number(command)?;
    match receiver.guest.answer(id, command, NO_ANSWER_TIMEOUT) {
        Err(LabError::Timeout { .. }) => Ok(()),
        other => Err(wrong(format!("it runs on both sides: {other:?}"))),
    }
}

fn verify_all(migrating_guest: &mut MigratingGuest<'_>, report: &mut CaseReport) -> Result<()> {
    migrating_guest.verify("kept", KEPT_MIB, 1)?;
    report.verified_bytes += KEPT_MIB << 20;
    let reply = migrating_guest.run("calm")?;
    if !reply.text.ends_with(" wrong=0") {
        return Err(wrong(format!("its churn: {reply:?}")));
    }
    migrating_guest.run(&format!("churn {CHURN_MIB} 1"))?;
    // The VMMs log errors about the injected faults, as they should.
    report.complaints.extend(complaints(&migrating_guest.guest.console_log()));
    Ok(())
}

/// Memory of a process (proc(5), `status`).
fn resident_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    kib(&text, "VmRSS").unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_has_every_applicable_fault() {
        let faults = faults(3);
        assert_eq!(faults, super::faults(3));
        for stage in Stage::ALL {
            for kind in [
                FaultKind::Cut,
                FaultKind::Stall,
                FaultKind::KillSource,
                FaultKind::KillDestination,
            ] {
                assert!(faults.iter().any(|fault| (fault.stage, fault.kind) == (stage, kind)));
            }
        }
        assert!(faults.len() > 100, "{}", faults.len());
    }
}
