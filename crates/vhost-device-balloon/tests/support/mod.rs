//! A front end and a guest in this process: what a monitor and a driver send,
//! byte for byte, and what they should not.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod driver;
pub(crate) mod front_end;
pub(crate) mod guest;
pub(crate) mod process;
pub(crate) mod requests;
pub(crate) mod server;

use std::time::Duration;

/// Longer than anything here may take; a wait that ends by it has failed.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(20);
