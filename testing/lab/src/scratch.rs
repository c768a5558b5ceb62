//! A temporary directory that ends with the process that made it, even if that is killed.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::error::{Context, Result};

/// Waits until the pipe closes whose other end only the harness holds. A terminal interrupt of the
/// harness must not end this shell first, so it is in its own process group.
const SCRIPT: &str = r#"read -r _; rm -rf -- "$1""#;

/// A directory for the files of one run.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
    /// Shell that removes the directory if this process does not.
    sweeper: Child,
}

impl Scratch {
    /// Makes a directory whose name contains `purpose`.
    ///
    /// # Errors
    /// The directory cannot be made, or the shell cannot be started.
    pub fn new(purpose: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix(&format!("aerostat-{purpose}-")).tempdir();
        let directory = directory.context(|| "make a temporary directory".to_owned())?;
        let sweeper = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "sweeper"])
            .arg(directory.path())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context(|| "start a shell for a temporary directory".to_owned())?;
        Ok(Self { directory, sweeper })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.sweeper.stdin.take());
        // An error means that the shell is reaped already.
        let _ = self.sweeper.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_it_removes_the_directory() {
        let scratch = Scratch::new("test").unwrap();
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), "text").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }
}
