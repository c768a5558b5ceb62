//! The device behind real virtqueues in real guest memory.

mod bitmap_messages;
mod classic_messages;
mod descriptors;
mod guest;
mod model;
mod rings;
