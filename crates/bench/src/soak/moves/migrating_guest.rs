//! A guest that goes from one process to another, with the conversation on its serial line.

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

/// For one command of a guest in an emulated KVM, on a machine with other work.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// Between two looks at what nobody announces.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// For an answer, between two looks at whether the guest has left.
const SLICE: Duration = Duration::from_millis(500);

/// Between two questions: an emulated KVM has one processor for everything.
const PAUSE: Duration = Duration::from_millis(100);

/// What is asked while a guest is on its way: a little work, much text, and memory that is read.
const QUESTIONS: [&str; 3] = ["free-mib", "cat /proc/meminfo", "verify asked 1 77"];

/// A guest, and the process that has it.
pub struct MigratingGuest<'a> {
    run_config: &'a RunConfig,
    case: Case,
    directory: Scratch,
    /// Its monitor's process and its serial line.
    pub guest: Guest,
    /// Its control socket.
    pub control: PathBuf,
    processes: u32,
}

/// A process that waits for a guest.
pub struct Receiver {
    /// The process.
    pub guest: Guest,
    /// Its control socket.
    pub control: PathBuf,
    /// Where it waits.
    pub address: String,
}

/// An `aerostat migrate` under way.
pub struct Departure {
    child: Option<Child>,
}

/// How an `aerostat migrate` ended, and what it said.
#[derive(Debug)]
pub struct Said {
    /// Its exit code.
    pub code: Option<i32>,
    /// What it printed.
    pub out: String,
    /// What it complained of.
    pub err: String,
}

/// What was said on the serial line while a guest was on its way.
#[derive(Debug, Default)]
pub struct Conversation {
    /// Answers.
    pub answered: u64,
    /// What was asked last, and not answered before the guest left.
    pub open: Option<(u64, String)>,
}

impl<'a> MigratingGuest<'a> {
    /// Boots a guest and loads its driver.
    ///
    /// # Errors
    /// Why it did not come up.
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

    /// Starts a process that waits for this guest.
    ///
    /// # Errors
    /// It does not begin to listen.
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

    /// Has the guest leave.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn depart(&self, to: &str, arguments: &[&str]) -> Result<Departure> {
        let child = Command::new(&self.run_config.program)
            .arg("migrate")
            .arg(&self.control)
            .args([to, "--plain", "--json"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Ok(Departure { child: Some(child.map_err(host("starting a program"))?) })
    }

    /// Asks and listens until the migration is over; `each` is called before each question.
    ///
    /// # Errors
    /// The guest says something wrong.
    pub fn converse(
        &mut self,
        departure: &mut Departure,
        mut each: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<Conversation> {
        let mut talk = Conversation::default();
        for question in QUESTIONS.iter().cycle() {
            if departure.is_over()? {
                break;
            }
            each(self)?;
            let number = match self.guest.ask(question) {
                Ok(number) => number,
                Err(LabError::Ended { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            talk.open = Some((number, (*question).to_owned()));
            match self.listen(number, question, departure)? {
                Some(reply) => check(question, &reply)?,
                None => return Ok(talk),
            }
            (talk.answered, talk.open) = (talk.answered + 1, None);
            std::thread::sleep(PAUSE);
        }
        Ok(talk)
    }

    /// `None` where the guest has left before it answered, or has stopped.
    fn listen(
        &mut self,
        number: u64,
        question: &str,
        departure: &mut Departure,
    ) -> Result<Option<Reply>> {
        let end = Instant::now() + LIMIT;
        loop {
            let over = departure.is_over()?;
            match self.guest.answer(number, question, SLICE) {
                Ok(reply) => return Ok(Some(reply)),
                Err(LabError::Ended { .. }) => return Ok(None),
                // It stands still, by its operator's word or because nobody knows where it is.
                Err(LabError::Timeout { .. }) if over => return Ok(None),
                Err(LabError::Timeout { .. }) if Instant::now() < end => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The guest is at `receiver`'s now. Hears the answers that it still owes; true where a question
    /// was typed when nobody was there to hear it.
    ///
    /// # Errors
    /// The process that it left does not end well, or the guest does not answer.
    pub fn arrive(&mut self, receiver: Receiver, talk: &mut Conversation) -> Result<bool> {
        let ended = self.guest.wait()?;
        if !ended.success() {
            return Err(wrong(format!("the source: {ended}\n{}", self.guest.console_log())));
        }
        self.take(receiver);
        self.catch_up(talk)
    }

    /// The guest is there now, whatever became of the process that had it.
    pub fn take(&mut self, receiver: Receiver) {
        let mut left = std::mem::replace(&mut self.guest, receiver.guest);
        self.guest.continue_from(&mut left);
        self.control = receiver.control;
    }

    /// Hears the answer to what is open, if the question was heard.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn catch_up(&mut self, talk: &mut Conversation) -> Result<bool> {
        let Some((number, question)) = talk.open.take() else { return Ok(false) };
        let probe = "free-mib";
        let later = self.guest.ask(probe)?;
        let unheard = match self.guest.answer(number, &question, LIMIT) {
            Ok(reply) => {
                check(&question, &reply)?;
                talk.answered += 1;
                false
            }
            // Half of it was heard, or none.
            Err(LabError::NotHeard { .. } | LabError::Refused { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        self.guest.answer(later, probe, LIMIT)?;
        Ok(unheard)
    }

    /// Runs a command in the guest.
    ///
    /// # Errors
    /// Its refusal, its silence, or its end.
    pub fn run(&mut self, command: &str) -> Result<Reply> {
        Ok(self.guest.run_within(command, LIMIT)?)
    }

    /// Runs a command whose answer is a number.
    ///
    /// # Errors
    /// As [`run`](Self::run), or it is none.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.run(command)?.text;
        let number = answer.parse();
        number.map_err(|_| BenchError::GuestAnswer { command: command.to_owned(), answer })
    }

    /// Checks each page of a file.
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

    /// The control API of the process that has it.
    ///
    /// # Errors
    /// The process is not there.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::connect(&self.control)?)
    }

    /// Resolves a doubt by the command line: `aerostat resolve`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn resolve(&self, control: &std::path::Path, arguments: &[&str]) -> Result<Said> {
        let output = Command::new(&self.run_config.program)
            .arg("resolve")
            .arg(control)
            .args(arguments)
            .output()
            .map_err(host("starting a program"))?;
        Ok(Said::of(&output))
    }
}

impl Receiver {
    /// Where its migration stands; `None` where the process is dead.
    pub fn state(&self) -> Option<MigrationState> {
        state(&self.control)
    }
}

/// Where a process's migration stands; `None` where the process is dead.
pub(super) fn state(control: &std::path::Path) -> Option<MigrationState> {
    Some(Client::connect(control).ok()?.migration().ok()?.state)
}

impl Departure {
    /// True where it has ended.
    fn is_over(&mut self) -> Result<bool> {
        let Some(child) = &mut self.child else { return Ok(true) };
        Ok(child.try_wait().map_err(host("waiting for a program"))?.is_some())
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn end(mut self) -> Result<Said> {
        let child = self.child.take().ok_or_else(|| wrong("it has ended already".into()))?;
        let output = child.wait_with_output().map_err(host("waiting for a program"))?;
        Ok(Said::of(&output))
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // One that has ended cannot be killed.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Said {
    fn of(output: &std::process::Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// What is said of a guest that moved.
    ///
    /// # Errors
    /// It did not.
    pub fn moved(&self) -> Result<MigrationStatus> {
        let status = serde_json::from_str(&self.out).ok();
        let moved = status.filter(|status: &MigrationStatus| {
            self.code == Some(0) && status.state == MigrationState::Moved
        });
        moved.ok_or_else(|| wrong(format!("not moved: {self:?}")))
    }
}

fn check(question: &str, reply: &Reply) -> Result<()> {
    let right = match question {
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
    Err(BenchError::GuestAnswer { command: question.to_owned(), answer })
}
