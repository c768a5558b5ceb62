//! The guest driver's decisions: which blocks to take, what to tell the host,
//! when to give back, how to do what the host asks. The kernel is behind seams,
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
mod seams;
mod snapshot;

pub use balloon::{Balloon, Geometry, Progress};
pub use hold::Hold;
pub use inbox::{Asked, Inbox, Intake, Stop};
pub use pressure::{hold_floor_pages, shrinkable_pages};
pub use requests::Requests;
pub use seams::{CachePages, Errno, Gone, HeldBlocks, Memory, Queues};
pub use seams::{RequestKernel, RequestQueue, Slice, Zone};
