//! Directories for the memory of guests: tmpfs with huge pages or with small ones only.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use crate::error::{Context, LabError, Result};

/// What the host can say about huge pages on tmpfs, for all of them.
const SHMEM_SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The pages that hold the guest's memory on the host.
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

    /// The value of the host's setting that overrides the mount option.
    fn contrary_setting(self) -> &'static str {
        match self {
            Self::Small => "[force]",
            Self::Huge => "[deny]",
        }
    }
}

/// A tmpfs of its own, which has a path while this exists.
///
/// It is never attached to the machine's tree of mounts: it lives by its file descriptor alone, so
/// it goes with this process, however that ends, and with the last guest that uses it.
#[derive(Debug)]
pub struct GuestMemoryDir {
    _mount: OwnedFd,
    path: PathBuf,
}

impl GuestMemoryDir {
    /// Makes a tmpfs of at most `size_mib` MiB.
    ///
    /// # Errors
    /// When this process is not root, or the host overrides the size of pages.
    pub fn mount(backing: Backing, size_mib: u64) -> Result<Self> {
        check_setting(backing)?;
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

    /// The directory, for this process and those of the same user.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn check_setting(backing: Backing) -> Result<()> {
    let setting = match std::fs::read_to_string(SHMEM_SETTING) {
        Ok(setting) => setting,
        // A host without huge pages on tmpfs has small ones.
        Err(_) if backing == Backing::Small => return Ok(()),
        Err(error) => return Err(error).context(|| format!("read {SHMEM_SETTING}")),
    };
    match setting.contains(backing.contrary_setting()) {
        false => Ok(()),
        true => Err(LabError::Host {
            what: format!("have a tmpfs with huge={}", backing.mount_option()),
            advice: format!("{SHMEM_SETTING} is {}", setting.trim()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Huge pages of tmpfs files in use on this machine, in KiB.
    fn huge_kib() -> u64 {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|line| line.starts_with("ShmemHugePages:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn the_two_backings_hold_files_and_differ_in_pages() {
        const WRITTEN_BYTES: usize = 64 << 20;
        for backing in [Backing::Small, Backing::Huge] {
            let directory = GuestMemoryDir::mount(backing, 128).unwrap();
            let before_kib = huge_kib();
            std::fs::write(directory.path().join("file"), vec![1; WRITTEN_BYTES]).unwrap();
            let grown_kib = huge_kib().saturating_sub(before_kib);
            match backing {
                // Others may use huge pages at the same time, so only a lower bound is certain.
                Backing::Huge => assert!(grown_kib > 0),
                Backing::Small => {}
            }
            let status = rustix::fs::statvfs(directory.path()).unwrap();
            assert_eq!(status.f_blocks * status.f_frsize, 128 << 20);
        }
    }
}
