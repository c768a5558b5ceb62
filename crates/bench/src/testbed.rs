//! A guest of the lab with the back end of its balloon.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use control::{BalloonChange, BalloonStatus, Client, ReleaseMode, Status};
use lab::uml::UmlKernel;
use lab::{Guest, guest_build};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::error::{BenchError, Result};

/// Time for the back end to listen.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Time for one change of the balloon: per page, on memory in use and on a busy
/// machine, 3 GiB take some seconds.
const CHANGE_LIMIT: Duration = Duration::from_secs(120);

/// Core of the guest and of the thread that answers it. On one core an answer
/// costs a context switch; across cores it costs waking an idle core, which in
/// a virtual machine is slower and varies more.
const CORE: usize = 0;

/// The driver in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The kernel's own.
    Stock,
    /// Aerostat's.
    Own,
}

/// What testbeds have in common.
#[derive(Clone, Debug)]
pub struct TestbedOptions {
    /// The `aerostat` program, which serves as the back end.
    pub program: PathBuf,
    /// The guest's kernel.
    pub kernel: UmlKernel,
    /// The guest's memory.
    pub memory_mib: u64,
    /// Where that memory is.
    pub memory_dir: PathBuf,
}

/// A guest, its driver loaded, and the back end of its balloon.
pub struct Testbed {
    /// The guest; ended before the back end.
    pub guest: Guest,
    /// The control API of the back end.
    pub client: Client,
    name: String,
    backend: Backend,
    _directory: tempfile::TempDir,
}

impl Testbed {
    /// Starts the back end, boots a guest on it and loads `driver`.
    pub fn start(name: &str, driver: Driver, options: &TestbedOptions) -> Result<Self> {
        let host = |what| move |source: std::io::Error| BenchError::Backend { what, source };
        let directory = tempfile::Builder::new().prefix("aerostat-bench-").tempdir();
        let directory = directory.map_err(host("making a directory"))?;
        let backend = Backend::start(&options.program, name, directory.path())?;
        let tree = options.kernel.tree();
        let modules = match driver {
            Driver::Stock => options.kernel.stock_modules.clone(),
            Driver::Own => vec![guest_build::balloon_module(&tree)?],
        };
        let mut guest = Guest::uml(&options.kernel)
            .memory_mib(options.memory_mib)
            .memory_dir(&options.memory_dir)
            .cpu(Some(CORE))
            .balloon(&backend.socket)
            .modules(modules)
            .module(guest_build::lab_module(&tree)?)
            .boot()?;
        let module = match driver {
            Driver::Stock => "virtio_balloon",
            Driver::Own => "aerostat_balloon",
        };
        guest.run(&format!("insmod {module}"))?;
        let client = Client::connect(&backend.control)?;
        Ok(Self { guest, client, name: name.to_owned(), backend, _directory: directory })
    }

    /// Asks for a balloon of `pages` and waits until it has settled.
    pub fn inflate_to(&mut self, pages: u32) -> Result<BalloonChange> {
        let set = self
            .client
            .set_balloon(u64::from(pages) * control::BALLOON_PAGE_BYTES, Duration::ZERO)?;
        let settled = self.wait(set.generation)?;
        settled.last_change.filter(|_| settled.settled).ok_or(BenchError::NotReached {
            name: self.name.clone(),
            actual_pages: settled.actual_pages,
            target_pages: settled.target_pages,
        })
    }

    /// Sets when the host releases memory.
    pub fn set_release(&self, mode: ReleaseMode) -> Result<()> {
        self.client.set_release(mode)?;
        Ok(())
    }

    /// Everything that the back end knows.
    pub fn status(&self) -> Result<Status> {
        Ok(self.client.status()?)
    }

    /// Host memory behind the guest, in MiB, measured on the host.
    pub fn resident_mib(&self) -> Result<f64> {
        let bytes = self.status()?.resident_bytes.unwrap_or(0);
        Ok(bytes as f64 / f64::from(1 << 20))
    }

    /// Runs a command in the guest whose answer is a number.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.guest.run(command)?.text;
        let first = answer.split_whitespace().next().unwrap_or_default();
        first.parse().map_err(|_| BenchError::GuestAnswer {
            command: command.to_owned(),
            answer: answer.clone(),
        })
    }

    /// Process of the back end.
    pub fn backend_pid(&self) -> u32 {
        self.backend.process.id()
    }

    fn wait(&self, generation: u64) -> Result<BalloonStatus> {
        let end = Instant::now() + CHANGE_LIMIT;
        loop {
            let status = self.client.wait(generation, Duration::from_secs(5))?;
            if status.is_over(generation) || Instant::now() > end {
                return Ok(status);
            }
        }
    }
}

/// The back end's process.
struct Backend {
    process: Child,
    socket: PathBuf,
    control: PathBuf,
}

impl Backend {
    fn start(program: &Path, name: &str, directory: &Path) -> Result<Self> {
        let host = |what| move |source: std::io::Error| BenchError::Backend { what, source };
        let (socket, control) = (directory.join("vhost.sock"), directory.join("control.sock"));
        let log = directory.join("backend.log");
        let output = File::create(&log).map_err(host("writing its log"))?;
        // The parent-death signal leaves no back end behind a bench that was killed.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .arg("vhost-user")
            .arg("--socket")
            .arg(&socket)
            .args(["--name", name, "--control"])
            .arg(&control)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .process_group(0)
            .spawn()
            .map_err(host("starting it"))?;
        let mut backend = Self { process, socket, control };
        backend.wait_until_it_listens()?;
        backend.pin()?;
        Ok(backend)
    }

    fn wait_until_it_listens(&mut self) -> Result<()> {
        let end = Instant::now() + START_LIMIT;
        while !(self.control.exists() && self.socket.exists()) {
            let host = |source| BenchError::Backend { what: "starting it", source };
            let ended = self.process.try_wait().map_err(host)?;
            if ended.is_some() || Instant::now() > end {
                let log = self.socket.with_file_name("backend.log");
                let said = std::fs::read_to_string(log).unwrap_or_default();
                return Err(host(std::io::Error::other(format!("it does not listen: {said}"))));
            }
            // Nothing announces a socket's birth to a stranger.
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Puts the thread that answers the guest on the guest's core; the others,
    /// above all the one that releases memory, stay free.
    fn pin(&self) -> Result<()> {
        let mut cores = CpuSet::new();
        cores.set(CORE);
        let thread = i32::try_from(self.process.id()).ok().and_then(rustix::process::Pid::from_raw);
        sched_setaffinity(thread, &cores)
            .map_err(|e| BenchError::Backend { what: "pinning it to a core", source: e.into() })
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let pid = i32::try_from(self.process.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            // It may have ended by itself; then there is nothing to stop.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.process.wait();
    }
}
