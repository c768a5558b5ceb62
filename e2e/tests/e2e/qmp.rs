//! The little of QEMU's machine protocol (QMP) that moves its balloon.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::bed::LIMIT;

/// Sent when the guest wrote its size, at most once a second, but in any case
/// after the last change.
const BALLOON_EVENT: &str = "BALLOON_CHANGE";

/// A connection to QEMU.
pub(crate) struct Qmp {
    lines: BufReader<UnixStream>,
    /// Memory of the guest by the newest event, without the balloon, in bytes.
    told_bytes: Option<u64>,
}

impl Qmp {
    /// Connects to a QEMU that was started with `-qmp unix:PATH,server=on`.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Self { lines: BufReader::new(stream), told_bytes: None };
        assert!(qmp.receive()["QMP"].is_object());
        qmp.execute("qmp_capabilities", &json!({}));
        qmp
    }

    /// Sets the memory that the guest shall have left, and waits until it says
    /// that it has.
    pub(crate) fn balloon(&mut self, left_bytes: u64) {
        self.execute("balloon", &json!({ "value": left_bytes }));
        loop {
            self.told_bytes = None;
            if self.left_bytes() == left_bytes {
                return;
            }
            while self.told_bytes.is_none() {
                let message = self.receive();
                self.note(&message);
            }
        }
    }

    /// Memory that the guest has left, by its own word.
    pub(crate) fn left_bytes(&mut self) -> u64 {
        self.execute("query-balloon", &json!({}))["actual"].as_u64().unwrap()
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        loop {
            let message = self.receive();
            assert!(message["error"].is_null(), "{request}: {message}");
            match message.get("return") {
                Some(answer) => return answer.clone(),
                None => self.note(&message),
            }
        }
    }

    fn note(&mut self, message: &Value) {
        if message["event"] == BALLOON_EVENT {
            self.told_bytes = message["data"]["actual"].as_u64();
        }
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        read.unwrap_or_else(|error| panic!("QEMU says nothing: {error}"));
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}
