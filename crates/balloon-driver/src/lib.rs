//! The guest driver's decisions: which blocks to take, what to tell the host,
//! when to give back. The kernel is behind two seams, [`Memory`] and
//! [`Queues`], so the same code runs in a module and in a test.
//!
//! No allocation, no locks, no time: the caller holds its own lock around every
//! call, and decides from [`Progress`] when to call again.

#![no_std]
#![forbid(unsafe_code)]

mod balloon;
mod encoder;
pub mod message;
mod pressure;
mod seams;

pub use balloon::{Balloon, Geometry, Progress};
pub use pressure::shrinkable_pages;
pub use seams::{Gone, Memory, Queues};
