//! Limits of the page-bitmap messages. Both sides enforce them: the driver by
//! never sending more, the device by refusing more before it allocates.

/// Bytes of one page-bitmap message. Large enough that one message of 2 MiB
/// granules covers over a tebibyte, small enough that a device may copy it
/// out of guest memory before it looks at it.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Bytes of one message with page numbers. The specification sets no limit;
/// Linux sends 1 KiB. The same bound as for page bitmaps keeps one copy buffer.
pub const MAX_PFN_ARRAY_BYTES: usize = MAX_MESSAGE_BYTES;

/// Page numbers a driver puts into one message. Linux has always sent 256, and
/// some devices (Firecracker) refuse a longer array.
pub const PFNS_PER_MESSAGE: usize = 256;

/// log2 of the smallest block in bytes: one balloon page.
pub const MIN_GRANULE_SHIFT: u32 = crate::page::BALLOON_PAGE_SHIFT;

/// log2 of the largest block in bytes: 1 GiB. The largest buddy block of any
/// Linux configuration is 512 MiB (arm64 with 64 KiB pages); the bound keeps
/// what one bit can claim, and so the work it can cause, finite.
pub const MAX_GRANULE_SHIFT: u32 = 30;

/// Bitmap words a record may carry: what six bits can say.
pub const MAX_RECORD_WORDS: usize = 63;

/// Blocks a record with a full bitmap covers.
pub const MAX_RECORD_BLOCKS: u64 = MAX_RECORD_WORDS as u64 * 64;

/// First page number that a record cannot name (52 bits).
pub const MAX_RECORD_PFN: u64 = 1 << 52;
