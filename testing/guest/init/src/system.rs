//! Mounts, caches, and power-off.

use std::fs;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// Directory of the files that hold memory.
pub(crate) const MEMORY_DIRECTORY: &str = "/memory";

/// Mounts the kernel's file systems and the tmpfs that holds memory.
pub(crate) fn mount_all() -> Result<(), String> {
    let none = MountFlags::empty();
    for (kind, target, data) in [
        ("proc", "/proc", None),
        ("sysfs", "/sys", None),
        ("devtmpfs", "/dev", None),
        // All of memory: with the default, half of it, a test could not fill the guest.
        ("tmpfs", MEMORY_DIRECTORY, Some(c"size=100%")),
    ] {
        fs::create_dir_all(target).map_err(|error| format!("cannot make {target}: {error}"))?;
        match mount(kind, target, kind, none, data) {
            // The kernel may have mounted devtmpfs itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(format!("cannot mount {target}: {error}")),
        }
    }
    // Optional: only kernels with CONFIG_DEBUG_FS have it.
    let _ = mount("debugfs", "/sys/kernel/debug", "debugfs", none, None);
    Ok(())
}

/// Drops the page cache and the slab caches.
pub(crate) fn drop_caches() -> Result<String, String> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")
        .map_err(|error| format!("cannot drop the caches: {error}"))?;
    Ok(String::new())
}

/// Powers the guest off. Returns only on an error.
pub(crate) fn power_off() {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("init: cannot power off: {error}");
    }
}
