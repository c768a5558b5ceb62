//! A QEMU with a generic vhost-user device, which Debian 12's QEMU lacks.

use std::path::{Path, PathBuf};

use crate::error::{LabError, Result};
use crate::guest_build::clone_root;
use crate::tool;

/// Script of the clone that fetches it.
const SCRIPT: &str = "scripts/qemu-vhost-user";

/// Exit code of the script if this machine cannot fetch it.
const NOT_FETCHED: i32 = 3;

/// Names of the device, which 10.1 renamed.
const DEVICES: [&str; 2] = ["vhost-user-device-pci", "vhost-user-test-device-pci"];

/// A QEMU with a generic vhost-user device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostUserQemu {
    /// The emulator.
    pub program: PathBuf,
    /// Name of its device.
    pub device: &'static str,
}

/// Such a QEMU, or why this machine cannot fetch one.
pub type Found = std::result::Result<VhostUserQemu, String>;

/// Returns it, and fetches it first if it is not in the cache.
///
/// # Errors
/// The script cannot be run, or fails for another reason than the fetch.
pub fn vhost_user() -> Result<Found> {
    let script = clone_root().join(SCRIPT);
    let mut command = tool::command(&script.to_string_lossy());
    let output = command
        .output()
        .map_err(|source| LabError::Io { what: format!("run {}", script.display()), source })?;
    let errors = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    match output.status.code() {
        Some(0) => {}
        Some(NOT_FETCHED) => return Ok(Err(errors)),
        _ => {
            let what = script.display().to_string();
            return Err(LabError::Unexpected { what, detail: errors });
        }
    }
    let program = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let device = DEVICES.into_iter().find(|name| has_device(&program, name));
    Ok(device
        .map(|device| VhostUserQemu { program: program.clone(), device })
        .ok_or_else(|| format!("{} has none of {DEVICES:?}", program.display())))
}

fn has_device(program: &Path, name: &str) -> bool {
    let mut help = tool::command(&program.to_string_lossy());
    help.args(["-device", &format!("{name},help")]);
    help.output().is_ok_and(|output| output.status.success())
}
