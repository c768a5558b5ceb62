//! Child processes that end with the process that started them, even if that one is killed.
//!
//! Dropping a [`GuardedChild`] kills its process group. A harness that is killed drops nothing, so
//! a shell in the guest's process group reads from a pipe whose other end only the harness holds:
//! when the pipe closes, the shell kills the group, itself included. A parent death signal does not
//! suffice: it is tied to the thread that started the guest, and reaches only the main process.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::error::{Context, LabError, Result};

/// `$1` is the pipe, `$2` a directory to remove with a killed harness, the rest is the guest.
/// The shell that reads the pipe is reparented, so a guest that waits for children never sees it.
/// A crashed guest leaves no core file. Some machines lack the links in `/dev` that udev makes.
const SCRIPT: &str = r#"
pipe=$1 directory=$2
shift 2
ulimit -c 0
( ( read -r _ <"/proc/self/fd/$pipe"; rm -rf -- "$directory"; kill -s KILL -- "-$$" ) >/dev/null 2>&1 & )
exec "$@"
"#;

/// A guest's processes.
pub(crate) struct GuardedChild {
    child: Child,
    status: Option<ExitStatus>,
    /// Closing it ends the shell that reads the other end, and the group with it.
    _alive: OwnedFd,
}

impl GuardedChild {
    /// Starts a program in a new process group, with pipes for its three streams.
    ///
    /// `directory` is its working directory, which is removed if the caller is killed.
    pub(crate) fn start(
        words: &[OsString],
        directory: &Path,
        variables: &[(&str, &OsStr)],
    ) -> Result<Self> {
        let (watched, alive) =
            pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe".to_owned())?;
        // The child inherits this end. Another child of this process may inherit it too, which is
        // harmless: only the harness holds the other end.
        fcntl_setfd(&watched, FdFlags::empty()).context(|| "share a pipe".to_owned())?;
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "keeper", &watched.as_raw_fd().to_string()])
            .arg(directory)
            .args(words)
            .envs(variables.iter().copied())
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .context(|| "start a shell for the guest".to_owned())?;
        Ok(Self { child, status: None, _alive: alive })
    }

    /// Id of the main process and the process group.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child with its streams.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Exit status of the main process, `None` while it runs.
    pub(crate) fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait().context(|| "wait for the guest".to_owned())?;
        }
        Ok(self.status)
    }

    /// Kills the whole group and waits for its main process.
    pub(crate) fn end(&mut self) -> Result<ExitStatus> {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let group = group.ok_or_else(|| LabError::Unexpected {
            what: "the guest's process id".to_owned(),
            detail: self.child.id().to_string(),
        })?;
        // The id cannot belong to another group: the main process is not reaped yet, or the shell
        // is still in the group. An error means that all processes have ended.
        let _ = kill_process_group(group, Signal::KILL);
        let status = match self.status {
            Some(status) => status,
            None => self.child.wait().context(|| "wait for the guest".to_owned())?,
        };
        self.status = Some(status);
        Ok(status)
    }
}

impl Drop for GuardedChild {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!("a guest may still be running: {error}");
        }
    }
}
