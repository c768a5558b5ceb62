//! What sizes of page the host uses behind a region.

use std::fs;
use std::os::fd::AsFd;

use page_set::{CHUNK_PAGES, PAGE_BYTES};
use rustix::fs::{FsWord, fstat, fstatfs, major, minor};

use crate::HostMemoryError;

/// `f_type` of hugetlbfs (`include/uapi/linux/magic.h`).
const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;
/// `f_type` of tmpfs, which also is what memfd files live on.
const TMPFS_MAGIC: FsWord = 0x0102_1994;
/// How huge pages are chosen for memfd files, which no mount option governs.
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The pages that the host uses behind a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPages {
    /// 4 KiB pages: any page can be released alone.
    Small,
    /// Pages of up to 2 MiB that the kernel can split (tmpfs with `huge=`,
    /// transparent huge pages): a part can be released, at the price of the
    /// huge page.
    Transparent,
    /// hugetlbfs: a host page is released whole or not at all.
    Hugetlb {
        /// Size of a host page in 4 KiB pages (512 or 262144).
        host_page_pages: u64,
    },
}

impl HostPages {
    /// Size of the largest host page, in 4 KiB pages.
    #[must_use]
    pub const fn largest_pages(self) -> u64 {
        match self {
            Self::Small => 1,
            Self::Transparent => CHUNK_PAGES,
            Self::Hugetlb { host_page_pages } => host_page_pages,
        }
    }

    /// Finds out what backs `file`: the block size on hugetlbfs; on tmpfs, the
    /// `huge=` option of its mount or, for a memfd, the system's setting.
    ///
    /// `huge=advise` counts as small pages, since whether anyone advised cannot
    /// be seen; set it on the region if you know.
    ///
    /// # Errors
    /// The file's file system cannot be asked.
    pub fn of_file(file: impl AsFd) -> Result<Self, HostMemoryError> {
        let stats = fstatfs(&file).map_err(|e| HostMemoryError::Host {
            what: "fstatfs of guest memory",
            source: e.into(),
        })?;
        if stats.f_type == HUGETLBFS_MAGIC {
            let bytes = u64::try_from(stats.f_bsize).unwrap_or(PAGE_BYTES);
            return Ok(Self::Hugetlb { host_page_pages: (bytes / PAGE_BYTES).max(1) });
        }
        if stats.f_type != TMPFS_MAGIC {
            return Ok(Self::Small);
        }
        let dev = fstat(&file)
            .map_err(|e| HostMemoryError::Host { what: "fstat of guest memory", source: e.into() })?
            .st_dev;
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let huge = match mount_options(&mounts, &format!("{}:{}", major(dev), minor(dev))) {
            Some(options) => options
                .split(',')
                .find_map(|option| option.strip_prefix("huge="))
                .is_some_and(uses_huge_pages),
            // Not a mount: the kernel's own one, where memfd files live.
            None => fs::read_to_string(SHMEM_ENABLED)
                .is_ok_and(|setting| chosen(&setting).is_some_and(uses_huge_pages)),
        };
        Ok(if huge { Self::Transparent } else { Self::Small })
    }
}

fn uses_huge_pages(setting: &str) -> bool {
    // As in mm/shmem.c; `force` is for testing and overrides mounts.
    matches!(setting, "always" | "within_size" | "force")
}

/// The bracketed word of a sysfs choice: `always [advise] never`.
fn chosen(setting: &str) -> Option<&str> {
    setting.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

/// The super block's options of the mount on device `dev` (`major:minor`), from
/// the text of mountinfo (proc_pid_mountinfo(5)).
fn mount_options<'a>(mountinfo: &'a str, dev: &str) -> Option<&'a str> {
    mountinfo
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(dev))
        .and_then(|line| line.split_once(" - "))
        .and_then(|(_, after)| after.split(' ').nth(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_mount_options_of_the_right_device() {
        let text = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
30 22 0:25 / /dev/shm rw - tmpfs shm rw,size=1k\n\
31 22 0:26 / /mnt rw shared:2 master:1 - tmpfs x rw,huge=always,inode64\n";
        assert_eq!(mount_options(text, "0:25"), Some("rw,size=1k"));
        assert_eq!(mount_options(text, "0:26"), Some("rw,huge=always,inode64"));
        assert_eq!(mount_options(text, "0:2"), None);
    }

    #[test]
    fn reads_the_bracketed_word() {
        assert_eq!(chosen("always within_size [advise] never\n"), Some("advise"));
        assert_eq!(chosen("nothing"), None);
        assert!(uses_huge_pages("within_size") && !uses_huge_pages("advise"));
    }
}
