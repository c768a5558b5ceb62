//! Files whose pages are page cache that can be dropped, which those of a tmpfs are not.

use std::fs::{self, File};
use std::io::Read;
use std::sync::Mutex;

use rustix::mount::{MountFlags, mount};

/// Where a directory of the host is mounted.
const HOST_DIRECTORY: &str = "/host";

/// One system call's worth.
const CHUNK_BYTES: usize = 1 << 20;

/// Files that were read: a file of the host loses its pages with its last user.
static OPEN: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Mounts a directory of the host (User Mode Linux only).
pub(crate) fn mount_host(directory: &str) -> Result<String, String> {
    let failed = |error: &dyn std::fmt::Display| format!("cannot mount {directory}: {error}");
    fs::create_dir_all(HOST_DIRECTORY).map_err(|error| failed(&error))?;
    let data = std::ffi::CString::new(directory).map_err(|error| failed(&error))?;
    mount("none", HOST_DIRECTORY, "hostfs", MountFlags::RDONLY, Some(data.as_c_str()))
        .map_err(|error| failed(&error))?;
    Ok(String::new())
}

/// Reads the first `mib` MiB of a file or a block device, which fills the page cache. The file
/// stays open.
pub(crate) fn read(path: &str, mib: u64) -> Result<String, String> {
    let mut file = File::open(path).map_err(|error| format!("cannot open {path}: {error}"))?;
    let mut buffer = vec![0; CHUNK_BYTES];
    for chunk in 0..mib {
        file.read_exact(&mut buffer)
            .map_err(|error| format!("cannot read MiB {chunk} of {path}: {error}"))?;
    }
    OPEN.lock().map_err(|error| error.to_string())?.push(file);
    Ok(mib.to_string())
}
