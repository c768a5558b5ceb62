//! Mounts, caches, and the end.

use std::fs;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// Where the files that hold memory live.
pub(crate) const MEMORY_DIRECTORY: &str = "/memory";

/// Mounts the kernel's file systems and the tmpfs that holds memory.
pub(crate) fn mount_all() -> Result<(), String> {
    let none = MountFlags::empty();
    for (kind, target, data) in [
        ("proc", "/proc", None),
        ("sysfs", "/sys", None),
        ("devtmpfs", "/dev", None),
        // The whole of memory: the default of half would not let a test fill the guest.
        ("tmpfs", MEMORY_DIRECTORY, Some(c"size=100%")),
    ] {
        fs::create_dir_all(target).map_err(|error| format!("cannot make {target}: {error}"))?;
        match mount(kind, target, kind, none, data) {
            // The kernel may have mounted devtmpfs itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(format!("cannot mount {target}: {error}")),
        }
    }
    // Only kernels with CONFIG_DEBUG_FS have it, and nothing here depends on it.
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

/// Switches the guest off; returns only when that failed.
pub(crate) fn power_off() {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("init: cannot power off: {error}");
    }
}
