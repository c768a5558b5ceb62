//! A guest reports its free memory.

use control::Client;
use control::api::{FreeKind, FreePages, FreePagesRequest};
use lab::Guest;
use serde::{Deserialize, Serialize};

use super::{GUEST_MIB, LIMIT, RequestsOptions, UNFRAGMENTED_MIB, meminfo_bytes, start};
use crate::error::{BenchError, Result};
use crate::sample::Spread;
use crate::testbed::Testbed;

/// Page ranges in one command line: the guest's terminal accepts 4 KiB.
const RANGES: usize = 200;

/// State of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Never used.
    Idle,
    /// One page pinned in every second 2 MiB, all other memory free.
    Fragmented,
}

/// Free-page reports of one guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FreePagesReport {
    /// Report or hold.
    pub kind: FreeKind,
    /// State of the guest's memory.
    pub state: State,
    /// Size of the guest.
    pub guest_mib: u64,
    /// From the request to the answer, on the host.
    pub wall_ms: Spread,
    /// The same by the guest's clock.
    pub guest_ms: Spread,
    /// Longest lock hold time of all rounds, in microseconds.
    pub lock_us_max: f64,
    /// Reported memory, in percent of the guest's MemFree: minimum of the rounds.
    pub mem_free_percent: f64,
    /// Reported blocks of all sizes.
    pub blocks: u64,
    /// Reported pages that the guest's /proc/kpageflags does not count as free: maximum of the
    /// rounds. The request itself uses some. Not measured for a hold.
    pub used_pages: u64,
}

pub(super) fn measure(
    options: &RequestsOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<FreePagesReport>> {
    let mut reports = Vec::new();
    for &guest_mib in &options.guest_mib {
        progress(&format!("free pages: booting a guest of {guest_mib} MiB"));
        let (mut fixture, _directory) = start(options, guest_mib)?;
        let mut add = |kind, state, fixture: &mut Testbed| -> Result<()> {
            let report = of_guest(kind, state, guest_mib, options.rounds, fixture)?;
            progress(&format!(
                "{kind:?} of {state:?} {guest_mib} MiB: {:.2} % of MemFree in {:.2} ms",
                report.mem_free_percent, report.wall_ms.median
            ));
            reports.push(report);
            Ok(())
        };
        add(FreeKind::Snapshot, State::Idle, &mut fixture)?;
        add(FreeKind::Hold, State::Idle, &mut fixture)?;
        // It uses all of the guest's memory, so one size is enough.
        if guest_mib == GUEST_MIB {
            fixture.guest.run("insmod lab_memory")?;
            fixture.guest.fragment(UNFRAGMENTED_MIB)?;
            add(FreeKind::Snapshot, State::Fragmented, &mut fixture)?;
            add(FreeKind::Hold, State::Fragmented, &mut fixture)?;
        }
    }
    Ok(reports)
}

#[expect(clippy::cast_precision_loss, reason = "percentages and times")]
fn of_guest(
    kind: FreeKind,
    state: State,
    guest_mib: u64,
    rounds: usize,
    fixture: &mut Testbed,
) -> Result<FreePagesReport> {
    let (mut answers, mut percent, mut used): (Vec<FreePages>, _, _) = (Vec::new(), 100.0f64, 0);
    for _ in 0..rounds {
        let free = meminfo_bytes(fixture, "MemFree")?;
        let answer = request(&fixture.client, kind)?;
        // A hold leaves the requested reserve.
        let left = if kind == FreeKind::Hold { meminfo_bytes(fixture, "MemFree")? } else { 0 };
        let named = answer.total_bytes as f64 * 100.0 / free.saturating_sub(left).max(1) as f64;
        percent = percent.min(named);
        match kind {
            FreeKind::Hold => drop(fixture.client.release_free_pages(LIMIT)?),
            _ => used = used.max(used_pages(&fixture.host.client, &mut fixture.guest)?),
        }
        answers.push(answer);
    }
    let lock_ns = answers.iter().map(|answer| answer.lock_ns_max).max().unwrap_or(0);
    let blocks = answers.last().map_or(0, |last| last.blocks.iter().map(|b| b.count).sum());
    Ok(FreePagesReport {
        kind,
        state,
        guest_mib,
        wall_ms: Spread::of(answers.iter().map(|answer| answer.elapsed_ms)),
        guest_ms: Spread::of(answers.iter().map(|answer| answer.guest_ms)),
        lock_us_max: lock_ns as f64 / 1e3,
        mem_free_percent: percent,
        blocks,
        used_pages: used,
    })
}

/// Requests free pages.
pub(super) fn request(client: &Client, kind: FreeKind) -> Result<FreePages> {
    let timeout_ms = u64::try_from(LIMIT.as_millis()).unwrap_or(u64::MAX);
    let ask = FreePagesRequest { kind, min_block_bytes: None, reserve_bytes: None, timeout_ms };
    Ok(client.request_free_pages(&ask)?)
}

/// Pages of the newest report that the guest's kernel does not count as free.
///
/// # Errors
/// The guest or its back end does not answer as expected.
pub fn used_pages(client: &Client, guest: &mut Guest) -> Result<u64> {
    let mut bitmap = Vec::new();
    let place = client.free_pages_bitmap(&mut bitmap)?;
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for page in (0..place.pages).filter(|page| is_set(&bitmap, *page)) {
        match ranges.last_mut() {
            Some((first, count)) if *first + *count == place.first_page + page => *count += 1,
            _ => ranges.push((place.first_page + page, 1)),
        }
    }
    let mut used = 0;
    for some in ranges.chunks(RANGES) {
        let words: Vec<_> = some.iter().map(|(first, count)| format!("{first},{count}")).collect();
        let command = format!("not-free {}", words.join(" "));
        let answer = guest.run(&command)?.text;
        let number = answer.rsplit_once("used=").and_then(|(_, used)| used.parse::<u64>().ok());
        used += number.ok_or(BenchError::GuestAnswer { command, answer })?;
    }
    Ok(used)
}

fn is_set(bitmap: &[u8], bit: u64) -> bool {
    let byte = usize::try_from(bit / 8).ok().and_then(|at| bitmap.get(at));
    byte.is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
}
