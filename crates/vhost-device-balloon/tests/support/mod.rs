//! A front end and a guest in this process, which send the messages of a VMM and a driver,
//! or invalid ones.
#![allow(dead_code, reason = "each test binary uses only a part")]

pub(crate) mod driver;
pub(crate) mod front_end;
pub(crate) mod guest;
pub(crate) mod process;
pub(crate) mod requests;
pub(crate) mod server;

use std::time::Duration;

/// Time limit of every wait: a timeout is a failure.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(20);
