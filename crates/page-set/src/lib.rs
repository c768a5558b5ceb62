//! A set of 4 KiB pages, used by all crates of the project.
//!
//! The device decodes a guest's messages into a [`PageSet`], the reclaimer releases
//! one, a migration subtracts one. The set does not depend on virtio, files or guests:
//! a page is a number below 2^52.
//!
//! # Structure
//! A radix bitmap of three levels. 1 GiB *slabs* are in an ordered map. A slab has one
//! bit for each of its 512 *chunks* of 2 MiB that is full; only a partly filled chunk
//! has a bitmap of its 512 pages. A full slab has only its map entry.
//!
//! # Cost
//! - Memory for each TiB spanned: at most 32 MiB of page bitmaps (1/32768, when no
//!   chunk is empty or full) plus 0.3 MiB for slabs; about 24 KiB if everything is
//!   full.
//! - Inserting or removing a range: O(log n) for each 1 GiB slab it overlaps, whole
//!   chunks by words; an empty or full slab costs one map entry.
//! - [`PageSet::insert_bitmap`]: linear in the words.
//! - [`PageSet::len`] and [`PageSet::full_chunk_pages`] are stored, not counted.
//!
//! Inserting does not limit the size: a range of 2^40 pages creates 2^22 map entries
//! (some 100 MiB), so check a peer's range against the memory that exists
//! ([`PageRange::is_within`]) before inserting it. The cost of removals and queries
//! depends only on the contents of the set, not on the range.

#![forbid(unsafe_code)]

mod bitmap;
mod bits;
mod error;
mod range;
mod set;
mod slab;
mod take;

pub use error::PageSetError;
pub use range::{PAGE_NUMBER_END, PageRange};
pub use set::{PageSet, Ranges};

/// Size of a page in bytes, independent of the host's page size.
pub const PAGE_BYTES: u64 = 4096;

/// Pages in a chunk: 2 MiB, an x86 huge page.
pub const CHUNK_PAGES: u64 = slab::CHUNK_PAGES as u64;

/// Pages in a slab: 1 GiB.
pub const SLAB_PAGES: u64 = slab::SLAB_PAGES as u64;
