//! What the command lines share: how a command fails, prints and shows its progress.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod failure;
pub mod memory_map;
pub mod migration_summary;
pub mod output;
pub mod progress;
