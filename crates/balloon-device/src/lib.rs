//! The host side of the balloon: takes messages off the virtqueues, decodes them
//! to sets of pages, and calls a [`Reclaim`] to release or to keep those.
//!
//! The path of an inflated page: [`BalloonDevice::process_queue`] drains the queue
//! (`drain`), copies each message once (`message`), decodes it to a `PageSet`
//! within guest memory (`decode`), and passes the set to [`Reclaim::release`].
//!
//! The device has no threads, no file descriptors and no timers, so any VMM can
//! embed it. Everything in guest memory is untrusted: it is read once, checked, and
//! never read again.

#![forbid(unsafe_code)]

mod answer;
mod balloon;
mod change;
mod decode;
mod drain;
mod fault;
mod hint;
mod layout;
mod message;
mod named;
mod pending;
mod poison;
mod reclaim;
mod report;
mod request;
mod request_failure;
mod request_queue;
mod stats;
mod totals;

pub use answer::{Answer, Blocks, FreeKind, FreePages};
pub use balloon::{BalloonDevice, BalloonState, Counters, QueueError, StateError};
pub use change::{Change, Stages};
pub use decode::{decode_bitmap, decode_pfn_array};
pub use drain::{Drained, Handled, MAX_BYTES_PER_DRAIN, MAX_CHAINS_PER_DRAIN, drain};
pub use fault::{Fault, Faults};
pub use hint::{HintError, HintPhase, Hinting};
pub use layout::{LayoutError, MemoryLayout};
pub use reclaim::Reclaim;
pub use report::Reports;
pub use request::{DeviceRequest, GuestRequests, Hold, HoldState, MAX_OUTCOMES};
pub use request_failure::{MAX_QUEUED_REQUESTS, RequestFailure, RequestResult, SubmitError};
pub use stats::Stats;
pub use totals::{RequestKind, RequestTotals};
