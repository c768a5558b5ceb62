//! The `aerostat vhost-user` program as a child process.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::TEST_TIMEOUT;
use super::front_end::FrontEnd;

/// A back end with its own directory.
pub(crate) struct Program {
    program: PathBuf,
    pub(crate) dir: tempfile::TempDir,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    child: Option<Child>,
}

impl Program {
    /// Creates it, not started. `program` is the path of `aerostat`.
    pub(crate) fn new(program: impl Into<PathBuf>, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let dir = tempfile::tempdir().unwrap();
        Self { program: program.into(), dir, arguments, variables: Vec::new(), child: None }
    }

    /// Creates it with one guest named `vm` on the socket `vm.vhost`.
    pub(crate) fn one_guest(program: impl Into<PathBuf>, arguments: &[&str]) -> Self {
        let mut new = Self::new(program, arguments);
        let socket = new.path("vm.vhost").to_str().unwrap().to_owned();
        new.arguments.extend(["--socket".into(), socket, "--name".into(), "vm".into()]);
        new
    }

    pub(crate) fn argument(&mut self, argument: impl Into<String>) {
        self.arguments.push(argument.into());
    }

    /// Sets an environment variable.
    pub(crate) fn variable(&mut self, name: &str, value: &str) {
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// Closes the read end of its log.
    pub(crate) fn close_its_log(&mut self) {
        drop(self.child.as_mut().unwrap().stderr.take());
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn start(&mut self) {
        assert!(self.child.is_none());
        let child = Command::new(&self.program)
            .arg("vhost-user")
            .args(&self.arguments)
            .env("AEROSTAT_RUNTIME_DIR", self.dir.path())
            .env_remove("RUST_LOG")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Sends `signal`, and returns its exit status and log.
    pub(crate) fn end(&mut self, signal: rustix::process::Signal) -> (ExitStatus, String) {
        let mut child = self.child.take().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).unwrap();
        let status = child.wait().unwrap();
        let mut log = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_string(&mut log).unwrap();
        }
        (status, log)
    }

    pub(crate) fn kill(&mut self) {
        self.end(rustix::process::Signal::KILL);
    }

    /// Returns its exit status and log if it has exited.
    pub(crate) fn ended(&mut self) -> Option<(ExitStatus, String)> {
        let status = self.child.as_mut()?.try_wait().unwrap()?;
        let mut log = String::new();
        self.child.take()?.stderr.take()?.read_to_string(&mut log).unwrap();
        Some((status, log))
    }

    /// Connects, and retries until the back end listens.
    pub(crate) fn connect(&mut self, socket: &str) -> FrontEnd {
        let path = self.path(socket);
        FrontEnd::new(self.until(|| UnixStream::connect(&path).ok()))
    }

    pub(crate) fn client(&mut self, name: &str) -> control::Client {
        let path = self.path(&format!("{name}.sock"));
        self.until(|| control::Client::connect(&path).ok())
    }

    fn until<T>(&mut self, mut attempt: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + TEST_TIMEOUT;
        loop {
            if let Some(value) = attempt() {
                return value;
            }
            if let Some((status, log)) = self.ended() {
                panic!("the back end ended: {status}\n{log}");
            }
            assert!(Instant::now() < end, "the back end does not start");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Returns a file in `/proc` of each thread of a process.
pub(crate) fn of_each_thread(pid: u32, name: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")).unwrap();
    let status = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.unwrap().path().join("status")).unwrap()
    };
    let value = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    tasks.map(status).map(value).collect()
}
