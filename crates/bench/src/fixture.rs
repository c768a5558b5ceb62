//! A booted guest on its host, and what it can be told to do with its memory.

use lab::Guest;

use crate::error::{BenchError, Result};
use crate::host::Host;
use crate::testbed::Driver;

/// Most memory, in MiB, that a guest cannot use while it waits for the answer to a
/// free page report: 32 blocks of 4 MiB (Linux, `mm/page_reporting.c`). One that needs
/// it then is out of memory.
pub const REPORTED_MIB: u64 = 128;

/// A booted guest on its host.
pub struct Fixture<'a> {
    /// The host.
    pub host: &'a Host,
    /// The guest; it ends when this is dropped.
    pub guest: Guest,
    /// The driver that it can load.
    pub driver: Driver,
}

impl Fixture<'_> {
    /// Runs a command in the guest and returns its one-line answer.
    ///
    /// # Errors
    /// The guest's refusal, its silence, or its end.
    pub fn run(&mut self, command: &str) -> Result<String> {
        Ok(self.guest.run(command)?.text)
    }

    /// Runs a command whose answer is a number.
    ///
    /// # Errors
    /// As [`run`](Self::run), or it is none.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        number(&mut self.guest, command)
    }

    /// Loads the driver.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn load_driver(&mut self) -> Result<()> {
        self.run(&format!("insmod {}", self.driver.module_name())).map(drop)
    }

    /// Loads the driver, and waits until the host can ask it for something.
    ///
    /// # Errors
    /// As [`run`](Self::run), or the host does not see it.
    pub fn load_ready_driver(&mut self) -> Result<()> {
        self.load_driver()?;
        if self.driver == Driver::Own {
            self.host.until("ready for requests", |status| status.requests.possible)?;
        }
        Ok(())
    }

    /// Unloads it, with what it holds.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn unload_driver(&mut self) -> Result<()> {
        self.run(&format!("rmmod {}", self.driver.module_name())).map(drop)
    }

    /// Free memory in MiB, by the guest's word.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn free_mib(&mut self) -> Result<u64> {
        self.number("free-mib")
    }

    /// Checks each page of a file.
    ///
    /// # Errors
    /// [`BenchError::WrongPages`], and as [`run`](Self::run).
    pub fn verify(&mut self, file: &str, mib: u64, seed: u64) -> Result<()> {
        let command = format!("verify {file} {mib} {seed}");
        let reply = self.guest.run(&command)?;
        match reply.text.parse() {
            Ok(0) => Ok(()),
            Ok(pages) => Err(self.wrong_pages(file, pages, reply.lines)),
            Err(_) => Err(BenchError::GuestAnswer { command, answer: reply.text }),
        }
    }

    /// An error about pages that did not hold what the guest had written.
    pub(crate) fn wrong_pages(&self, file: &str, pages: u64, named: Vec<String>) -> BenchError {
        let (name, file) = (self.host.name().to_owned(), file.to_owned());
        BenchError::WrongPages { name, file, pages, named }
    }

    /// Fragments the guest's free memory but `leave_mib`, until [`Self::defragment`].
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn fragment(&mut self, leave_mib: u64) -> Result<()> {
        self.run("insmod lab_memory")?;
        self.guest.fragment(leave_mib)?;
        Ok(())
    }

    /// Puts it together again.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn defragment(&mut self) -> Result<()> {
        self.run("rmmod lab_memory").map(drop)
    }
}

/// Runs a command in the guest whose answer begins with a number.
pub(crate) fn number(guest: &mut Guest, command: &str) -> Result<u64> {
    let answer = guest.run(command)?.text;
    let first = answer.split_whitespace().next().unwrap_or_default();
    first.parse().map_err(|_| BenchError::GuestAnswer {
        command: command.to_owned(),
        answer: answer.clone(),
    })
}
