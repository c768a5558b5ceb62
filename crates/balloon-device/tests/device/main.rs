//! Tests of the device with virtqueues in guest memory.

#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test fails on any error"
)]

mod bitmap_messages;
mod classic_messages;
mod descriptors;
mod free_pages;
mod guest;
mod model;
mod requests;
mod requests_model;
mod rings;
mod statistics;
