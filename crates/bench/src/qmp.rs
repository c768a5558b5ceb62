//! The little of QEMU's machine protocol (QMP) that moves its balloon, and its guest.

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
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Bytes in a second that a migration may take: none that loopback reaches. QEMU's own limit of
/// 128 MiB would hold it back.
const MAX_BANDWIDTH: u64 = 64 << 30;

/// Between two looks at a migration, and time for all of it.
const MIGRATION_LOOK: Duration = Duration::from_millis(250);
const MIGRATION_LIMIT: Duration = Duration::from_secs(1200);

/// What QEMU says of a migration that is over (`qapi/migration.json`).
#[derive(Clone, Copy, Debug)]
pub struct QemuMigration {
    /// From the command to the end.
    pub total_ms: f64,
    /// While the guest stood still.
    pub downtime_ms: f64,
    /// Until the first page could go.
    pub setup_ms: f64,
    /// Bytes on the network.
    pub bytes_sent: u64,
    /// Pages of the guest's memory, and of what else QEMU counts as memory.
    pub memory_pages: u64,
    /// Pages sent, counted each time.
    pub normal_pages: u64,
    /// Zeros, likewise.
    pub zero_pages: u64,
    /// Times that the log of writes was read.
    pub rounds: u64,
    /// How far the guest's processors were held back at the end.
    pub throttle_percent: u8,
}

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

    /// Connects to a QEMU that was started just now.
    ///
    /// # Errors
    /// Nobody listens after two minutes, or speaks otherwise.
    pub fn wait(socket: &Path) -> Result<Self> {
        let end = Instant::now() + LIMIT;
        while UnixStream::connect(socket).is_err() && Instant::now() < end {
            std::thread::sleep(MIGRATION_LOOK);
        }
        Self::connect(socket)
    }

    /// Asks whether the guest runs, which is answered once QEMU has started all that it was
    /// started with.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn query_status(&mut self) -> Result<String> {
        let answer = self.execute("query-status", &json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
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
            std::thread::sleep(POLL_INTERVAL);
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

    /// Moves the guest to a QEMU that waits at `address`.
    ///
    /// # Errors
    /// QEMU refuses, or fails, or takes longer than twenty minutes.
    pub fn migrate(&mut self, address: &str) -> Result<QemuMigration> {
        let parameters = json!({ "max-bandwidth": MAX_BANDWIDTH });
        self.execute("migrate-set-parameters", &parameters)?;
        self.execute("migrate", &json!({ "uri": address }))?;
        let end = Instant::now() + MIGRATION_LIMIT;
        loop {
            std::thread::sleep(MIGRATION_LOOK);
            let answer = self.execute("query-migrate", &json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => {
                    let odd = || refused("query-migrate", &answer);
                    return migration(&answer).ok_or_else(odd);
                }
                Some("failed" | "cancelled") | None => return Err(refused("migrate", &answer)),
                Some(_) if Instant::now() > end => return Err(refused("migrate", &answer)),
                Some(_) => {}
            }
        }
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

fn migration(answer: &Value) -> Option<QemuMigration> {
    let ram = &answer["ram"];
    let throttle = answer["cpu-throttle-percentage"].as_u64().unwrap_or(0);
    Some(QemuMigration {
        total_ms: answer["total-time"].as_f64()?,
        downtime_ms: answer["downtime"].as_f64()?,
        setup_ms: answer["setup-time"].as_f64()?,
        bytes_sent: ram["transferred"].as_u64()?,
        memory_pages: ram["total"].as_u64()? / ram["page-size"].as_u64()?.max(1),
        normal_pages: ram["normal"].as_u64()?,
        zero_pages: ram["duplicate"].as_u64()?,
        rounds: ram["dirty-sync-count"].as_u64()?,
        throttle_percent: u8::try_from(throttle).unwrap_or(u8::MAX),
    })
}

fn broken(source: std::io::Error) -> BenchError {
    BenchError::Host { what: "talking to QEMU", source: source.into() }
}

fn refused(command: &str, answer: &Value) -> BenchError {
    BenchError::Monitor { command: command.to_owned(), answer: answer.to_string() }
}
