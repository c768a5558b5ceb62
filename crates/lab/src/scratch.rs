//! A directory that goes with the process that made it, however that one ends.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::error::{Context, Result};

/// Waits until the pipe closes whose other end only the harness holds. What interrupts a harness at
/// its terminal must not end the shell before it, so that it is in a group of its own.
const SCRIPT: &str = r#"read -r _; rm -rf -- "$1""#;

/// Files of one run, below the directory for temporary files.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
    /// Removes it when this process does not.
    sweeper: Child,
}

impl Scratch {
    /// Makes one whose name tells of its `purpose`.
    ///
    /// # Errors
    /// There is no room for it, or no shell to remove it.
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

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.sweeper.stdin.take());
        // An error would mean that somebody else waited for it.
        let _ = self.sweeper.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_one_leaves_nothing() {
        let scratch = Scratch::new("test").unwrap();
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), "text").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }
}
