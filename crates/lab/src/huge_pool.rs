//! Huge pages for a test, in a file system of their own: what is promised of them is not changed by
//! who else uses huge pages.

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

/// Bytes of one of them.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The host's pool of the usual huge pages, of 2 MiB on x86-64.
const SETTING: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of the host, as many as were asked for. They go back when this is dropped.
#[derive(Debug)]
pub struct HugePool {
    pages: u64,
    before: String,
    mount: OwnedFd,
    /// Locked: one test at a time changes the pool, of whatever process.
    _setting: File,
}

impl HugePool {
    /// Adds `pages` to the host's pool, and mounts a hugetlbfs of so many in no directory.
    ///
    /// # Errors
    /// The host has not so much memory in one piece, or refuses: only root may.
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

    /// A new file of so many pages, of which nothing is promised yet.
    ///
    /// # Errors
    /// There is one of this name.
    pub fn file(&self, name: &str, pages: u64) -> Result<File> {
        let path = self.path().join(name);
        let what = || format!("make {}", path.display());
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path).context(what)?;
        file.set_len(pages * HUGE_PAGE_BYTES).context(what)?;
        Ok(file)
    }

    /// Pages of its files that are there, or that the kernel has promised to be.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn promised(&self) -> Result<u64> {
        let found = fstatvfs(&self.mount).map_err(io::Error::from);
        let found = found.context(|| "ask how many huge pages are left".to_owned())?;
        Ok(self.pages.saturating_sub(found.f_bfree))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.mount.as_raw_fd()).into()
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        // Nobody is left to be told.
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
