//! Shared by the command-line programs: failures, output and progress.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod failure;
pub mod memory_map;
pub mod migration_summary;
pub mod output;
pub mod progress;
