//! A minimal client of QEMU's machine protocol (QMP), for balloons and migrations.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{BenchError, Result};

/// Timeout of an answer, and for the guest to reach its target, on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Between two polls of the balloon's size. QEMU sends its event once per second at most, and each
/// poll costs its main thread some microseconds.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Bandwidth limit of a migration in bytes per second: more than loopback reaches. QEMU's default
/// of 128 MiB would throttle it.
const MAX_BANDWIDTH: u64 = 64 << 30;

/// Between two polls of a migration, and its timeout.
const MIGRATION_POLL_INTERVAL: Duration = Duration::from_millis(250);
const MIGRATION_LIMIT: Duration = Duration::from_secs(1200);

/// QEMU's statistics of a completed migration (`qapi/migration.json`).
#[derive(Clone, Copy, Debug)]
pub struct QemuMigration {
    /// From the command to the end.
    pub total_ms: f64,
    /// Downtime.
    pub downtime_ms: f64,
    /// Setup, until the first page.
    pub setup_ms: f64,
    /// Bytes on the network.
    pub bytes_sent: u64,
    /// Pages of guest memory and other RAM blocks of QEMU.
    pub memory_pages: u64,
    /// Pages sent, counted each time.
    pub normal_pages: u64,
    /// Zero pages, likewise.
    pub zero_pages: u64,
    /// Number of dirty log syncs.
    pub rounds: u64,
    /// vCPU throttling at the end, in percent.
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
    /// The socket has no listener, or the greeting is no QMP.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(broken)?;
        stream.set_read_timeout(Some(LIMIT)).map_err(broken)?;
        let mut qmp = Self { lines: BufReader::new(stream) };
        let greeting = qmp.receive()?;
        if !greeting["QMP"].is_object() {
            return Err(unexpected("greet", &greeting));
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Connects to a QEMU that is starting.
    ///
    /// # Errors
    /// It does not listen within two minutes, or the greeting is no QMP.
    pub fn wait(socket: &Path) -> Result<Self> {
        let end = Instant::now() + LIMIT;
        while UnixStream::connect(socket).is_err() && Instant::now() < end {
            std::thread::sleep(MIGRATION_POLL_INTERVAL);
        }
        Self::connect(socket)
    }

    /// Returns the run state. QEMU answers once it has completed its start.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn query_status(&mut self) -> Result<String> {
        let answer = self.execute("query-status", &json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Sets the memory that the guest keeps, and waits until the guest reports that size. QEMU has
    /// released the rest by then.
    ///
    /// # Errors
    /// QEMU returns an error, or the guest does not reach it within 120 s.
    pub fn balloon(&mut self, left_bytes: u64) -> Result<()> {
        self.execute("balloon", &json!({ "value": left_bytes }))?;
        let end = Instant::now() + LIMIT;
        loop {
            let left = self.left_bytes()?;
            if left == left_bytes {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(unexpected("balloon", &json!({ "left": left, "asked": left_bytes })));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Memory that the guest keeps, according to the guest.
    ///
    /// # Errors
    /// QEMU has no balloon, or does not answer.
    pub fn left_bytes(&mut self) -> Result<u64> {
        let answer = self.execute("query-balloon", &json!({}))?;
        answer["actual"].as_u64().ok_or_else(|| unexpected("query-balloon", &answer))
    }

    /// Migrates the guest to a QEMU that waits at `address`.
    ///
    /// # Errors
    /// The migration fails, or takes longer than twenty minutes.
    pub fn migrate(&mut self, address: &str) -> Result<QemuMigration> {
        let parameters = json!({ "max-bandwidth": MAX_BANDWIDTH });
        self.execute("migrate-set-parameters", &parameters)?;
        self.execute("migrate", &json!({ "uri": address }))?;
        let end = Instant::now() + MIGRATION_LIMIT;
        loop {
            std::thread::sleep(MIGRATION_POLL_INTERVAL);
            let answer = self.execute("query-migrate", &json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => {
                    let odd = || unexpected("query-migrate", &answer);
                    return migration(&answer).ok_or_else(odd);
                }
                Some("failed" | "cancelled") | None => return Err(unexpected("migrate", &answer)),
                Some(_) if Instant::now() > end => return Err(unexpected("migrate", &answer)),
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
                return Err(unexpected(command, &message));
            }
            // All other messages are events.
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

fn unexpected(command: &str, answer: &Value) -> BenchError {
    BenchError::Monitor { command: command.to_owned(), answer: answer.to_string() }
}
