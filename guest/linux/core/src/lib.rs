//! The balloon driver as the kernel module links it.
//!
//! [`entry`] is what the C glue calls, [`kernel`] is what it provides. Both
//! sides are declared once more in `aerostat_core.h`, for the C compiler.
//!
//! Every call happens with the glue's balloon mutex held, except where an entry
//! point says that it touches no state.

#![no_std]

pub mod entry;
mod kernel;
#[cfg(target_os = "none")]
mod panic;
