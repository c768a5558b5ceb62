//! Limits of what a peer may request. Everything is checked before it is allocated.

use std::time::Duration;

/// TCP connections of one migration: more do not help a host with some tens of CPUs.
pub const MAX_CONNECTIONS: usize = 16;

/// Bytes of a name: of a machine, a state section, a CPU vendor.
pub const MAX_NAME_BYTES: usize = 64;

/// Bytes of the VMM's own description; it is copied whole.
pub const MAX_CONFIG_BYTES: usize = 64 << 10;

/// Words of CPU features; x86 has some forty.
pub const MAX_FEATURE_WORDS: usize = 512;

/// Bytes of a frame's body, which is everything except contents of pages and state. The largest is
/// the description.
pub const MAX_BODY_BYTES: usize = 128 << 10;

/// Bytes of a frame's contents: 64 pages.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 4096;

/// Ranges in one fill frame.
pub const MAX_FILL_RANGES: usize = 4096;

/// Sections of a machine's state: vCPUs, devices and a few more.
pub const MAX_STATE_SECTIONS: usize = 1024;

/// Bytes of a machine's state. A vCPU has some 20 KiB. The largest section is the balloon of a
/// guest of 1 TiB with every other page in it, 32 MiB.
pub const MAX_STATE_BYTES: u64 = 64 << 20;

/// Rounds of a migration, the last included. A guest that is not done by then writes faster than it
/// can be copied, or the peer is hostile and would continue infinitely.
pub const MAX_ROUNDS: u32 = 1000;

/// Bytes of an error text in an abort message.
pub const MAX_REASON_BYTES: usize = 512;

/// Default limit of a guest's memory at a destination.
pub const DEFAULT_MAX_MEMORY_BYTES: u64 = 16 << 40;

/// Time without a byte after which a peer counts as dead. A source is silent longest while it
/// queries its guest's free pages.
pub const STALL: Duration = Duration::from_secs(20);

/// The same while the guest is paused.
pub const STALL_PAUSED: Duration = Duration::from_secs(5);

/// Downtime beyond the operator's limit after which the source aborts and resumes the guest: for a
/// peer that is slow but not silent.
pub const PAUSED_BEYOND: Duration = Duration::from_secs(30);

/// Timeout of a frame from its first byte to its last, so that a peer which sends a byte now and
/// then cannot block this side infinitely.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(60);

/// Keepalives on one connection in one round: they arrive some times a second, so this is hours.
pub const MAX_KEEPALIVES: u32 = 100_000;

/// The supported versions, oldest and newest.
pub(crate) const VERSIONS: (u16, u16) = (1, 1);
