//! Wire formats of the virtio balloon (device type 5) and of Aerostat's extensions,
//! shared by the guest driver and the host device.
//!
//! Specified in virtio 1.3, section 5.5, and in `docs/protocol.md`. This crate only
//! encodes and decodes. It does not allocate and depends only on `core`, because it also
//! runs inside a kernel.

#![no_std]
#![forbid(unsafe_code)]

pub mod config;
pub mod feature;
pub mod hint;
pub mod limits;
pub mod page;
pub mod pfn_array;
pub mod queue;
pub mod record;
pub mod request;
pub mod stats;
pub mod status;

pub use config::{ConfigSpace, Field, WriteError};
pub use feature::Features;
pub use hint::{HintCommand, HintId};
pub use page::{BALLOON_PAGE_BYTES, BALLOON_PAGE_SHIFT, Pfn};
pub use queue::{QueueLayout, Vq};
pub use record::{Record, RecordError, RecordHeader, Records};
pub use request::{AnswerHeader, Caches, Command, Outcome, Request, RequestError};
pub use stats::{Stat, StatTag};
pub use status::MessageStatus;

/// Virtio device type of the traditional memory balloon (virtio 1.3, section 5).
pub const DEVICE_TYPE_BALLOON: u32 = 5;
