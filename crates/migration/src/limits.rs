//! How much a peer may ask of us. Everything is checked before it is allocated.

use std::time::Duration;

/// TCP connections of one migration: more do not help a machine that has some tens of processors.
pub const MAX_CONNECTIONS: usize = 16;

/// Bytes of a name: of a machine, a part of its state, a maker of processors.
pub const MAX_NAME_BYTES: usize = 64;

/// Bytes of a machine's own description; it is copied whole.
pub const MAX_CONFIG_BYTES: usize = 64 << 10;

/// Words of processor features; x86 has some forty.
pub const MAX_FEATURE_WORDS: usize = 512;

/// Bytes of a frame's body, which is everything but contents of pages and state. The largest is
/// the description.
pub const MAX_BODY_BYTES: usize = 128 << 10;

/// Bytes of a frame's contents: 64 pages.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 4096;

/// Ranges in one frame that says what free pages are filled with.
pub const MAX_FILL_RANGES: usize = 4096;

/// Parts of a machine's state: processors, devices and a few more.
pub const MAX_STATE_SECTIONS: usize = 1024;

/// Bytes of a machine's state. Processors have some 20 KiB each; the largest is the balloon of a
/// guest of 1 TiB whose every other page is in it, 32 MiB.
pub const MAX_STATE_BYTES: u64 = 64 << 20;

/// Rounds of a migration, the last included. Whoever is not done by then writes faster than it can
/// be copied, or wants to keep us busy for ever.
pub const MAX_ROUNDS: u32 = 1000;

/// Bytes of an error's text that is told to the peer.
pub const MAX_REASON_BYTES: usize = 512;

/// Memory that a guest may have if a destination sets no limit of its own.
pub const DEFAULT_MAX_MEMORY_BYTES: u64 = 16 << 40;

/// Time without a byte after which a peer counts as gone. The longest that a source is silent is
/// while its guest is asked for free pages.
pub const STALL: Duration = Duration::from_secs(20);

/// The same while the guest is paused.
pub const STALL_PAUSED: Duration = Duration::from_secs(5);

/// Time for which a guest may stand still beyond what its operator allows: a peer that is slow, but
/// not silent, is given up then, and the guest goes on.
pub const PAUSED_BEYOND: Duration = Duration::from_secs(30);

/// Time that a frame may take from its first byte to its last, so that a peer which sends a byte
/// now and then does not hold us for ever.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(60);

/// Signs of life on one connection in one round: they come some times a second, so this is hours.
pub const MAX_KEEPALIVES: u32 = 100_000;
