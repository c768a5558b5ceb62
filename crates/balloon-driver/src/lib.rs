//! The guest driver's decisions: which blocks to take, what to tell the host,
//! when to give back, how to do what the host asks. The kernel is behind traits,
//! [`Memory`] and [`Queues`] for the balloon, [`RequestKernel`] and
//! [`RequestQueue`] for requests, so the same code runs in a module and in a test.
//!
//! No allocation, no locks, no time: the caller holds its own lock around every
//! call, and decides from [`Progress`] when to call again.

#![no_std]
#![forbid(unsafe_code)]

pub mod answer;
mod balloon;
mod encoder;
mod hold;
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
