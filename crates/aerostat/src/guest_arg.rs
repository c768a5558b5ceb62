//! Guest argument: a name, or the path of a control socket.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use control::api::MAX_TIMEOUT_MS;
use control::{Client, ControlError, GuestName, socket_path};

use cli::failure::Failure;
use humantime::format_duration;

/// A guest as given on the command line.
#[derive(Clone, Debug)]
pub(crate) enum GuestArg {
    /// A guest whose socket is in the runtime directory.
    Name(GuestName),
    /// A socket anywhere; recognised by a slash.
    Socket(PathBuf),
}

impl FromStr for GuestArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Socket(text.into()));
        }
        guest_name(text).map(Self::Name)
    }
}

/// Parses a guest name.
pub(crate) fn guest_name(text: &str) -> Result<GuestName, String> {
    text.parse().map_err(|error: ControlError| format!("{error}; {}", error.hint()))
}

/// Parses the timeout of a request to the guest.
pub(crate) fn guest_timeout(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let limit = Duration::from_millis(MAX_TIMEOUT_MS);
    if time > limit {
        return Err(format!("the timeout can be at most {}", format_duration(limit)));
    }
    Ok(time)
}

impl GuestArg {
    /// Connects to the guest's control socket.
    pub(crate) fn connect(&self) -> Result<Client, Failure> {
        let path = match self {
            Self::Name(name) => socket_path(name)?,
            Self::Socket(path) => path.clone(),
        };
        Ok(Client::connect(&path)?)
    }
}

impl std::fmt::Display for GuestArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}
