//! A guest that migrates between processes, with its serial console.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use control::Client;
use control::api::{MigrationState, MigrationStatus};
use lab::{Guest, LabError, Reply, Scratch};

use super::case::Case;
use super::run_config::RunConfig;
use crate::error::{BenchError, Result, host, wrong};
use crate::kvm_host::address_of;

/// Timeout of a guest command on an emulated KVM on a busy machine.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// Between two polls.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Timeout of one wait for an answer, between two polls of the migration.
const SLICE: Duration = Duration::from_millis(500);

/// Between two commands: an emulated KVM has one CPU for everything.
const PAUSE: Duration = Duration::from_millis(100);

/// Commands during a migration: a little work, much text, and a read of memory.
const COMMANDS: [&str; 3] = ["free-mib", "cat /proc/meminfo", "verify asked 1 77"];

/// A guest and its current process.
pub struct MigratingGuest<'a> {
    run_config: &'a RunConfig,
    case: Case,
    directory: Scratch,
    /// Its VMM process and serial line.
    pub guest: Guest,
    /// Its control socket.
    pub control: PathBuf,
    processes: u32,
}

/// A destination.
pub struct Receiver {
    /// The process.
    pub guest: Guest,
    /// Its control socket.
    pub control: PathBuf,
    /// Its address.
    pub address: String,
}

/// A running `aerostat migrate`.
pub struct MigrateCommand {
    child: Option<Child>,
}

/// Result of an `aerostat` command.
#[derive(Debug)]
pub struct CommandOutput {
    /// Its exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Commands on the serial line during a migration.
#[derive(Debug, Default)]
pub struct ConsoleCommands {
    /// Number of answers.
    pub answered: u64,
    /// Last command, if not answered before the guest left.
    pub pending: Option<(u64, String)>,
}

impl<'a> MigratingGuest<'a> {
    /// Boots a guest and loads its driver.
    ///
    /// # Errors
    /// The guest does not boot.
    pub fn boot(run_config: &'a RunConfig, case: Case, memory_mib: u64) -> Result<Self> {
        let directory = Scratch::new("moves")?;
        let control = directory.path().join("0");
        let guest = run_config.start(&case, memory_mib, &control)?;
        let mut migrating_guest =
            Self { run_config, case, directory, guest, control, processes: 1 };
        if let Some(driver) = case.driver {
            migrating_guest.run(&format!("insmod {}", driver.module_name()))?;
        }
        migrating_guest.run("fill asked 1 77")?;
        Ok(migrating_guest)
    }

    /// Starts a destination for this guest.
    ///
    /// # Errors
    /// It does not listen in time.
    pub fn receiver(&mut self, arguments: &[&str]) -> Result<Receiver> {
        let control = self.directory.path().join(self.processes.to_string());
        self.processes += 1;
        let path = control.to_string_lossy();
        let words = ["--name", self.case.name, "--listen", "127.0.0.1:0", "--plain"];
        let more = ["--control", &path];
        let words = words.iter().chain(&more).chain(arguments);
        let guest =
            Guest::receiver(&self.run_config.program).machine_arguments(words.copied()).boot()?;
        let address = address_of(&guest)?;
        Ok(Receiver { guest, control, address })
    }

    /// Starts an `aerostat migrate`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start_migrate(&self, to: &str, arguments: &[&str]) -> Result<MigrateCommand> {
        let child = Command::new(&self.run_config.program)
            .arg("migrate")
            .arg(&self.control)
            .args([to, "--plain", "--json"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Ok(MigrateCommand { child: Some(child.map_err(host("starting a program"))?) })
    }

    /// Sends commands until the migration ends. Calls `each` before each one.
    ///
    /// # Errors
    /// An answer is wrong.
    pub fn run_commands(
        &mut self,
        migrate: &mut MigrateCommand,
        mut each: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<ConsoleCommands> {
        let mut commands = ConsoleCommands::default();
        for command in COMMANDS.iter().cycle() {
            if migrate.is_over()? {
                break;
            }
            each(self)?;
            let number = match self.guest.send(command) {
                Ok(number) => number,
                Err(LabError::Ended { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            commands.pending = Some((number, (*command).to_owned()));
            match self.wait_for_answer(number, command, migrate)? {
                Some(reply) => check(command, &reply)?,
                None => return Ok(commands),
            }
            (commands.answered, commands.pending) = (commands.answered + 1, None);
            std::thread::sleep(PAUSE);
        }
        Ok(commands)
    }

    /// `None` if the guest has left before it answered, or is paused.
    fn wait_for_answer(
        &mut self,
        number: u64,
        command: &str,
        migrate: &mut MigrateCommand,
    ) -> Result<Option<Reply>> {
        let end = Instant::now() + LIMIT;
        loop {
            let over = migrate.is_over()?;
            match self.guest.answer(number, command, SLICE) {
                Ok(reply) => return Ok(Some(reply)),
                Err(LabError::Ended { .. }) => return Ok(None),
                // The guest is paused, by its operator or because it is in doubt.
                Err(LabError::Timeout { .. }) if over => return Ok(None),
                Err(LabError::Timeout { .. }) if Instant::now() < end => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Moves this to the destination's process, and waits for the pending answer. Returns whether a
    /// command was lost.
    ///
    /// # Errors
    /// The source process fails, or the guest does not answer.
    pub fn finish_migration(
        &mut self,
        receiver: Receiver,
        commands: &mut ConsoleCommands,
    ) -> Result<bool> {
        let ended = self.guest.wait()?;
        if !ended.success() {
            return Err(wrong(format!("the source: {ended}\n{}", self.guest.console_log())));
        }
        self.switch_to(receiver);
        self.wait_for_pending(commands)
    }

    /// Moves this to the destination's process. Ignores how the source ended.
    pub fn switch_to(&mut self, receiver: Receiver) {
        let mut left = std::mem::replace(&mut self.guest, receiver.guest);
        self.guest.continue_from(&mut left);
        self.control = receiver.control;
    }

    /// Waits for the pending answer. Returns whether its command was lost.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn wait_for_pending(&mut self, commands: &mut ConsoleCommands) -> Result<bool> {
        let Some((number, command)) = commands.pending.take() else { return Ok(false) };
        let probe = "free-mib";
        let later = self.guest.send(probe)?;
        let lost = match self.guest.answer(number, &command, LIMIT) {
            Ok(reply) => {
                check(&command, &reply)?;
                commands.answered += 1;
                false
            }
            // Half of it was received, or nothing.
            Err(LabError::CommandLost { .. } | LabError::Refused { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        self.guest.answer(later, probe, LIMIT)?;
        Ok(lost)
    }

    /// Runs a command in the guest.
    ///
    /// # Errors
    /// The command fails, times out, or the guest ends.
    pub fn run(&mut self, command: &str) -> Result<Reply> {
        Ok(self.guest.run_within(command, LIMIT)?)
    }

    /// Runs a command whose answer is a number.
    ///
    /// # Errors
    /// As [`run`](Self::run), or the answer is no number.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.run(command)?.text;
        let number = answer.parse();
        number.map_err(|_| BenchError::GuestAnswer { command: command.to_owned(), answer })
    }

    /// Verifies each page of a file.
    ///
    /// # Errors
    /// [`BenchError::WrongPages`], and as [`run`](Self::run).
    pub fn verify(&mut self, file: &str, mib: u64, seed: u64) -> Result<()> {
        let reply = self.run(&format!("verify {file} {mib} {seed}"))?;
        if reply.text == "0" {
            return Ok(());
        }
        let (name, file) = (self.case.name.to_owned(), file.to_owned());
        let pages = reply.text.parse().unwrap_or(0);
        Err(BenchError::WrongPages { name, file, pages, named: reply.lines })
    }

    /// Connects to the control API of its process.
    ///
    /// # Errors
    /// The process has ended.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::connect(&self.control)?)
    }

    /// Runs `aerostat resolve`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn resolve(&self, control: &std::path::Path, arguments: &[&str]) -> Result<CommandOutput> {
        let output = Command::new(&self.run_config.program)
            .arg("resolve")
            .arg(control)
            .args(arguments)
            .output()
            .map_err(host("starting a program"))?;
        Ok(CommandOutput::of(&output))
    }
}

impl Receiver {
    /// State of its migration, `None` if the process is dead.
    pub fn state(&self) -> Option<MigrationState> {
        state(&self.control)
    }
}

/// State of a process's migration, `None` if the process is dead.
pub(super) fn state(control: &std::path::Path) -> Option<MigrationState> {
    Some(Client::connect(control).ok()?.migration().ok()?.state)
}

impl MigrateCommand {
    /// Whether it has ended.
    fn is_over(&mut self) -> Result<bool> {
        let Some(child) = &mut self.child else { return Ok(true) };
        Ok(child.try_wait().map_err(host("waiting for a program"))?.is_some())
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn end(mut self) -> Result<CommandOutput> {
        let child = self.child.take().ok_or_else(|| wrong("it has ended already".into()))?;
        let output = child.wait_with_output().map_err(host("waiting for a program"))?;
        Ok(CommandOutput::of(&output))
    }
}

impl Drop for MigrateCommand {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // An ended process cannot be killed.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl CommandOutput {
    fn of(output: &std::process::Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// Status of a successful migration.
    ///
    /// # Errors
    /// The migration failed.
    pub fn migrated(&self) -> Result<MigrationStatus> {
        let status = serde_json::from_str(&self.out).ok();
        let moved = status.filter(|status: &MigrationStatus| {
            self.code == Some(0) && status.state == MigrationState::Moved
        });
        moved.ok_or_else(|| wrong(format!("not migrated: {self:?}")))
    }
}

fn check(command: &str, reply: &Reply) -> Result<()> {
    let right = match command {
        "free-mib" => reply.text.parse::<u64>().is_ok(),
        "cat /proc/meminfo" => {
            let has = |name: &str| reply.lines.iter().any(|line| line.starts_with(name));
            has("MemTotal:") && has("DirectMap")
        }
        _ => reply.text == "0" && reply.lines.is_empty(),
    };
    if right {
        return Ok(());
    }
    let answer = format!("{reply:?}");
    Err(BenchError::GuestAnswer { command: command.to_owned(), answer })
}
