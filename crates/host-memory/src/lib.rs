//! Releasing and counting the host memory that backs a guest.
//!
//! A [`MemoryMap`] maps guest pages to the files or mappings that back them. It
//! implements [`Discard`]: it releases the memory of a [`PageSet`] to the host with
//! the fewest system calls. A [`Reclaimer`] does so in the background, merged over
//! many requests, and guarantees that a page which the guest takes back is never
//! discarded afterwards ([`Reclaimer::retain`]). [`resident`] measures the memory
//! that the host spends.
//!
//! This crate does not depend on virtio or any queue.
//!
//! A "page" is 4 KiB and page numbers are guest physical addresses divided by
//! 4096, whatever the host's page size is.
//!
//! [`PageSet`]: page_set::PageSet

#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod advise;
mod backed;
mod bus_error;
mod collapse;
mod counters;
mod discard;
mod error;
mod host_pages;
mod huge;
mod lazy;
mod map;
mod observe;
mod partial;
mod pending;
mod reclaimer;
mod region;
mod reserve;
pub mod resident;

pub use backed::BackedMemory;
pub use bus_error::log_bus_errors;
pub use counters::ReclaimerCounters;
pub use discard::{Discard, DiscardCall, DiscardFailure, DiscardReport, KEPT_FAILURES};
pub use error::HostMemoryError;
pub use host_pages::HostPages;
pub use huge::{Huge, advise_huge, huge_by_default};
pub use lazy::{MissingPages, Placed};
pub use map::{MemoryMap, OutsideMemory, Piece, Pieces};
pub use observe::ObserveDiscards;
pub use partial::PartialHuge;
pub use pending::{Batch, PendingRelease, Retained, Take};
pub use reclaimer::{
    BATCH_PAGES, PARTIAL_LIMIT_PAGES, QUIET_MS, Reclaimer, ReclaimerOptions, ReleaseMode,
    SWEEP_INTERVAL_MAX_MS, SWEEP_INTERVAL_MS, WAKE_PAGES,
};
pub use region::{AnonymousMemory, Backing, Region};
pub use reserve::{HugePool, reserve_file};
