//! The line protocol with the host.
//!
//! The host writes `ID COMMAND ARGUMENT...`, one line a command. The guest answers with any number
//! of `@lab ID | TEXT` lines and then exactly one `@lab ID ok TEXT` or `@lab ID err TEXT`. The
//! marker separates answers from kernel messages. The id separates the answer to a command that
//! timed out from the next one. The guest sends id 0: when it is ready, or after a line that it
//! cannot parse.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};

use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// Start of every answer.
const MARKER: &str = "@lab";

/// Environment variable from the kernel command line: the terminal, such as `ttyS1`.
const TERMINAL_VARIABLE: &str = "LAB_CONSOLE";

/// Default terminal: the first one of User Mode Linux.
const DEFAULT_TERMINAL: &str = "tty0";

/// One command of the host.
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) words: Vec<String>,
}

/// The terminal to the host.
pub(crate) struct Console {
    input: BufReader<File>,
    output: File,
}

impl Console {
    /// Opens the terminal and makes it raw.
    pub(crate) fn open() -> Result<Self, String> {
        let name = std::env::var(TERMINAL_VARIABLE).unwrap_or_else(|_| DEFAULT_TERMINAL.to_owned());
        let path = format!("/dev/{name}");
        let terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| format!("cannot open {path}: {error}"))?;
        let mut settings =
            tcgetattr(&terminal).map_err(|error| format!("{path} is no terminal: {error}"))?;
        settings.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &settings)
            .map_err(|error| format!("cannot make {path} raw: {error}"))?;
        let output = terminal.try_clone().map_err(|error| error.to_string())?;
        Ok(Self { input: BufReader::new(terminal), output })
    }

    /// Waits for the next command; `None` when the host has closed the console.
    ///
    /// A line without an id is answered here, with id 0.
    pub(crate) fn next_request(&mut self) -> Result<Option<Request>, String> {
        loop {
            let mut line = Vec::new();
            let length = self
                .input
                .read_until(b'\n', &mut line)
                .map_err(|error| format!("cannot read the console: {error}"))?;
            if length == 0 {
                return Ok(None);
            }
            let line = String::from_utf8_lossy(&line);
            let mut words = line.split_whitespace();
            let id = words.next().and_then(|word| word.parse().ok());
            match id {
                Some(id) => {
                    let words = words.map(str::to_owned).collect();
                    return Ok(Some(Request { id, words }));
                }
                None => {
                    let complaint = format!("no number before the command: {}", line.trim_end());
                    self.reply(0, &Err(complaint))?;
                }
            }
        }
    }

    /// Sends one line of an answer.
    pub(crate) fn line(&mut self, id: u64, text: &str) -> Result<(), String> {
        self.send(&format!("{MARKER} {id} | {text}\n"))
    }

    /// Ends an answer.
    pub(crate) fn reply(
        &mut self,
        id: u64,
        outcome: &Result<String, String>,
    ) -> Result<(), String> {
        let (verdict, text) = match outcome {
            Ok(text) => ("ok", text),
            Err(text) => ("err", text),
        };
        self.send(&format!("{MARKER} {id} {verdict} {}\n", text.replace('\n', "; ")))
    }

    fn send(&mut self, text: &str) -> Result<(), String> {
        self.output
            .write_all(text.as_bytes())
            .map_err(|error| format!("cannot write to the console: {error}"))
    }
}
