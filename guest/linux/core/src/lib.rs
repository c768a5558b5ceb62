//! The balloon driver as the kernel module links it.
//!
//! [`entry`] and [`requests`] are what the C shim calls, [`kernel`] and
//! [`request_kernel`] are what it provides. All is declared once more in
//! `aerostat_core.h`, for the C compiler.
//!
//! Every call of [`entry`] happens with the shim's balloon mutex held, except
//! where an entry point says that it touches no state.

#![no_std]

pub mod entry;
mod kernel;
#[cfg(target_os = "none")]
mod panic;
mod request_kernel;
pub mod requests;
