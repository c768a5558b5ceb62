//! A migration fails in any moment and in any way, and its guest goes on: on one side, never on two.

use std::process::Command;
use std::time::{Duration, Instant};

use control::api::MigrationState;
use lab::LabError;

use super::case::Case;
use super::endure::{KEPT_MIB, MEMORY_MIB, complaints};
use super::kit::Kit;
use super::proxy::{Fault, Harm, Moment, Proxy, Side};
use super::report::CaseReport;
use super::traveller::{Conversation, LIMIT, LOOK, Receiver, Traveller, state};
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
    kit: &Kit,
    case: Case,
    count: usize,
    seed: u64,
    told: &mut dyn FnMut(&str),
) -> CaseReport {
    let chosen = faults(seed).into_iter().cycle().take(count).collect();
    let mut report = fail_at(kit, case, chosen, told);
    report.seed = Some(seed);
    report
}

/// Lets migrations fail so.
pub fn fail_at(
    kit: &Kit,
    case: Case,
    faults: Vec<Fault>,
    told: &mut dyn FnMut(&str),
) -> CaseReport {
    let began = Instant::now();
    let mut report = CaseReport::new(case.name);
    if let Err(error) = fail_all(kit, case, faults.into_iter(), &mut report, told) {
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
    kit: &Kit,
    case: Case,
    faults: impl Iterator<Item = Fault>,
    report: &mut CaseReport,
    told: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut guest: Option<Traveller<'_>> = None;
    for (number, fault) in faults.enumerate() {
        let mut traveller = match guest.take() {
            Some(traveller) => traveller,
            None => boot(kit, case)?,
        };
        let began = Instant::now();
        let what = format!("{:?} {:?}", fault.moment, fault.harm);
        let (came, is_whole) = match one(&mut traveller, fault, report) {
            Ok(came) => came,
            Err(error) => {
                let log = traveller.guest.console_log();
                return Err(wrong(format!("fault {number}, {fault:?}: {error}\n{log}")));
            }
        };
        told(&format!("fault {number} {what}: {came}, {:.1} s", began.elapsed().as_secs_f64()));
        report.count_fault(&format!("{what}: {came}"));
        guest = is_whole.then_some(traveller);
    }
    Ok(())
}

fn boot(kit: &Kit, case: Case) -> Result<Traveller<'_>> {
    let mut traveller = Traveller::boot(kit, case, MEMORY_MIB)?;
    traveller.run(&format!("fill kept {KEPT_MIB} 1"))?;
    traveller.run(&format!("churn {CHURN_MIB} 1"))?;
    Ok(traveller)
}

/// One fault: what came of it, and whether the guest is still there.
fn one(
    traveller: &mut Traveller<'_>,
    fault: Fault,
    report: &mut CaseReport,
) -> Result<(&'static str, bool)> {
    let receiver = traveller.receiver(&[])?;
    let (source, destination) = (traveller.guest.pid(), receiver.guest.pid());
    let kill = Box::new(move |side| {
        let pid = if side == Side::Source { source } else { destination };
        // One that is dead cannot be killed.
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
    });
    let proxy = Proxy::start(&receiver.address, Some(fault), kill)?;
    let mut departure = traveller.depart(&proxy.address, &SENDER)?;
    let mut talk = traveller.converse(&mut departure, |_| Ok(()))?;
    let said = departure.end()?;
    report.answered += talk.answered;
    let fired = proxy.has_fired();
    let place = settled(traveller, &receiver, fault, fired)?;
    drop(proxy);
    let log = receiver.guest.console_log();
    if let Some(panic) = log.lines().find(|line| line.contains("panicked at")) {
        return Err(wrong(panic.to_owned()));
    }
    match place {
        Place::Lost => Ok(("killed with its guest", false)),
        Place::Here => {
            runs_only_here(traveller, receiver, fault, &mut talk)?;
            is_whole(traveller, report)?;
            Ok((if said.code == Some(0) { "moved" } else { "stayed" }, true))
        }
        // Who may send a state may send any.
        Place::There if fault.harm == Harm::Forge && fault.moment == Moment::State && fired => {
            Ok(("taken as it was forged", false))
        }
        Place::There => {
            let killed = fired && fault.harm == Harm::KillSource;
            let unheard = if killed {
                traveller.take(receiver);
                traveller.catch_up(&mut talk)?
            } else {
                traveller.arrive(receiver, &mut talk)?
            };
            report.unheard += u64::from(unheard);
            is_whole(traveller, report)?;
            Ok((if fired { "went all the same" } else { "went, the moment did not come" }, true))
        }
    }
}

/// Waits until it is sure where the guest is; asks as an operator does where the sides do not know.
fn settled(
    traveller: &Traveller<'_>,
    receiver: &Receiver,
    fault: Fault,
    fired: bool,
) -> Result<Place> {
    use MigrationState::{Arrived, Failed, InDoubt, Moved, Waiting};
    let began = Instant::now();
    let killed = fault.harm.kills().filter(|_| fired);
    loop {
        let (here, there) = (state(&traveller.control), receiver.state());
        match (here, there) {
            (None | Some(Moved), Some(Arrived)) => return Ok(Place::There),
            (Some(Failed), Some(InDoubt)) if began.elapsed() > TOLD => {
                traveller.settle(&receiver.control, &["--give-up"])?;
            }
            (Some(Failed), Some(InDoubt)) => {}
            (Some(Failed), Some(Arrived)) => return Err(wrong("it runs on both sides".into())),
            (Some(Failed), _) => return Ok(Place::Here),
            (Some(InDoubt), None) => {
                traveller.settle(&traveller.control, &["--run-here"])?;
            }
            (Some(InDoubt), Some(_)) => {
                traveller.settle(&traveller.control, &[])?;
            }
            (None, Some(InDoubt)) if killed == Some(Side::Source) => {
                traveller.settle(&receiver.control, &["--run-here"])?;
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
        std::thread::sleep(LOOK);
    }
}

/// It answers here, and there is nothing of it where it was to go.
fn runs_only_here(
    traveller: &mut Traveller<'_>,
    mut receiver: Receiver,
    fault: Fault,
    talk: &mut Conversation,
) -> Result<()> {
    // Nothing was lost on the way: it did not go.
    if traveller.catch_up(talk)? {
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
        std::thread::sleep(LOOK);
    }
    let resident_kib = resident_kib(receiver.guest.pid());
    if resident_kib > EMPTY_KIB {
        return Err(wrong(format!("{resident_kib} KiB of the guest are left")));
    }
    let question = "free-mib";
    let asked = receiver.guest.ask(question)?;
    traveller.number(question)?;
    match receiver.guest.answer(asked, question, SILENCE) {
        Err(LabError::Timeout { .. }) => Ok(()),
        other => Err(wrong(format!("it runs on both sides: {other:?}"))),
    }
}

fn is_whole(traveller: &mut Traveller<'_>, report: &mut CaseReport) -> Result<()> {
    traveller.verify("kept", KEPT_MIB, 1)?;
    report.verified_bytes += KEPT_MIB << 20;
    let reply = traveller.run("calm")?;
    if !reply.text.ends_with(" wrong=0") {
        return Err(wrong(format!("its churn: {reply:?}")));
    }
    traveller.run(&format!("churn {CHURN_MIB} 1"))?;
    // Monitors complain of what was done to them, as they should.
    report.complaints.extend(complaints(&traveller.guest.console_log()));
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
