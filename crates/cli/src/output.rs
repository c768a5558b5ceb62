//! Output of results on standard output.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Prints a text. A closed pipe, as with `head`, is not a failure.
pub fn print(text: &str) -> Result<(), Failure> {
    print_more(text).map(drop)
}

/// Prints a text; returns false if the reader has closed the pipe.
pub fn print_more(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::new(&error, "check the target of standard output")),
    }
}

/// Prints a value as JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&json(value)?)
}

/// Formats a value as JSON, ending in a line feed.
pub fn json(value: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|error| Failure::new(&error, "please report this as a bug in aerostat"))
}

/// Formats a count with its noun: `1 message`, `2 messages`.
pub fn plural(count: u64, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}
