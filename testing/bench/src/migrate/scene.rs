//! State of the guest's memory before a migration, and its verification afterwards.

use lab::Guest;

use page_set::PAGE_BYTES;

use super::{GuestState, Scenario};
use crate::error::{BenchError, Result};
use crate::kvm::{GuestFiles, command, number};

/// File that is kept in all states, and new file after the migration, in MiB.
const KEPT_MIB: u64 = 32;
const NEW_MIB: u64 = 64;

/// Memory that is written and freed, in percent of the guest, and its limit of free memory.
const DIRTIED_PERCENT: u64 = 85;
const FREE_PERCENT: u64 = 90;

/// Size of the page cache, and its device.
const CACHED_MIB: u64 = 256;
const DEVICE: &str = "/dev/zram0";

/// Maximum memory of the write load.
const LOAD_MIB: u64 = 16;

/// Seed of the patterns.
const SEED: u64 = 1;

/// Sets the guest's state. Returns its used memory that is not zero, in bytes.
pub(super) fn set(guest: &mut Guest, scenario: Scenario, files: &GuestFiles) -> Result<u64> {
    command(guest, &format!("fill kept {KEPT_MIB} {SEED}"))?;
    if matches!(scenario.state, GuestState::DirtiedThenFreed | GuestState::PageCache) {
        let free_mib = number(guest, "free-mib")?;
        let most_mib = scenario.guest_mib * DIRTIED_PERCENT / 100;
        command(guest, &format!("touch {}", most_mib.min(free_mib * FREE_PERCENT / 100)))?;
    }
    match scenario.state {
        GuestState::Fresh | GuestState::DirtiedThenFreed => {}
        GuestState::PageCache => {
            files.load_zram(guest)?;
            command(guest, &format!("write /sys/block/zram0/disksize {CACHED_MIB}M"))?;
            command(guest, &format!("fill-device {DEVICE} {CACHED_MIB} {SEED}"))?;
        }
        GuestState::WriteLoad => drop(command(guest, &format!("churn {LOAD_MIB} {SEED}"))?),
    }
    let answer = command(guest, "in-use")?;
    let held = answer.split_whitespace().find_map(|word| word.strip_prefix("held=")?.parse().ok());
    let held: Option<u64> = held;
    let odd = || BenchError::GuestAnswer { command: "in-use".to_owned(), answer: answer.clone() };
    Ok(held.ok_or_else(odd)? * PAGE_BYTES)
}

/// Verifies all memory that the guest wrote, and makes it use free memory.
pub(super) fn verify(guest: &mut Guest, scenario: Scenario) -> Result<()> {
    if scenario.state == GuestState::WriteLoad {
        let answer = command(guest, "calm")?;
        if !answer.ends_with(" wrong=0") || answer.starts_with("pages=0 ") {
            return Err(BenchError::GuestAnswer { command: "calm".to_owned(), answer });
        }
    }
    all_right(guest, &format!("verify kept {KEPT_MIB} {SEED}"))?;
    if scenario.state == GuestState::PageCache {
        all_right(guest, &format!("verify-device {DEVICE} {CACHED_MIB} {SEED}"))?;
    }
    command(guest, &format!("fill new {NEW_MIB} {}", SEED + 1))?;
    all_right(guest, &format!("verify new {NEW_MIB} {}", SEED + 1))
}

fn all_right(guest: &mut Guest, line: &str) -> Result<()> {
    match number(guest, line)? {
        0 => Ok(()),
        wrong => Err(BenchError::Wrong {
            what: format!(
                "{wrong} wrong after the migration, by `{line}`\n{}",
                guest.console_log()
            ),
        }),
    }
}
