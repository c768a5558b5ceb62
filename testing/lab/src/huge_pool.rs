//! A pool of huge pages for one test, in its own hugetlbfs: other users of huge pages do not affect
//! its reservations.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::fstatvfs;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use crate::error::{Context, Result};

/// Size of a huge page.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The host's pool of default-size huge pages, 2 MiB on x86-64.
const SETTING: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages added to the host's pool. Dropping this removes them.
#[derive(Debug)]
pub struct HugePool {
    pages: u64,
    before: String,
    mount: OwnedFd,
    /// Locked: one test of all processes changes the pool at a time.
    _setting: File,
}

impl HugePool {
    /// Adds `pages` to the host's pool, and mounts a detached hugetlbfs of that size.
    ///
    /// # Errors
    /// The host lacks enough contiguous memory, or this process is not root.
    pub fn new(pages: u64) -> Result<Self> {
        let what = || format!("get {pages} huge pages of the host, as root");
        let setting = OpenOptions::new().read(true).write(true).open(SETTING).context(what)?;
        setting.lock().context(what)?;
        let before = fs::read_to_string(SETTING).context(what)?;
        let mount = mount(pages).map_err(io::Error::from).context(what)?;
        let this = Self { pages, before, mount, _setting: setting };
        let wanted = this.before.trim().parse().unwrap_or(0) + pages;
        fs::write(SETTING, wanted.to_string()).context(what)?;
        let got = fs::read_to_string(SETTING).context(what)?.trim().parse().unwrap_or(0);
        if wanted > got {
            let missing = io::Error::other(format!("the pool has {got} pages, not {wanted}"));
            return Err::<Self, _>(missing).context(what);
        }
        Ok(this)
    }

    /// Creates a file of this many pages, without a reservation.
    ///
    /// # Errors
    /// The file exists.
    pub fn file(&self, name: &str, pages: u64) -> Result<File> {
        let path = self.path().join(name);
        let what = || format!("make {}", path.display());
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path).context(what)?;
        file.set_len(pages * HUGE_PAGE_BYTES).context(what)?;
        Ok(file)
    }

    /// Pages allocated or reserved for its files.
    ///
    /// # Errors
    /// The kernel returns an error.
    pub fn reserved(&self) -> Result<u64> {
        let found = fstatvfs(&self.mount).map_err(io::Error::from);
        let found = found.context(|| "read the number of free huge pages".to_owned())?;
        Ok(self.pages.saturating_sub(found.f_bfree))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.mount.as_raw_fd()).into()
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        // There is no caller to report an error to.
        let _ = fs::write(SETTING, &self.before);
    }
}

fn mount(pages: u64) -> rustix::io::Result<OwnedFd> {
    let system = fsopen("hugetlbfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let bytes = |bytes: u64| bytes.to_string();
    fsconfig_set_string(&system, "pagesize", bytes(HUGE_PAGE_BYTES))?;
    fsconfig_set_string(&system, "size", bytes(pages * HUGE_PAGE_BYTES))?;
    fsconfig_create(&system)?;
    fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}
