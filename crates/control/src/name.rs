//! Names of guests.

use std::fmt;
use std::str::FromStr;

use crate::error::ControlError;

/// Longest name, in bytes. Long enough for a UUID with a prefix, short enough
/// to leave 40 of the 108 bytes of a socket address to the directory.
pub const MAX_NAME_BYTES: usize = 64;

/// A guest's name. It is used as a file name, so it has no character that is special to a path or
/// a shell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestName(String);

impl GuestName {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestName {
    type Err = ControlError;

    fn from_str(name: &str) -> Result<Self, ControlError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let why = if name.is_empty() {
            "it is empty"
        } else if name.len() > MAX_NAME_BYTES {
            "it is too long"
        } else if !name.chars().all(allowed) {
            "it has an invalid character"
        } else if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            "it does not begin with a letter or a digit"
        } else {
            return Ok(Self(name.into()));
        };
        Err(ControlError::BadName { name: name.into(), why })
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_valid_file_names_are_accepted() {
        for name in ["a", "0", "web-1", "db.prod_2", &"x".repeat(MAX_NAME_BYTES)] {
            assert_eq!(name.parse::<GuestName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        for name in ["", ".", "..", ".hidden", "-x", "_x", "a/b", "/a", "a b", "a\0", "ä", &long] {
            assert!(name.parse::<GuestName>().is_err(), "{name:?}");
        }
    }
}
