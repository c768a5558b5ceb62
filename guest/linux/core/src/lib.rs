//! The Rust core of the kernel module.
//!
//! [`entry`] and [`requests`] are called by the C shim. [`kernel`] and
//! [`request_kernel`] call the shim. `aerostat_core.h` declares all of these functions for C.
//!
//! The functions of [`entry`] are called with the shim's balloon mutex held, unless their
//! documentation says that they access no state.

#![no_std]

pub mod entry;
mod kernel;
#[cfg(target_os = "none")]
mod panic;
mod request_kernel;
pub mod requests;
