//! A QEMU that has a generic vhost-user device, which Debian 12's has not.

use std::path::{Path, PathBuf};

use crate::error::{LabError, Result};
use crate::guest_build::clone_root;
use crate::tool;

/// What fetches it, in the clone.
const SCRIPT: &str = "scripts/qemu-vhost-user";

/// The script's exit code where this machine cannot fetch it.
const NOT_HERE: i32 = 3;

/// Names of the device: since 10.1 it is called one for tests.
const DEVICES: [&str; 2] = ["vhost-user-device-pci", "vhost-user-test-device-pci"];

/// A QEMU with a generic vhost-user device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostUserQemu {
    /// The emulator.
    pub program: PathBuf,
    /// What it calls the device.
    pub device: &'static str,
}

/// Such a QEMU, or why this machine cannot have one.
pub type Found = std::result::Result<VhostUserQemu, String>;

/// Fetches it if this machine has not done so yet.
///
/// # Errors
/// The script cannot be run, or fails otherwise than by not getting it.
pub fn vhost_user() -> Result<Found> {
    let script = clone_root().join(SCRIPT);
    let mut command = tool::command(&script.to_string_lossy());
    let output = command
        .output()
        .map_err(|source| LabError::Io { what: format!("run {}", script.display()), source })?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    match output.status.code() {
        Some(0) => {}
        Some(NOT_HERE) => return Ok(Err(said)),
        _ => {
            let what = script.display().to_string();
            return Err(LabError::Unexpected { what, detail: said });
        }
    }
    let program = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let device = DEVICES.into_iter().find(|name| has_device(&program, name));
    Ok(device
        .map(|device| VhostUserQemu { program: program.clone(), device })
        .ok_or_else(|| format!("{} has none of {DEVICES:?}", program.display())))
}

fn has_device(program: &Path, name: &str) -> bool {
    let mut ask = tool::command(&program.to_string_lossy());
    ask.args(["-device", &format!("{name},help")]);
    ask.output().is_ok_and(|output| output.status.success())
}
