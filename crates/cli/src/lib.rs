//! What the command lines share: how a command fails, prints and shows its progress.

#![forbid(unsafe_code)]

pub mod failure;
pub mod memory_map;
pub mod migration_summary;
pub mod output;
pub mod progress;
