//! A migration fails in any moment and in any way, and its guest goes on: on one side, never on two.

use std::process::Command;
use std::time::{Duration, Instant};

use control::api::MigrationState;
use lab::LabError;

use super::case::Case;
use super::endure::{KEPT_MIB, MEMORY_MIB, complaints};
use super::migrating_guest::{Conversation, LIMIT, MigratingGuest, POLL_INTERVAL, Receiver, state};
use super::proxy::{Fault, Harm, Moment, Proxy, Side};
use super::report::CaseReport;
use super::run_config::RunConfig;
use crate::error::{Result, wrong};
use crate::proc_text::kib;

/// What the guest writes all the time, so that there are later rounds, in MiB.
const CHURN_MIB: u64 = 8;

/// Slow enough for the guest to write something in every round.
const SENDER: [&str; 6] = ["--connections", "2", "--bandwidth", "24MiB", "--max-downtime", "120ms"];

/// Frames of many among which the one is chosen.
const MOST_LATER: u32 = 6;

/// How long two sides may take to be sure, or an operator to ask them: longer than either waits for a
/// sign of life.
const SURE: Duration = Duration::from_secs(90);

/// A destination that is told to give up by its source is so within this, or its operator does it.
const TOLD: Duration = Duration::from_secs(20);

/// For an answer of a guest that is not there.
const SILENCE: Duration = Duration::from_millis(700);

/// Host memory of a process that waits for a guest and has none of it any more.
const EMPTY_KIB: u64 = 48 << 10;

/// Where the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here,
    There,
    /// Its process was killed before any other had it.
    Lost,
}

/// Lets `count` migrations fail, in moments and ways chosen by `seed`; `told` hears of each.
pub fn fail(
    run_config: &RunConfig,
    case: Case,
    count: usize,
    seed: u64,
    told: &mut dyn FnMut(&str),
) -> CaseReport {
    let chosen = faults(seed).into_iter().cycle().take(count).collect();
    let mut report = fail_at(run_config, case, chosen, told);
    report.seed = Some(seed);
    report
}

/// Lets migrations fail so.
pub fn fail_at(
    run_config: &RunConfig,
    case: Case,
    faults: Vec<Fault>,
    told: &mut dyn FnMut(&str),
) -> CaseReport {
    let began = Instant::now();
    let mut report = CaseReport::new(case.name);
    if let Err(error) = fail_all(run_config, case, faults.into_iter(), &mut report, told) {
        report.failure = Some(error.to_string());
    }
    report.took_s = began.elapsed().as_secs_f64();
    report
}

/// Everything that can fail, in an order that the seed decides.
pub fn faults(seed: u64) -> Vec<Fault> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut faults = Vec::new();
    for moment in Moment::ALL {
        for harm in Harm::ALL.into_iter().filter(|harm| harm.fits(moment)) {
            let later = if moment.is_of_many() { random.u32(..MOST_LATER) } else { 0 };
            faults.push(Fault { moment, later, harm, seed: random.u64(..) });
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
    told: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut guest: Option<MigratingGuest<'_>> = None;
    for (number, fault) in faults.enumerate() {
        let mut migrating_guest = match guest.take() {
            Some(migrating_guest) => migrating_guest,
            None => boot(run_config, case)?,
        };
        let began = Instant::now();
        let what = format!("{:?} {:?}", fault.moment, fault.harm);
        let (came, is_whole) = match one(&mut migrating_guest, fault, report) {
            Ok(came) => came,
            Err(error) => {
                let log = migrating_guest.guest.console_log();
                return Err(wrong(format!("fault {number}, {fault:?}: {error}\n{log}")));
            }
        };
        told(&format!("fault {number} {what}: {came}, {:.1} s", began.elapsed().as_secs_f64()));
        report.count_fault(&format!("{what}: {came}"));
        guest = is_whole.then_some(migrating_guest);
    }
    Ok(())
}

fn boot(run_config: &RunConfig, case: Case) -> Result<MigratingGuest<'_>> {
    let mut migrating_guest = MigratingGuest::boot(run_config, case, MEMORY_MIB)?;
    migrating_guest.run(&format!("fill kept {KEPT_MIB} 1"))?;
    migrating_guest.run(&format!("churn {CHURN_MIB} 1"))?;
    Ok(migrating_guest)
}

/// One fault: what came of it, and whether the guest is still there.
fn one(
    migrating_guest: &mut MigratingGuest<'_>,
    fault: Fault,
    report: &mut CaseReport,
) -> Result<(&'static str, bool)> {
    let receiver = migrating_guest.receiver(&[])?;
    let (source, destination) = (migrating_guest.guest.pid(), receiver.guest.pid());
    let kill = Box::new(move |side| {
        let pid = if side == Side::Source { source } else { destination };
        // One that is dead cannot be killed.
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
    });
    let proxy = Proxy::start(&receiver.address, Some(fault), kill)?;
    let mut departure = migrating_guest.depart(&proxy.address, &SENDER)?;
    let mut talk = migrating_guest.converse(&mut departure, |_| Ok(()))?;
    let said = departure.end()?;
    report.answered += talk.answered;
    let fired = proxy.has_fired();
    let place = resolved(migrating_guest, &receiver, fault, fired)?;
    drop(proxy);
    let log = receiver.guest.console_log();
    if let Some(panic) = log.lines().find(|line| line.contains("panicked at")) {
        return Err(wrong(panic.to_owned()));
    }
    match place {
        Place::Lost => Ok(("killed with its guest", false)),
        Place::Here => {
            runs_only_here(migrating_guest, receiver, fault, &mut talk)?;
            is_whole(migrating_guest, report)?;
            Ok((if said.code == Some(0) { "moved" } else { "stayed" }, true))
        }
        // Who may send a state may send any.
        Place::There if fault.harm == Harm::Forge && fault.moment == Moment::State && fired => {
            Ok(("taken as it was forged", false))
        }
        Place::There => {
            let killed = fired && fault.harm == Harm::KillSource;
            let unheard = if killed {
                migrating_guest.take(receiver);
                migrating_guest.catch_up(&mut talk)?
            } else {
                migrating_guest.arrive(receiver, &mut talk)?
            };
            report.unheard += u64::from(unheard);
            is_whole(migrating_guest, report)?;
            Ok((if fired { "went all the same" } else { "went, the moment did not come" }, true))
        }
    }
}

/// Waits until it is sure where the guest is; asks as an operator does where the sides do not know.
fn resolved(
    migrating_guest: &MigratingGuest<'_>,
    receiver: &Receiver,
    fault: Fault,
    fired: bool,
) -> Result<Place> {
    use MigrationState::{Arrived, Failed, InDoubt, Moved, Waiting};
    let began = Instant::now();
    let killed = fault.harm.kills().filter(|_| fired);
    loop {
        let (here, there) = (state(&migrating_guest.control), receiver.state());
        match (here, there) {
            (None | Some(Moved), Some(Arrived)) => return Ok(Place::There),
            (Some(Failed), Some(InDoubt)) if began.elapsed() > TOLD => {
                migrating_guest.resolve(&receiver.control, &["--discard"])?;
            }
            (Some(Failed), Some(InDoubt)) => {}
            (Some(Failed), Some(Arrived)) => return Err(wrong("it runs on both sides".into())),
            (Some(Failed), _) => return Ok(Place::Here),
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
                if fault.moment.is_in_the_change() {
                    return Err(wrong("it was lost where the destination had it".into()));
                }
                return Ok(Place::Lost);
            }
            _ => {}
        }
        if began.elapsed() > SURE {
            return Err(wrong(format!("here {here:?}, there {there:?}")));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// It answers here, and there is nothing of it where it was to go.
fn runs_only_here(
    migrating_guest: &mut MigratingGuest<'_>,
    mut receiver: Receiver,
    fault: Fault,
    talk: &mut Conversation,
) -> Result<()> {
    // Nothing was lost on the way: it did not go.
    if migrating_guest.catch_up(talk)? {
        return Err(wrong("what was typed was not heard".into()));
    }
    if fault.harm == Harm::KillDestination {
        return Ok(());
    }
    let end = Instant::now() + LIMIT;
    while receiver.state() != Some(MigrationState::Waiting) {
        if Instant::now() > end {
            return Err(wrong(format!("the destination is left: {:?}", receiver.state())));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    let resident_kib = resident_kib(receiver.guest.pid());
    if resident_kib > EMPTY_KIB {
        return Err(wrong(format!("{resident_kib} KiB of the guest are left")));
    }
    let question = "free-mib";
    let asked = receiver.guest.ask(question)?;
    migrating_guest.number(question)?;
    match receiver.guest.answer(asked, question, SILENCE) {
        Err(LabError::Timeout { .. }) => Ok(()),
        other => Err(wrong(format!("it runs on both sides: {other:?}"))),
    }
}

fn is_whole(migrating_guest: &mut MigratingGuest<'_>, report: &mut CaseReport) -> Result<()> {
    migrating_guest.verify("kept", KEPT_MIB, 1)?;
    report.verified_bytes += KEPT_MIB << 20;
    let reply = migrating_guest.run("calm")?;
    if !reply.text.ends_with(" wrong=0") {
        return Err(wrong(format!("its churn: {reply:?}")));
    }
    migrating_guest.run(&format!("churn {CHURN_MIB} 1"))?;
    // Monitors complain of what was done to them, as they should.
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
    fn every_moment_fails_in_every_way_that_fits_it() {
        let faults = faults(3);
        assert_eq!(faults, super::faults(3));
        for moment in Moment::ALL {
            for harm in [Harm::Cut, Harm::Stall, Harm::KillSource, Harm::KillDestination] {
                assert!(faults.iter().any(|fault| (fault.moment, fault.harm) == (moment, harm)));
            }
        }
        assert!(faults.len() > 100, "{}", faults.len());
    }
}
