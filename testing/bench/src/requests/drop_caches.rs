//! A guest that has read a large file drops its cache.

use std::fs::File;

use control::api::Caches;
use lab::Scratch;
use serde::{Deserialize, Serialize};

use super::{GUEST_MIB, LIMIT, MIB, RequestsOptions, meminfo_bytes, off_percent, start};
use crate::error::{Result, host};
use crate::sample::Spread;
use crate::testbed::Testbed;

/// Size of the file.
const FILE_MIB: u64 = 2048;

/// Dropping the cache of one large file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DropCachesReport {
    /// Size of the guest.
    pub guest_mib: u64,
    /// Size of the file.
    pub file_mib: u64,
    /// From the request to the answer, on the host.
    pub wall_ms: Spread,
    /// The same by the guest's clock.
    pub guest_ms: Spread,
    /// Dropped page cache, in percent of the file: minimum of the rounds.
    pub freed_percent: f64,
    /// Rise of the guest's MemFree, in percent of the file: minimum of the rounds.
    pub mem_free_rise_percent: f64,
    /// Difference of the answer and the guest's /proc/meminfo: maximum of the rounds.
    pub meminfo_off_percent: f64,
}

pub(super) fn measure(
    options: &RequestsOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<DropCachesReport> {
    progress(&format!("drop caches: booting a guest of {GUEST_MIB} MiB"));
    let (mut fixture, _directory) = start(options, GUEST_MIB)?;
    let _files = mount_file(&mut fixture)?;
    let mut rounds = Vec::new();
    for round in 1..=options.rounds {
        let done = one_round(&mut fixture)?;
        progress(&format!(
            "round {round}, drop caches: {:.1} % of {FILE_MIB} MiB in {:.1} ms",
            done.freed_percent, done.wall_ms
        ));
        rounds.push(done);
    }
    let least = |of: fn(&Round) -> f64| rounds.iter().map(of).fold(f64::INFINITY, f64::min);
    let most = |of: fn(&Round) -> f64| rounds.iter().map(of).fold(0.0, f64::max);
    Ok(DropCachesReport {
        guest_mib: GUEST_MIB,
        file_mib: FILE_MIB,
        wall_ms: Spread::of(rounds.iter().map(|round| round.wall_ms)),
        guest_ms: Spread::of(rounds.iter().map(|round| round.guest_ms)),
        freed_percent: least(|round| round.freed_percent),
        mem_free_rise_percent: least(|round| round.mem_free_rise_percent),
        meminfo_off_percent: most(|round| round.meminfo_off_percent),
    })
}

struct Round {
    wall_ms: f64,
    guest_ms: f64,
    freed_percent: f64,
    mem_free_rise_percent: f64,
    meminfo_off_percent: f64,
}

#[expect(clippy::cast_precision_loss, reason = "percentages of bytes")]
fn one_round(fixture: &mut Testbed) -> Result<Round> {
    read_file(fixture)?;
    let (cached, free) = (cache_bytes(fixture)?, meminfo_bytes(fixture, "MemFree")?);
    let dropped = fixture.client.drop_caches(Caches::All, LIMIT)?;
    let (cached_after, free_after) = (cache_bytes(fixture)?, meminfo_bytes(fixture, "MemFree")?);
    let of_file = |bytes: u64| bytes as f64 * 100.0 / (FILE_MIB * MIB) as f64;
    let freed_by_meminfo = cached.saturating_sub(cached_after);
    Ok(Round {
        wall_ms: dropped.elapsed_ms,
        guest_ms: dropped.guest_ms,
        freed_percent: of_file(dropped.page_cache.freed_bytes),
        mem_free_rise_percent: of_file(free_after.saturating_sub(free)),
        meminfo_off_percent: off_percent(dropped.page_cache.freed_bytes, freed_by_meminfo),
    })
}

/// Mounts a large file in the guest. Dropping the result removes it.
pub(super) fn mount_file(fixture: &mut Testbed) -> Result<Scratch> {
    let files = Scratch::new("files")?;
    let file = File::create(files.path().join("cached")).map_err(host("making a file"))?;
    file.set_len(FILE_MIB * MIB).map_err(host("making a file"))?;
    fixture.guest.run(&format!("mount-host {}", files.path().display()))?;
    Ok(files)
}

/// Makes the guest read it.
pub(super) fn read_file(fixture: &mut Testbed) -> Result<()> {
    fixture.guest.run(&format!("read-file /host/cached {FILE_MIB}"))?;
    Ok(())
}

/// Droppable file cache of the guest.
fn cache_bytes(fixture: &mut Testbed) -> Result<u64> {
    let files = meminfo_bytes(fixture, "Cached")? + meminfo_bytes(fixture, "Buffers")?;
    Ok(files.saturating_sub(meminfo_bytes(fixture, "Shmem")?))
}
