//! Checks of requests to our driver.

use control::api::{Caches, FreeKind, FreePagesRequest, HoldState};

use super::Outcome;
use super::subject::{CACHED_MIB, LIMIT, MIB, Subject, ensure};
use crate::error::Result;
use crate::requests::used_pages;

/// Memory that is filled and verified, in MiB.
const USED_MIB: u64 = 250;

/// Free memory that a hold leaves.
const RESERVE_MIB: u64 = 150;

/// Tolerance of the guest's free memory, which changes meanwhile.
const SLACK_MIB: u64 = 8;

/// Pages that the guest may allocate meanwhile.
const NOISE_PAGES: u64 = 1024;

pub(super) fn drops_caches(subject: &mut Subject) -> Result<Outcome> {
    subject.until("ready for requests", LIMIT, |status| status.requests.possible)?;
    subject.read_file()?;
    let dropped = subject.client.drop_caches(Caches::All, LIMIT)?;
    let freed_mib = dropped.page_cache.freed_bytes / MIB;
    ensure(freed_mib * 100 >= CACHED_MIB * 98, || {
        format!("{freed_mib} of a file of {CACHED_MIB} MiB were freed")
    })?;
    let verified_mib = subject.use_and_verify(USED_MIB, 31)?;
    subject.no_faults()?;
    Ok(Outcome::Passed(format!(
        "{freed_mib} MiB for a file of {CACHED_MIB} in {:.1} ms; {verified_mib} MiB verified",
        dropped.elapsed_ms
    )))
}

pub(super) fn reports_free_pages(subject: &mut Subject) -> Result<Outcome> {
    let free_mib = subject.number("free-mib")?;
    let named = subject.client.request_free_pages(&request(FreeKind::Snapshot, None))?;
    let named_mib = named.total_bytes / MIB;
    ensure(named_mib.abs_diff(free_mib) <= SLACK_MIB, || {
        format!("{named_mib} MiB were reported, {free_mib} MiB are free")
    })?;
    let client = subject.second_client()?;
    let used = used_pages(&client, subject.guest())?;
    ensure(used <= NOISE_PAGES, || format!("{used} reported pages are in use"))?;
    let verified_mib = subject.use_and_verify(USED_MIB, 32)?;
    subject.no_faults()?;
    Ok(Outcome::Passed(format!(
        "{named_mib} of {free_mib} MiB free in {:.1} ms, {used} pages of them in use since; {verified_mib} MiB verified",
        named.elapsed_ms
    )))
}

pub(super) fn holds_free_pages(subject: &mut Subject) -> Result<Outcome> {
    let reserve = Some(RESERVE_MIB * MIB);
    let held = subject.client.request_free_pages(&request(FreeKind::Hold, reserve))?;
    let left_mib = subject.number("free-mib")?;
    ensure(left_mib.abs_diff(RESERVE_MIB) <= SLACK_MIB, || format!("{left_mib} MiB were left"))?;
    // An allocation beyond that ends the hold.
    let verified_mib = subject.use_and_verify(USED_MIB, 33)?;
    let hold = subject.status()?.requests.hold;
    ensure(hold != Some(HoldState::Kept), || {
        "the hold still exists after the guest needed its memory".to_owned()
    })?;
    let held_mib = held.total_bytes / MIB;
    let again = subject.client.request_free_pages(&request(FreeKind::Hold, reserve))?;
    let released = subject.client.release_free_pages(LIMIT)?;
    ensure(released.released_bytes == again.total_bytes, || format!("{released:?}"))?;
    subject.no_faults()?;
    Ok(Outcome::Passed(format!(
        "{held_mib} MiB held, taken back by the guest, held again and released; {verified_mib} MiB verified"
    )))
}

fn request(kind: FreeKind, reserve_bytes: Option<u64>) -> FreePagesRequest {
    let timeout_ms = u64::try_from(LIMIT.as_millis()).unwrap_or(u64::MAX);
    FreePagesRequest { kind, min_block_bytes: None, reserve_bytes, timeout_ms }
}
