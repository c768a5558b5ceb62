//! Checks of the balloon itself.

use control::Driver as Spoken;

use super::subject::{LIMIT, MIB, Subject, ensure};
use super::{Feature, Outcome, request_checks};
use crate::error::Result;

/// Memory that the guest touches before, and balloon target, in MiB.
const TOUCHED_MIB: u64 = 250;
const INFLATED_MIB: u64 = 200;

/// How often memory is deflated at once. A host that releases pages after their deflate fails one
/// round in two.
const BOUNCES: u64 = 6;

/// Balloon target under pressure, and allocation of the guest then: more than it has free.
const STARVING_MIB: u64 = 320;
const NEEDED_MIB: u64 = 120;

pub(super) fn inflates_and_deflates(subject: &mut Subject) -> Result<Outcome> {
    subject.run(&format!("touch {TOUCHED_MIB}"))?;
    let inflate = subject.balloon(INFLATED_MIB)?;
    subject.verify_kept()?;
    let deflate = subject.balloon(0)?;
    let verified_mib = subject.use_and_verify(TOUCHED_MIB, 2)?;
    Ok(Outcome::Passed(format!(
        "{INFLATED_MIB} MiB in {:.1} ms and {} messages, back in {:.1} ms; {verified_mib} MiB verified",
        inflate.wall_ms, inflate.messages, deflate.wall_ms
    )))
}

pub(super) fn deflates_at_once(subject: &mut Subject) -> Result<Outcome> {
    let mut verified_mib = 0;
    for round in 0..BOUNCES {
        // Memory that is allocated takes the host time to release.
        subject.run(&format!("touch {TOUCHED_MIB}"))?;
        subject.client.set_balloon(INFLATED_MIB * MIB, std::time::Duration::ZERO)?;
        let half = INFLATED_MIB * MIB / 2;
        // If the front end does not pass config writes on, the size is known from messages.
        subject.until("inflating", LIMIT, |status| {
            let given = status.balloon.last_change.as_ref().map_or(0, |change| change.messages);
            status.balloon.actual_bytes >= half || given > 0
        })?;
        subject.balloon(0)?;
        verified_mib += subject.use_and_verify(TOUCHED_MIB, round)?;
    }
    subject.no_faults()?;
    Ok(Outcome::Passed(format!("deflated at once {BOUNCES} times; {verified_mib} MiB verified")))
}

pub(super) fn sends_bitmaps(subject: &mut Subject) -> Result<Outcome> {
    /// 200 MiB as page numbers are 200 messages; as blocks, some.
    const MOST_MESSAGES: u64 = 20;
    subject.run(&format!("touch {TOUCHED_MIB}"))?;
    let change = subject.balloon(INFLATED_MIB)?;
    let driver = subject.status()?.guest.driver;
    ensure(driver == Spoken::Aerostat && change.messages <= MOST_MESSAGES, || {
        format!("{} messages of {driver:?}", change.messages)
    })?;
    subject.balloon(0)?;
    let verified_mib = subject.use_and_verify(TOUCHED_MIB, 3)?;
    Ok(Outcome::Passed(format!(
        "{INFLATED_MIB} MiB in {:.1} ms and {} messages; {verified_mib} MiB verified",
        change.wall_ms, change.messages
    )))
}

/// Many small changes, so that notifications are needed and suppressed. All messages use the
/// virtqueue's features.
pub(super) fn uses_ring(subject: &mut Subject) -> Result<Outcome> {
    const STEPS: u64 = 8;
    const STEP_MIB: u64 = 25;
    let mut messages = 0;
    for step in (0..=STEPS).chain((0..STEPS).rev()) {
        let set = subject.client.set_balloon(step * STEP_MIB * MIB, LIMIT)?;
        ensure(set.at_target, || format!("it is still at {} bytes", set.actual_bytes))?;
        messages += set.last_change.map_or(0, |change| change.messages);
    }
    let verified_mib = subject.use_and_verify(TOUCHED_MIB, 4)?;
    subject.no_faults()?;
    Ok(Outcome::Passed(format!(
        "{} changes, {messages} messages; {verified_mib} MiB verified",
        2 * STEPS
    )))
}

pub(super) fn deflates_under_pressure(subject: &mut Subject) -> Result<Outcome> {
    let free_mib = subject.number("free-mib")?;
    let inflated_mib = free_mib.min(STARVING_MIB + NEEDED_MIB / 2) - NEEDED_MIB / 2;
    subject.balloon(inflated_mib)?;
    let needed_mib = free_mib - inflated_mib + NEEDED_MIB;
    let reported = subject.run(&format!("pressure {needed_mib} 0"))?;
    ensure(reported == format!("taken_mib={needed_mib} end=complete"), || reported.clone())?;
    let yielded = subject
        .until("smaller", LIMIT, |status| status.balloon.actual_bytes < inflated_mib * MIB)?;
    subject.client.set_balloon(0, LIMIT)?;
    let verified_mib = subject.use_and_verify(TOUCHED_MIB, 5)?;
    subject.no_faults()?;
    Ok(Outcome::Passed(format!(
        "{inflated_mib} MiB deflated to {} when {needed_mib} were needed; {verified_mib} MiB verified",
        yielded.balloon.actual_bytes / MIB
    )))
}

pub(super) fn reloads(subject: &mut Subject) -> Result<Outcome> {
    subject.balloon(INFLATED_MIB)?;
    subject.unload_driver()?;
    let mut verified_mib = subject.use_and_verify(TOUCHED_MIB, 6)?;
    subject.load_driver()?;
    subject.balloon(INFLATED_MIB / 2)?;
    subject.balloon(0)?;
    verified_mib += subject.use_and_verify(TOUCHED_MIB, 7)?;
    Ok(Outcome::Passed(format!(
        "unloaded with {INFLATED_MIB} MiB, loaded, inflated; {verified_mib} MiB verified"
    )))
}

pub(super) fn sleeps(subject: &mut Subject) -> Result<Outcome> {
    subject.balloon(INFLATED_MIB)?;
    subject.sleep()?;
    // If the driver reset the device for the suspend, it inflates again.
    subject.until("as large as before", LIMIT, |status| {
        status.balloon.at_target && status.balloon.actual_bytes == INFLATED_MIB * MIB
    })?;
    subject.verify_kept()?;
    subject.balloon(INFLATED_MIB / 2)?;
    subject.sleep()?;
    subject.balloon(0)?;
    let verified_mib = subject.use_and_verify(TOUCHED_MIB, 8)?;
    if subject.target().cannot(Feature::FreePages).is_none() {
        request_checks::reports_free_pages(subject)?;
    }
    Ok(Outcome::Passed(format!(
        "slept with {INFLATED_MIB} MiB and with half of that; {verified_mib} MiB verified"
    )))
}
