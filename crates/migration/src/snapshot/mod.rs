//! VM snapshots: the same phases as a migration, with a file in place of a destination.
//!
//! ```text
//! 0            header: magic, version, sizes, checksums                     4096 bytes
//! 4096         memory: page after page, regions without the gaps between;   4096 bytes each
//!              pages that are zeros or were skipped are holes
//! after it     table: a u64 for each page: its checksum, 0 for zeros
//!              description, then state
//! ```
//!
//! The file is written under another name in the same directory, and gets its name when all of it
//! is on disk. So a complete snapshot exists under the name, or none.

mod format;
mod lazy;
mod part;
mod read;
mod write;

#[cfg(feature = "raw")]
pub(crate) use format::seal;
pub use lazy::{LazyRestore, restore_lazily};
pub use read::{Restored, SnapshotFile, restore};
pub use write::{After, snapshot};
