//! An operator's use of requests: report, drop caches, inflate, report.

use control::BalloonChange;
use control::api::{Caches, DroppedCaches, FreeKind, FreePages};

use super::drop_caches::{mount_file, read_file};
use super::free_pages::request;
use super::{GUEST_MIB, LIMIT, RequestsOptions, start};
use crate::error::Result;

/// Balloon pages in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// Results of the steps.
#[derive(Clone, Debug)]
pub struct Tour {
    /// Size of the guest.
    pub guest_mib: u64,
    /// Free memory after the guest has read a large file.
    pub cached: FreePages,
    /// Result of dropping its caches.
    pub dropped: DroppedCaches,
    /// Free memory after that.
    pub after: FreePages,
    /// Inflating to three quarters of the guest's memory.
    pub inflated: BalloonChange,
    /// Free memory at the end.
    pub end: FreePages,
}

/// Runs the steps on a guest with our driver. Calls `progress` with each one.
///
/// # Errors
/// A step fails.
pub fn tour(options: &RequestsOptions, progress: &mut dyn FnMut(&str)) -> Result<Tour> {
    progress(&format!("booting a guest of {GUEST_MIB} MiB"));
    let (mut fixture, _directory) = start(options, GUEST_MIB)?;
    let _files = mount_file(&mut fixture)?;
    progress("the guest reads a file");
    read_file(&mut fixture)?;
    let cached = request(&fixture.client, FreeKind::Snapshot)?;
    let dropped = fixture.client.drop_caches(Caches::All, LIMIT)?;
    let after = request(&fixture.client, FreeKind::Snapshot)?;
    let target_mib = u32::try_from(GUEST_MIB * 3 / 4).unwrap_or(u32::MAX);
    let inflated = fixture.inflate_to(target_mib.saturating_mul(PAGES_PER_MIB))?;
    let end = request(&fixture.client, FreeKind::Snapshot)?;
    Ok(Tour { guest_mib: GUEST_MIB, cached, dropped, after, inflated, end })
}
