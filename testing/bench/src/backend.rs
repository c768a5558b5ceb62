//! The vhost-user back end process of a guest's balloon.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use control::Client;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::error::{BenchError, Result};

/// Name prefix of a thread that serves a guest.
const SERVING_THREAD: &str = "guest ";

/// Between two polls for it.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Timeout for the back end to listen.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Timeout for the back end to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// A running `aerostat vhost-user`. It ends when this is dropped, or with the thread that started
/// it.
#[derive(Debug)]
pub struct Backend {
    process: Child,
    socket: PathBuf,
    control: PathBuf,
    log: PathBuf,
}

impl Backend {
    /// Starts `program` for the guest `name` and waits until it listens. Its sockets and log are in
    /// `directory`, which can serve as `AEROSTAT_RUNTIME_DIR`.
    ///
    /// # Errors
    /// The program cannot be run, or ends; then the error has its log.
    pub fn start(program: &Path, name: &str, directory: &Path) -> Result<Self> {
        Self::start_with(program, name, directory, &[])
    }

    /// As [`start`](Self::start), with more arguments for `aerostat vhost-user`.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(
        program: &Path,
        name: &str,
        directory: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let host = |what| move |source: std::io::Error| BenchError::Backend { what, source };
        // Without the extension of control sockets, so that `aerostat` does not take it for one.
        let socket = directory.join(format!("{name}.monitor"));
        let control = directory.join(format!("{name}.sock"));
        let log = directory.join(format!("{name}.log"));
        let output = File::create(&log).map_err(host("writing its log"))?;
        // The parent-death signal leaves no back end behind a killed benchmark.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .arg("vhost-user")
            .arg("--socket")
            .arg(&socket)
            .args(["--name", name, "--control"])
            .arg(&control)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .process_group(0)
            .spawn()
            .map_err(host("starting it"))?;
        let mut backend = Self { process, socket, control, log };
        backend.wait_until_it_listens()?;
        Ok(backend)
    }

    /// Socket for the front end.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Connects to its control API.
    ///
    /// # Errors
    /// It does not answer.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::connect(&self.control)?)
    }

    /// Sends SIGTERM and returns the exit status.
    ///
    /// # Errors
    /// It does not end within 20 s and is killed.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.end()
    }

    /// Kills it, like a crash.
    ///
    /// # Errors
    /// The kernel returns an error.
    pub fn kill(&mut self) -> Result<()> {
        let host = |source| BenchError::Backend { what: "killing it", source };
        self.process.kill().map_err(host)?;
        self.process.wait().map_err(host)?;
        Ok(())
    }

    /// Pins the thread that serves the guest to CPU `core`. Other threads, above all the one that
    /// releases memory, remain free.
    pub(crate) fn pin(&self, core: usize) -> Result<()> {
        let mut cores = CpuSet::new();
        cores.set(core);
        sched_setaffinity(Some(self.serving_thread()?), &cores)
            .map_err(|e| BenchError::Backend { what: "pinning it to a core", source: e.into() })
    }

    /// The thread of the only guest. It starts after the sockets listen, so pinning another thread
    /// would not pin it.
    fn serving_thread(&self) -> Result<Pid> {
        let host = |source| BenchError::Backend { what: "finding the thread that serves", source };
        let end = Instant::now() + START_LIMIT;
        loop {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).map_err(host)?;
            for task in tasks.flatten() {
                // A thread may end while it is read.
                let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
                let number = task.file_name().to_str().and_then(|number| number.parse().ok());
                if name.starts_with(SERVING_THREAD)
                    && let Some(pid) = number.and_then(Pid::from_raw)
                {
                    return Ok(pid);
                }
            }
            if Instant::now() > end {
                return Err(host(std::io::Error::other("there is none")));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn wait_until_it_listens(&mut self) -> Result<()> {
        let end = Instant::now() + START_LIMIT;
        // The control socket is the second of the two. It may not listen yet when its path exists.
        while self.client().is_err() {
            let host = |source| BenchError::Backend { what: "starting it", source };
            let ended = self.process.try_wait().map_err(host)?;
            if ended.is_some() || Instant::now() > end {
                let said = self.log();
                return Err(host(std::io::Error::other(format!("it does not listen: {said}"))));
            }
            // There is no event for a new socket of another process.
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn end(&mut self) -> Result<ExitStatus> {
        let host = |source| BenchError::Backend { what: "ending it", source };
        if let Some(status) = self.process.try_wait().map_err(host)? {
            return Ok(status);
        }
        if let Some(pid) = self.raw_pid() {
            kill_process(pid, Signal::TERM).map_err(|e| host(e.into()))?;
        }
        let end = Instant::now() + STOP_LIMIT;
        while Instant::now() < end {
            if let Some(status) = self.process.try_wait().map_err(host)? {
                return Ok(status);
            }
            // `wait` has no timeout.
            std::thread::sleep(Duration::from_millis(2));
        }
        self.process.kill().map_err(host)?;
        self.process.wait().map_err(host)?;
        Err(host(std::io::Error::other("it did not end on SIGTERM and was killed")))
    }

    fn raw_pid(&self) -> Option<Pid> {
        i32::try_from(self.process.id()).ok().and_then(Pid::from_raw)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // A killed process has ended too.
        let _ = self.end();
    }
}
