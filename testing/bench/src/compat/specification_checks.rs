//! Checks of optional features of the virtio balloon specification.

use std::time::{Duration, Instant};

use super::Outcome;
use super::subject::{LIMIT, MIB, Subject, ensure};
use crate::error::Result;

/// Statistics interval.
const STATS_MS: u64 = 200;

/// Tolerance of the guest's free memory, in MiB, which changes meanwhile.
const FREE_SLACK_MIB: u64 = 12;

/// Linux hints whole blocks of the largest order.
const HINTED_PERCENT: u64 = 85;

/// Timeout for a report to match the guest's free memory.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// Memory that is filled and verified, in MiB.
const USED_MIB: u64 = 250;

/// Memory that is freed, and the percentage that must be reported.
const FREED_MIB: u64 = 200;
const REPORTED_PERCENT: u64 = 90;

/// Linux reports a part of free memory every 2 s (mm/page_reporting.c).
const REPORTS_LIMIT: Duration = Duration::from_secs(30);

pub(super) fn reports_statistics(subject: &mut Subject) -> Result<Outcome> {
    subject.client.set_stats(STATS_MS)?;
    // The next statistics may be on their way, so this waits for those after them.
    for _ in 0..2 {
        let asked = Instant::now();
        subject.until("reporting statistics", LIMIT, |status| {
            let age = status.stats.age_ms.map(|ms| Duration::from_millis(ms + 1));
            !status.stats.stale && age.is_some_and(|age| age < asked.elapsed())
        })?;
    }
    let limit = Instant::now() + SETTLE_LIMIT;
    let reported = loop {
        let reported = subject.status()?.stats.values;
        let free_mib = subject.number("free-mib")?;
        let reported_mib = reported.get("free_bytes").copied().unwrap_or_default() / MIB;
        if reported_mib.abs_diff(free_mib) <= FREE_SLACK_MIB {
            break reported;
        }
        // Pages being reported are not free for that moment.
        ensure(Instant::now() < limit, || {
            format!("{reported_mib} MiB are reported free, {free_mib} MiB are free")
        })?;
        std::thread::sleep(Duration::from_millis(STATS_MS));
    };
    subject.client.set_stats(0)?;
    let verified_mib = subject.use_and_verify(USED_MIB, 11)?;
    subject.no_faults()?;
    Ok(Outcome::Passed(format!(
        "{} values, free memory as in /proc/meminfo; {verified_mib} MiB verified",
        reported.len()
    )))
}

pub(super) fn hints(subject: &mut Subject) -> Result<Outcome> {
    subject.run("drop-caches")?;
    let limit = Instant::now() + SETTLE_LIMIT;
    let (hinted_mib, free_mib) = loop {
        let free_mib = subject.number("free-mib")?;
        let hinted_mib = subject.client.hints(LIMIT)?.bytes / MIB;
        let all = hinted_mib * 100 >= free_mib * HINTED_PERCENT;
        if all && hinted_mib <= free_mib + FREE_SLACK_MIB {
            break (hinted_mib, free_mib);
        }
        // Pages being reported are not free for that moment.
        ensure(Instant::now() < limit, || {
            format!("{hinted_mib} of {free_mib} MiB free were hinted")
        })?;
    };
    let verified_mib = subject.use_and_verify(USED_MIB, 12)?;
    subject.no_faults()?;
    Ok(Outcome::Passed(format!(
        "{hinted_mib} of {free_mib} MiB free hinted; {verified_mib} MiB verified"
    )))
}

pub(super) fn poisons(subject: &mut Subject) -> Result<Outcome> {
    let (reported, wanted) = (subject.status()?.guest.poison_val, subject.target().poison_val());
    // QEMU 8.2 drops what the driver writes.
    let passed_on = subject.target().monitor != super::VmmChoice::Qemu;
    ensure(!passed_on || reported == wanted, || {
        format!("the driver reports {reported:?}, not {wanted:?}")
    })?;
    let mut verified_mib = 0;
    for round in 0..3 {
        subject.run(&format!("touch {USED_MIB}"))?;
        subject.balloon(FREED_MIB)?;
        subject.balloon(0)?;
        verified_mib += subject.use_and_verify(USED_MIB, 20 + round)?;
    }
    // All free pages are allocated once. The kernel checks them then.
    let free_mib = subject.number("free-mib")?;
    verified_mib += subject.use_and_verify(free_mib - free_mib / 10, 29)?;
    subject.no_faults()?;
    let value =
        reported.filter(|_| passed_on).map_or("not passed on".to_owned(), |v| format!("{v:#x}"));
    Ok(Outcome::Passed(format!(
        "poison {value}, the kernel found it unchanged; {verified_mib} MiB verified"
    )))
}

pub(super) fn reports(subject: &mut Subject) -> Result<Outcome> {
    subject.run(&format!("fill freed {FREED_MIB} 13"))?;
    let before = subject.status()?;
    subject.run("drop freed")?;
    let freed_at = Instant::now();
    let keeps = subject.target().poison_val().is_some_and(|poison| poison != 0);
    let enough = FREED_MIB * MIB * REPORTED_PERCENT / 100;
    let after = subject.until("reported", REPORTS_LIMIT, |status| {
        if keeps {
            return status.reports.poisoned_bytes >= before.reports.poisoned_bytes + enough;
        }
        let resident = |status: &control::Status| status.resident_bytes.unwrap_or(0);
        resident(status) + enough <= resident(&before)
    })?;
    let took = freed_at.elapsed().as_secs_f64();
    ensure(!keeps || after.reports.released_bytes == 0, || {
        "pages were released in which the kernel expects its poison".to_owned()
    })?;
    let verified_mib = subject.use_and_verify(USED_MIB, 14)?;
    subject.no_faults()?;
    let done = if keeps { "reported, kept for the guest's poison" } else { "returned to the host" };
    Ok(Outcome::Passed(format!(
        "{REPORTED_PERCENT} % of {FREED_MIB} MiB {done} in {took:.1} s; {verified_mib} MiB verified"
    )))
}
