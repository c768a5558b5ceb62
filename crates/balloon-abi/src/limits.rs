//! Limits of the messages. Both sides enforce them: the driver never sends more, and the
//! device refuses more before it allocates.

/// Most bytes of a page-bitmap message. Large enough that a message with 2 MiB granules
/// covers over a TiB, and small enough that a device can copy it out of guest memory before
/// it decodes it.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Most bytes of a message with page numbers. The specification sets no limit; Linux
/// sends 1 KiB. The same limit as for page bitmaps allows a single copy buffer.
pub const MAX_PFN_ARRAY_BYTES: usize = MAX_MESSAGE_BYTES;

/// Most page numbers that the driver sends in a message. Linux sends 256, and some devices
/// (Firecracker) refuse a longer array.
pub const PFNS_PER_MESSAGE: usize = 256;

/// log2 of the smallest block in bytes: one balloon page.
pub const MIN_GRANULE_SHIFT: u32 = crate::page::BALLOON_PAGE_SHIFT;

/// log2 of the largest block in bytes: 1 GiB. The largest buddy block of any Linux
/// configuration is 512 MiB (arm64 with 64 KiB pages). The limit bounds the memory that one
/// bit can name, and so the work that it causes.
pub const MAX_GRANULE_SHIFT: u32 = 30;

/// Most bitmap words in a record (6 bits).
pub const MAX_RECORD_WORDS: usize = 63;

/// Most blocks in a record.
pub const MAX_RECORD_BLOCKS: u64 = MAX_RECORD_WORDS as u64 * 64;

/// First page number that does not fit in a record (52 bits).
pub const MAX_RECORD_PFN: u64 = 1 << 52;
