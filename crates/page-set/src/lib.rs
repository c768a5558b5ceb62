//! A set of 4 KiB pages, the one form in which pages travel through the house.
//!
//! The device decodes a guest's messages into a [`PageSet`], the reclaimer
//! releases from one, a migration subtracts one. The set knows nothing of
//! virtio, files or guests: a page is a number below 2^52.
//!
//! # Shape
//! A radix bitmap of three levels. 1 GiB *slabs* lie in an ordered map. A slab
//! has one bit for each of its 512 *chunks* of 2 MiB that is full; only a chunk
//! that is partly filled has a bitmap of its 512 pages. A slab of which every
//! page is in carries nothing but its map entry.
//!
//! # Cost
//! - Memory for each TiB spanned: at most 32 MiB of page bitmaps (1/32768, when
//!   no chunk is empty or full) plus 0.3 MiB for slabs; about 24 KiB where
//!   everything is full.
//! - Inserting or removing a range: O(log n) for each 1 GiB slab it touches,
//!   whole chunks at word speed; a vacant or full slab costs one map entry.
//! - [`PageSet::insert_bitmap`]: linear in the words.
//! - [`PageSet::len`] and [`PageSet::full_chunk_pages`] are kept, not counted.
//!
//! The set trusts its caller for size: a range of 2^40 pages makes 2^22 map
//! entries (some 100 MiB), so check a peer's range against the memory that exists
//! ([`PageRange::is_within`]) before it is inserted. Removing and asking cost
//! only what the set holds, whatever range they are given.

#![forbid(unsafe_code)]

mod bitmap;
mod bits;
mod error;
mod range;
mod ranges;
mod set;
mod slab;
mod take;

pub use error::PageSetError;
pub use range::{PAGE_NUMBER_END, PageRange};
pub use ranges::Ranges;
pub use set::PageSet;

/// Size of a page, in bytes, whatever the host's page is.
pub const PAGE_BYTES: u64 = 4096;

/// Pages in a chunk: 2 MiB, an x86 huge page.
pub const CHUNK_PAGES: u64 = slab::CHUNK_PAGES as u64;

/// Pages in a slab: 1 GiB.
pub const SLAB_PAGES: u64 = slab::SLAB_PAGES as u64;
