//! The guest driver's logic: which blocks to inflate, when to deflate, and how to execute the
//! host's requests. It accesses the kernel through traits, [`PageAllocator`] and [`Queues`] for
//! the balloon, [`RequestKernel`] and [`RequestQueue`] for requests, so the same code runs in a
//! kernel module and in a test.
//!
//! It has no allocation, no locks and no timers: the caller serializes the calls with its own
//! lock, and decides from [`Progress`] when to call again.

#![no_std]
#![forbid(unsafe_code)]

pub mod answer;
mod balloon;
mod encoder;
mod end;
mod hold;
mod hold_request;
mod inbox;
pub mod message;
mod pressure;
mod requests;
mod snapshot;
mod traits;

pub use balloon::{BalloonDriver, Geometry, Progress};
pub use hold::Hold;
pub use inbox::{Inbox, Intake, ReceivedRequest, Stop};
pub use pressure::{hold_floor_pages, shrinkable_pages};
pub use requests::RequestHandler;
pub use traits::{CachePages, Errno, Gone, HeldBlocks, PageAllocator, Queues};
pub use traits::{RequestKernel, RequestQueue, Slice, Zone};
