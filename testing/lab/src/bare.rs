//! A guest without an operating system (`testing/guest/bare`), in the VMM.
//!
//! It uses so little of KVM that it runs where a Linux guest does not, and it boots in
//! milliseconds. It serves every test that needs no Linux in the guest: the VMM's console, disks,
//! pauses, snapshots and migrations.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionread;
use rustix::pipe::fcntl_setpipe_size;
use tempfile::TempDir;

use crate::cache::{self, Key};
use crate::error::{Context, LabError, Result};
use crate::guest_build;
use crate::keeper::GuardedChild;
use crate::tool;

/// Raise it when the build of the guest changes.
const RECIPE: u32 = 1;

/// Environment variable: path of a built guest, for a machine that cannot build it.
pub const KERNEL_VARIABLE: &str = "AEROSTAT_TEST_BARE";

/// `--memory` of a bare guest: the minimum of the VMM.
pub const MEMORY: &str = "32MiB";

/// Environment variable of the VMM: directory of the control sockets.
pub const RUNTIME_VARIABLE: &str = "AEROSTAT_RUNTIME_DIR";

/// Timeout of a guest command and of the boot. Both take milliseconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(20);

/// Timeout for reading the last output of a process that has ended.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(5);

/// Between two polls of the process and its pipes.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Builds the guest, once for each state of its sources.
///
/// # Errors
/// The C compiler is missing, or the sources do not build.
pub fn kernel() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(KERNEL_VARIABLE) {
        return Ok(path.into());
    }
    let source = guest_build::guest_source("bare")?;
    let key = Key::new(RECIPE)
        .with("gcc", tool::program_version("gcc", "gcc")?)
        .with_directory(&source)?;
    let directory = cache::artifact("bare", &key, |directory| {
        let linked = directory.join("bare32");
        let mut compile = tool::command("gcc");
        compile.args(["-m32", "-march=i686", "-mno-sse", "-mno-mmx", "-O1", "-ffreestanding"]);
        compile.args(["-fno-pic", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"]);
        compile.args(["-fcf-protection=none", "-Wall", "-Wextra", "-Werror", "-nostdlib"]);
        compile.args(["-static", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"]);
        compile.arg("-Wl,-m,elf_i386").arg("-Wl,-T").arg(source.join("bare.ld"));
        compile.arg(source.join("start.S")).arg(source.join("bare.c")).arg("-o").arg(&linked);
        tool::run(&mut compile, "gcc", &directory.join("build.log"))?;
        // A loader of PVH kernels takes 64-bit ELF files only, whatever code is in them.
        let mut convert = tool::command("objcopy");
        convert.args(["-O", "elf64-x86-64"]).arg(&linked).arg(directory.join("bare"));
        tool::run(&mut convert, "binutils", &directory.join("convert.log"))?;
        fs::remove_file(&linked).context_path("remove", &linked)
    })?;
    Ok(directory.join("bare"))
}

/// Capacity of an unread pipe, in bytes: the minimum of Linux.
const PIPE_BYTES: usize = 4096;

/// A pipe of a guest that prints all the time is full after this time without new bytes.
const FULL_AFTER: Duration = Duration::from_secs(1);

/// What the test does with an output stream of the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Reads it as the VMM writes it.
    Read,
    /// Keeps its pipe open and does not read it.
    Unread,
    /// Closes the read end of its pipe.
    Closed,
}

/// How a process of the VMM is started.
#[derive(Debug)]
pub struct BareBuilder {
    words: Vec<OsString>,
    variables: Vec<(String, OsString)>,
    directory: Arc<TempDir>,
    stdout: Stream,
    stderr: Stream,
}

impl BareBuilder {
    /// `program run --name NAME --memory 32MiB --kernel BARE`.
    ///
    /// # Errors
    /// The guest cannot be built, or a temporary directory cannot be made.
    pub fn run(program: &Path, name: &str) -> Result<Self> {
        let command = Self::command(program, "run", name)?;
        Ok(command.argument("--memory").argument(MEMORY).argument("--kernel").argument(kernel()?))
    }

    /// `program COMMAND --name NAME`: `receive`, which prints its listening address on standard
    /// error, or `restore`.
    ///
    /// # Errors
    /// A temporary directory cannot be made.
    pub fn command(program: &Path, command: &str, name: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("aerostat-bare-").tempdir();
        let directory = directory.context(|| "make a temporary directory".to_owned())?;
        let words = [program.as_os_str(), OsStr::new(command), "--name".as_ref(), name.as_ref()];
        Ok(Self {
            words: words.map(OsStr::to_owned).to_vec(),
            variables: Vec::new(),
            directory: Arc::new(directory),
            stdout: Stream::Read,
            stderr: Stream::Read,
        })
    }

    /// Adds an argument.
    #[must_use]
    pub fn argument(mut self, word: impl Into<OsString>) -> Self {
        self.words.push(word.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn arguments<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.words.extend(words.into_iter().map(OsString::from));
        self
    }

    /// Sets an environment variable of the process.
    #[must_use]
    pub fn variable(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.variables.push((name.to_owned(), value.into()));
        self
    }

    /// Uses the control directory of another guest.
    #[must_use]
    pub fn beside(mut self, other: &BareGuest) -> Self {
        self.directory = Arc::clone(&other.directory);
        self
    }

    /// Sets what the test does with standard output and standard error.
    #[must_use]
    pub fn streams(mut self, stdout: Stream, stderr: Stream) -> Self {
        (self.stdout, self.stderr) = (stdout, stderr);
        self
    }

    /// Starts the process and returns at once.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(self) -> Result<BareGuest> {
        let mut variables: Vec<(&str, &OsStr)> =
            vec![(RUNTIME_VARIABLE, self.directory.path().as_os_str())];
        variables.extend(self.variables.iter().map(|(name, value)| (name.as_str(), &**value)));
        let mut process = GuardedChild::start(&self.words, self.directory.path(), &variables)?;
        let child = process.child();
        let input = child.stdin.take();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let output = Arc::new(Output::default());
        let mut unread = Vec::new();
        let streams = [
            (stdout.map(OwnedFd::from), self.stdout, true),
            (stderr.map(OwnedFd::from), self.stderr, false),
        ];
        for (pipe, stream, is_console) in streams {
            match (pipe, stream) {
                (Some(pipe), Stream::Read) => output.read(pipe.into(), is_console),
                (Some(pipe), Stream::Unread) => {
                    // A small pipe fills soon.
                    fcntl_setpipe_size(&pipe, PIPE_BYTES)
                        .map_err(std::io::Error::from)
                        .context(|| "make a pipe small".to_owned())?;
                    unread.push((pipe.into(), is_console));
                }
                _ => {}
            }
        }
        Ok(BareGuest { process, input, output, directory: self.directory, unread })
    }

    /// Starts the process and waits until its guest has booted.
    ///
    /// # Errors
    /// The guest does not boot.
    pub fn boot(self) -> Result<BareGuest> {
        let mut guest = self.start()?;
        guest.wait_for("ready", |line| line.starts_with("ready "))?;
        Ok(guest)
    }
}

/// A VMM process. Dropping this ends it.
pub struct BareGuest {
    process: GuardedChild,
    input: Option<ChildStdin>,
    output: Arc<Output>,
    directory: Arc<TempDir>,
    /// Pipes; the flag is true for the console's.
    unread: Vec<(File, bool)>,
}

impl BareGuest {
    /// Process id of the VMM.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Directory of the control socket, also for files of the test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Types a command and returns the text after `ok` in its answer.
    ///
    /// # Errors
    /// The guest answers with an error, or not in time.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let from = self.output.lock().lines.len();
        self.send(&format!("{command}\n"))?;
        let is_answer = |line: &str| line.starts_with("ok") || line.starts_with("error");
        let answer = self.wait_from(from, command, is_answer)?;
        match answer.strip_prefix("ok") {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => Err(LabError::Unexpected { what: format!("`{command}`"), detail: answer }),
        }
    }

    /// Types a command whose answer is one hexadecimal number, and returns the number.
    ///
    /// # Errors
    /// As those of [`run`](Self::run).
    pub fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.run(command)?;
        u64::from_str_radix(&answer, 16)
            .map_err(|_| LabError::Unexpected { what: format!("`{command}`"), detail: answer })
    }

    /// Types text and does not wait for an answer.
    ///
    /// # Errors
    /// The process has ended.
    pub fn send(&mut self, text: &str) -> Result<()> {
        let input = self.input.as_mut().map_or(Ok(()), |input| input.write_all(text.as_bytes()));
        input.context(|| "type at the guest's serial line".to_owned())
    }

    /// Waits for a console line, also among those already printed.
    ///
    /// # Errors
    /// No such line is printed in time.
    pub fn wait_for(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> Result<String> {
        self.wait_from(0, what, is_it)
    }

    /// Starts to read the streams that were [not read](Stream::Unread) so far.
    pub fn resume_reading(&mut self) {
        for (pipe, is_console) in self.unread.drain(..) {
            self.output.read(pipe, is_console);
        }
    }

    /// Waits until the unread pipes are full.
    ///
    /// # Errors
    /// A pipe is empty, or still fills after a while.
    pub fn wait_for_full_pipes(&self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        let mut seen = (self.unread_bytes(), Instant::now());
        while seen.0.contains(&0) || seen.1.elapsed() < FULL_AFTER {
            if Instant::now() >= end {
                let command = "full pipes".to_owned();
                return Err(LabError::Timeout { command, limit: LIMIT, tail: self.tail() });
            }
            thread::sleep(POLL_INTERVAL);
            let now = self.unread_bytes();
            if now != seen.0 {
                seen = (now, Instant::now());
            }
        }
        Ok(())
    }

    fn unread_bytes(&self) -> Vec<u64> {
        self.unread.iter().map(|(pipe, _)| ioctl_fionread(pipe).unwrap_or(0)).collect()
    }

    /// Console lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.output.lock().lines.clone()
    }

    /// What the VMM wrote to standard error so far.
    pub fn errors(&self) -> String {
        self.output.lock().errors.clone()
    }

    /// Waits until `find` returns a value for the text of standard error.
    ///
    /// # Errors
    /// `find` returns none in time.
    pub fn wait_for_error<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.wait(what, |text| find(&text.errors))
    }

    /// Exit status of the process, `None` while it runs.
    ///
    /// # Errors
    /// The kernel returns an error.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        self.process.status()
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// It does not end within `limit`.
    pub fn wait_for_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.process.status()? {
                self.wait_for_streams();
                return Ok(status);
            }
            if Instant::now() >= end {
                let command = "the end of the process".to_owned();
                return Err(LabError::Timeout { command, limit, tail: self.tail() });
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until the output of the ended process is read. Does not wait for a child of it that
    /// holds the same streams.
    fn wait_for_streams(&self) {
        let is_open = |text: &mut Text| text.open > 0;
        let waited =
            self.output.changed.wait_timeout_while(self.output.lock(), LAST_WORDS_LIMIT, is_open);
        drop(waited);
    }

    /// Powers the guest off and waits until the process has ended.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn power_off(mut self) -> Result<ExitStatus> {
        self.send("off\n")?;
        self.wait_for_end(LIMIT)
    }

    fn wait_from(
        &mut self,
        from: usize,
        what: &str,
        is_it: impl Fn(&str) -> bool,
    ) -> Result<String> {
        self.wait(what, |text| text.lines.iter().skip(from).find(|line| is_it(line)).cloned())
    }

    fn wait<T>(&mut self, what: &str, find: impl Fn(&Text) -> Option<T>) -> Result<T> {
        let end = Instant::now() + LIMIT;
        let output = Arc::clone(&self.output);
        loop {
            // Polled before the text is searched, so that no output before the end is missed.
            let status = self.process.status()?;
            let text = output.lock();
            if let Some(found) = find(&text) {
                return Ok(found);
            }
            let command = what.to_owned();
            if status.is_some() && text.open == 0 {
                drop(text);
                let status = status.map(|status| status.to_string()).unwrap_or_default();
                return Err(LabError::Ended { command, status, tail: self.tail() });
            }
            if Instant::now() >= end {
                drop(text);
                return Err(LabError::Timeout { command, limit: LIMIT, tail: self.tail() });
            }
            drop(output.changed.wait_timeout(text, POLL_INTERVAL));
        }
    }

    fn tail(&self) -> String {
        let text = self.output.lock();
        let lines = text.lines.iter().rev().take(20).rev().cloned().collect::<Vec<_>>();
        format!("{}\n{}", lines.join("\n"), text.errors)
    }
}

#[derive(Default)]
struct Output {
    text: Mutex<Text>,
    changed: Condvar,
}

#[derive(Default)]
struct Text {
    lines: Vec<String>,
    errors: String,
    /// Streams being read.
    open: usize,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(self: &Arc<Self>, pipe: File, is_console: bool) {
        self.lock().open += 1;
        let output = Arc::clone(self);
        thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            while matches!(pipe.read_until(b'\n', &mut line), Ok(1..)) {
                let read = String::from_utf8_lossy(&line);
                let mut text = output.lock();
                if is_console {
                    text.lines.push(read.trim_end().to_owned());
                } else {
                    text.errors += &read;
                }
                drop(text);
                output.changed.notify_all();
                line.clear();
            }
            output.lock().open -= 1;
            output.changed.notify_all();
        });
    }
}
