//! A booted guest with its host, and operations on its memory.

use lab::Guest;

use crate::error::{BenchError, Result};
use crate::host::Host;
use crate::testbed::Driver;

/// Maximum memory, in MiB, that a guest cannot use while it waits for the answer to a free page
/// report: 32 blocks of 4 MiB (Linux, `mm/page_reporting.c`). A guest that needs it then is out of
/// memory.
pub const REPORTED_MIB: u64 = 128;

/// A booted guest with its host.
pub struct Fixture<'a> {
    /// The guest's host.
    pub host: &'a Host,
    /// The guest. It ends when this is dropped.
    pub guest: Guest,
    /// The driver in its initramfs.
    pub driver: Driver,
}

impl Fixture<'_> {
    /// Runs a command in the guest and returns its one-line answer.
    ///
    /// # Errors
    /// The command fails, times out, or the guest ends.
    pub fn run(&mut self, command: &str) -> Result<String> {
        Ok(self.guest.run(command)?.text)
    }

    /// Runs a command whose answer is a number.
    ///
    /// # Errors
    /// As [`run`](Self::run), or the answer is no number.
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

    /// Loads the driver, and waits until it accepts requests.
    ///
    /// # Errors
    /// As [`run`](Self::run), or it accepts none in time.
    pub fn load_ready_driver(&mut self) -> Result<()> {
        self.load_driver()?;
        if self.driver == Driver::Own {
            self.host.until("ready for requests", |status| status.requests.possible)?;
        }
        Ok(())
    }

    /// Unloads the driver, also with an inflated balloon.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn unload_driver(&mut self) -> Result<()> {
        self.run(&format!("rmmod {}", self.driver.module_name())).map(drop)
    }

    /// Free memory in MiB according to the guest.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn free_mib(&mut self) -> Result<u64> {
        self.number("free-mib")
    }

    /// Verifies each page of a file.
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

    /// An error for pages with wrong contents.
    pub(crate) fn wrong_pages(&self, file: &str, pages: u64, named: Vec<String>) -> BenchError {
        let (name, file) = (self.host.name().to_owned(), file.to_owned());
        BenchError::WrongPages { name, file, pages, named }
    }

    /// Fragments the guest's free memory except `leave_mib`, until [`Self::defragment`].
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn fragment(&mut self, leave_mib: u64) -> Result<()> {
        self.run("insmod lab_memory")?;
        self.guest.fragment(leave_mib)?;
        Ok(())
    }

    /// Unpins the pages of [`Self::fragment`].
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
