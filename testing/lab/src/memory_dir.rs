//! Directories for guest memory: tmpfs with huge pages or with small pages only.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::statvfs;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use crate::error::{Context, LabError, Result};

/// Host-wide setting of huge pages on tmpfs, which can override the mount option.
const SHMEM_SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Writing to it drops clean file contents.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// Writing to it compacts the host's free memory.
const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// A pass takes about 0.1 s on 24 GiB.
const COMPACT_PASSES: u32 = 3;

/// Page size of guest memory on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// 4 KiB pages.
    Small,
    /// 2 MiB pages wherever a whole one fits.
    Huge,
}

impl Backing {
    fn mount_option(self) -> &'static str {
        match self {
            Self::Small => "never",
            Self::Huge => "always",
        }
    }

    /// Value of the host-wide setting that overrides the mount option.
    fn contrary_setting(self) -> &'static str {
        match self {
            Self::Small => "[force]",
            Self::Huge => "[deny]",
        }
    }
}

/// A private tmpfs, which has a path while this exists.
///
/// It is a detached mount that only its file descriptor keeps alive. So it disappears with this
/// process, even if that is killed, and with the last guest that uses it.
#[derive(Debug)]
pub struct GuestMemoryDir {
    _mount: OwnedFd,
    path: PathBuf,
}

impl GuestMemoryDir {
    /// Makes a tmpfs of at most `size_mib` MiB.
    ///
    /// # Errors
    /// This process is not root, or the host-wide setting overrides the page size.
    pub fn mount(backing: Backing, size_mib: u64) -> Result<Self> {
        check_setting(backing)?;
        if backing == Backing::Huge {
            // A host with fragmented memory would silently allocate small pages.
            gather_huge_pages()?;
        }
        let context = || format!("mount a tmpfs with huge={}", backing.mount_option());
        let options = [
            ("size", format!("{size_mib}m")),
            ("huge", backing.mount_option().to_owned()),
            ("mode", "0700".to_owned()),
        ];
        let file_system = match fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC) {
            Err(Errno::PERM) => {
                return Err(LabError::Host {
                    what: context(),
                    advice: "run it as root".to_owned(),
                });
            }
            other => other.context(context)?,
        };
        for (name, value) in options {
            fsconfig_set_string(&file_system, name, value).context(context)?;
        }
        fsconfig_create(&file_system).context(context)?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let mount = fsmount(&file_system, flags, MountAttrFlags::empty()).context(context)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), mount.as_raw_fd());
        Ok(Self { _mount: mount, path: path.into() })
    }

    /// The directory, for processes of the same user.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of memory that its files hold: touched by guests and not returned.
    ///
    /// # Errors
    /// The kernel returns an error.
    pub fn used_bytes(&self) -> Result<u64> {
        let status = statvfs(&self.path).context_path("measure", &self.path)?;
        Ok(status.f_blocks.saturating_sub(status.f_bfree).saturating_mul(status.f_frsize))
    }
}

/// Makes the host assemble huge pages for later writes. Builds fragment its free memory, and tmpfs
/// then silently uses small pages. Needs root.
///
/// Dirty file contents and pages of kernel objects cannot be dropped or moved, so they are synced
/// and dropped first. One pass of compaction does not reach all pages.
///
/// # Errors
/// The kernel returns an error.
pub fn gather_huge_pages() -> Result<()> {
    rustix::fs::sync();
    let write = |path: &str, what: &str| {
        std::fs::write(path, what).context(|| format!("write {what} to {path}"))
    };
    write(DROP_CACHES, "3")?;
    (0..COMPACT_PASSES).try_for_each(|_| write(COMPACT, "1"))
}

fn check_setting(backing: Backing) -> Result<()> {
    let setting = match std::fs::read_to_string(SHMEM_SETTING) {
        Ok(setting) => setting,
        // A host without huge pages on tmpfs uses small ones.
        Err(_) if backing == Backing::Small => return Ok(()),
        Err(error) => return Err(error).context(|| format!("read {SHMEM_SETTING}")),
    };
    match setting.contains(backing.contrary_setting()) {
        false => Ok(()),
        true => Err(LabError::Host {
            what: format!("mount a tmpfs with huge={}", backing.mount_option()),
            advice: format!("{SHMEM_SETTING} is {}", setting.trim()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE_MIB: u64 = 128;
    const WRITTEN_BYTES: u64 = 64 << 20;
    const HUGE_PAGE_BYTES: u64 = 2 << 20;

    /// Writes a file of one byte and returns the bytes that the file system then holds.
    fn bytes_for_one_byte(backing: Backing) -> u64 {
        let directory = GuestMemoryDir::mount(backing, SIZE_MIB).unwrap();
        std::fs::write(directory.path().join("file"), "x").unwrap();
        directory.used_bytes().unwrap()
    }

    #[test]
    fn pages_have_the_requested_size() {
        assert_eq!(bytes_for_one_byte(Backing::Small), 4096);
        assert_eq!(bytes_for_one_byte(Backing::Huge), HUGE_PAGE_BYTES);
    }

    #[test]
    fn used_bytes_are_measured_and_limited() {
        for backing in [Backing::Small, Backing::Huge] {
            let directory = GuestMemoryDir::mount(backing, SIZE_MIB).unwrap();
            let file = directory.path().join("file");
            std::fs::write(&file, vec![1; 64 << 20]).unwrap();
            assert_eq!(directory.used_bytes().unwrap(), WRITTEN_BYTES);
            let more = directory.path().join("more");
            assert!(std::fs::write(&more, vec![1; 65 << 20]).is_err());
            std::fs::remove_file(&file).unwrap();
            std::fs::remove_file(&more).unwrap();
            assert_eq!(directory.used_bytes().unwrap(), 0);
        }
    }

    #[test]
    fn the_mount_table_has_no_entry() {
        let mounts = || std::fs::read_to_string("/proc/self/mounts").unwrap();
        let before = mounts();
        let _directory = GuestMemoryDir::mount(Backing::Small, SIZE_MIB).unwrap();
        assert_eq!(mounts(), before);
    }
}
