//! What an operator does with requests, once: look, drop caches, take memory, look.

use control::BalloonChange;
use control::api::{Caches, DroppedCaches, FreeKind, FreePages};

use super::drop_caches::{mount_file, read_file};
use super::free_pages::ask;
use super::{GUEST_MIB, LIMIT, RequestsOptions, start};
use crate::error::Result;

/// Balloon pages in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// What was seen on the way.
#[derive(Clone, Debug)]
pub struct Tour {
    /// Size of the guest.
    pub guest_mib: u64,
    /// Free memory once the guest had read a large file.
    pub cached: FreePages,
    /// What dropping its caches did.
    pub dropped: DroppedCaches,
    /// Free memory after that.
    pub after: FreePages,
    /// Taking three quarters of the guest's memory then.
    pub inflated: BalloonChange,
    /// Free memory in the end.
    pub end: FreePages,
}

/// Goes through it on a guest with our driver; `progress` hears of each step.
///
/// # Errors
/// The first thing that went wrong.
pub fn tour(options: &RequestsOptions, progress: &mut dyn FnMut(&str)) -> Result<Tour> {
    progress(&format!("booting a guest of {GUEST_MIB} MiB"));
    let (mut fixture, _directory) = start(options, GUEST_MIB)?;
    let _files = mount_file(&mut fixture)?;
    progress("the guest reads a file");
    read_file(&mut fixture)?;
    let cached = ask(&fixture.client, FreeKind::Snapshot)?;
    let dropped = fixture.client.drop_caches(Caches::All, LIMIT)?;
    let after = ask(&fixture.client, FreeKind::Snapshot)?;
    let target_mib = u32::try_from(GUEST_MIB * 3 / 4).unwrap_or(u32::MAX);
    let inflated = fixture.inflate_to(target_mib.saturating_mul(PAGES_PER_MIB))?;
    let end = ask(&fixture.client, FreeKind::Snapshot)?;
    Ok(Tour { guest_mib: GUEST_MIB, cached, dropped, after, inflated, end })
}
