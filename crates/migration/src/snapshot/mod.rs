//! A guest in a file: the same phases as a migration, with a file in place of a destination.
//!
//! ```text
//! 0            head: what, version, where the rest is, check sum            4096 bytes
//! 4096         memory: page after page, regions without the gaps between;   4096 bytes each
//!              pages that are zeros or were skipped are holes
//! behind it    table: a u64 for each page: its check sum, 0 for zeros
//!              description, then state
//! ```
//!
//! The file is written beside its name and gets that when all of it is on disk, so that under its
//! name there is a whole snapshot or none.

mod format;
mod lazy;
mod part;
mod read;
mod write;

#[cfg(feature = "raw")]
pub(crate) use format::seal;
pub use lazy::{Filling, restore_lazily};
pub use read::{Restored, SnapshotFile, restore};
pub use write::{After, snapshot};
