//! The little of QEMU's machine protocol (QMP) that moves its balloon.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{BenchError, Result};

/// Time for an answer, and for the guest to follow, on a machine with other work.
const LIMIT: Duration = Duration::from_secs(120);

/// Between two looks at the size of the balloon. QEMU's event for it comes once a
/// second at most, and each look costs its main thread some microseconds.
const LOOK: Duration = Duration::from_millis(10);

/// A connection to QEMU.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to a QEMU that was started with `-qmp unix:PATH,server=on`.
    ///
    /// # Errors
    /// Nobody listens, or speaks otherwise.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(broken)?;
        stream.set_read_timeout(Some(LIMIT)).map_err(broken)?;
        let mut qmp = Self { lines: BufReader::new(stream) };
        let greeting = qmp.receive()?;
        if !greeting["QMP"].is_object() {
            return Err(refused("greet", &greeting));
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Sets the memory that the guest shall have left, and waits until it says that it
    /// has, which is after QEMU released what it gave.
    ///
    /// # Errors
    /// QEMU refuses, or the guest does not follow within 120 s.
    pub fn balloon(&mut self, left_bytes: u64) -> Result<()> {
        self.execute("balloon", &json!({ "value": left_bytes }))?;
        let end = Instant::now() + LIMIT;
        loop {
            let left = self.left_bytes()?;
            if left == left_bytes {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(refused("balloon", &json!({ "left": left, "asked": left_bytes })));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Memory that the guest has left, by its own word.
    ///
    /// # Errors
    /// QEMU has no balloon, or does not answer.
    pub fn left_bytes(&mut self) -> Result<u64> {
        let answer = self.execute("query-balloon", &json!({}))?;
        answer["actual"].as_u64().ok_or_else(|| refused("query-balloon", &answer))
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes()).map_err(broken)?;
        loop {
            let message = self.receive()?;
            if !message["error"].is_null() {
                return Err(refused(command, &message));
            }
            // All else is an event.
            if let Some(answer) = message.get("return") {
                return Ok(answer.clone());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line).map_err(broken)?;
        serde_json::from_str(&line).map_err(|error| broken(error.into()))
    }
}

fn broken(source: std::io::Error) -> BenchError {
    BenchError::Host { what: "talking to QEMU", source: source.into() }
}

fn refused(command: &str, answer: &Value) -> BenchError {
    BenchError::Monitor { command: command.to_owned(), answer: answer.to_string() }
}
