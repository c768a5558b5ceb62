//! A file on a file system that stops to answer, as a network file system does whose server is gone.
//!
//! It is a FUSE file system of this process, with one file in its memory. While it is dead no
//! request is taken from the kernel, so whoever makes one waits until it is alive again, is killed,
//! or this is dropped.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use crate::error::{Context, Result};

/// Between two looks whether the kernel has a request.
const LOOK: Duration = Duration::from_micros(200);

/// Largest message: a write of 128 KiB and its headers.
const MESSAGE_BYTES: usize = 256 << 10;

/// Most bytes that one request writes.
const MAX_WRITE: u32 = 128 << 10;

/// The file's name, and the numbers of the directory and of the file.
const NAME: &[u8] = b"disk\0";
const ROOT: u64 = 1;
const FILE: u64 = 2;

/// Types and permissions of both.
const ROOT_MODE: u32 = 0o040_700;
const FILE_MODE: u32 = 0o100_600;

/// Requests (`include/uapi/linux/fuse.h`); those that are not here are answered with ENOSYS.
mod request {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const INIT: u32 = 26;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const BATCH_FORGET: u32 = 42;
}

/// Errors, as they are answered.
const NO_ENTRY: i32 = -2;
const NO_SUCH_CALL: i32 = -38;

/// Flags of an open file: reads are requests, and do not come from pages of the kernel's; and there
/// is none when it is closed, which the kernel would wait for when it ends a process.
const DIRECT_IO: u32 = 1;
const NO_FLUSH: u32 = 1 << 5;

/// What the test and the thread that answers share.
#[derive(Debug, Default)]
struct Shared {
    dead: AtomicBool,
    over: AtomicBool,
    /// Microseconds that each answer takes.
    slow_us: AtomicU64,
    /// Turns of the thread, each of which looks whether it is dead.
    turns: AtomicU64,
}

/// The file system, which is gone when this is dropped.
#[derive(Debug)]
pub struct DeadDisk {
    shared: Arc<Shared>,
    mount: OwnedFd,
}

impl DeadDisk {
    /// A file system with a file that has these contents, alive.
    ///
    /// # Errors
    /// When this process is not root, or the kernel has no FUSE.
    pub fn mount(contents: Vec<u8>) -> Result<Self> {
        let what = || "mount a FUSE file system".to_owned();
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open("/dev/fuse")
            .context(what)?;
        let options = [
            ("fd", device.as_raw_fd().to_string()),
            ("rootmode", format!("{ROOT_MODE:o}")),
            ("user_id", "0".to_owned()),
            ("group_id", "0".to_owned()),
        ];
        let mount = || -> rustix::io::Result<OwnedFd> {
            let system = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
            for (key, value) in &options {
                fsconfig_set_string(&system, *key, value.as_str())?;
            }
            fsconfig_create(&system)?;
            fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        };
        let mount = mount().map_err(std::io::Error::from).context(what)?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        thread::spawn(move || serve(&device, contents, &theirs));
        Ok(Self { shared, mount })
    }

    /// Where the file is, for any process of root's.
    pub fn path(&self) -> PathBuf {
        self.directory().join("disk")
    }

    /// Where a file is looked for that is not there.
    pub fn directory(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.mount.as_raw_fd()).into()
    }

    /// Answers each request only after so long.
    pub fn slow_down(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.shared.slow_us.store(us, Ordering::SeqCst);
    }

    /// From now on nothing is answered.
    pub fn die(&self) {
        self.shared.dead.store(true, Ordering::SeqCst);
        let seen = self.shared.turns.load(Ordering::SeqCst);
        // Two, since it may have looked just before.
        while self.shared.turns.load(Ordering::SeqCst) < seen + 2 {
            thread::sleep(LOOK);
        }
    }

    /// What waits is answered, and so is what comes.
    pub fn revive(&self) {
        self.shared.dead.store(false, Ordering::SeqCst);
    }
}

impl Drop for DeadDisk {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
    }
}

/// Answers until it is over; then the connection ends, and whatever waits fails.
fn serve(mut device: &File, mut contents: Vec<u8>, shared: &Shared) {
    let mut message = vec![0; MESSAGE_BYTES];
    while !shared.over.load(Ordering::SeqCst) {
        shared.turns.fetch_add(1, Ordering::SeqCst);
        if shared.dead.load(Ordering::SeqCst) {
            thread::sleep(LOOK);
            continue;
        }
        // Nothing is there, or the file system is about to go.
        let Ok(count) = device.read(&mut message) else {
            thread::sleep(LOOK);
            continue;
        };
        thread::sleep(Duration::from_micros(shared.slow_us.load(Ordering::SeqCst)));
        if let Some(answer) = answer(message.get(..count).unwrap_or_default(), &mut contents) {
            // Whoever asked may be gone.
            let _ = device.write(&answer);
        }
    }
}

fn u32_at(message: &[u8], at: usize) -> u32 {
    let bytes = message.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u32::from_ne_bytes)
}

fn u64_at(message: &[u8], at: usize) -> u64 {
    let bytes = message.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u64::from_ne_bytes)
}

/// `None` for a request that wants no answer.
fn answer(message: &[u8], contents: &mut [u8]) -> Option<Vec<u8>> {
    /// Of `struct fuse_in_header`.
    const HEADER: usize = 40;
    let (kind, unique, node) = (u32_at(message, 4), u64_at(message, 8), u64_at(message, 16));
    let place = usize::try_from(u64_at(message, HEADER + 8)).unwrap_or(usize::MAX);
    let bytes = u32_at(message, HEADER + 16) as usize;
    let outcome = match kind {
        request::INIT => Ok(init()),
        request::LOOKUP if message.get(HEADER..) == Some(NAME) => {
            // Number, generation and four times for which this holds.
            let mut entry = [FILE, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
            entry.extend(attributes(FILE, contents.len()));
            Ok(entry)
        }
        request::LOOKUP => Err(NO_ENTRY),
        request::GETATTR | request::SETATTR => {
            let mut found = [0u8; 16].to_vec();
            found.extend(attributes(node, contents.len()));
            Ok(found)
        }
        request::OPEN => Ok([0, 0, DIRECT_IO | NO_FLUSH, 0].map(u32::to_ne_bytes).concat()),
        request::READ => {
            let end = place.saturating_add(bytes).min(contents.len());
            Ok(contents.get(place.min(end)..end).unwrap_or_default().to_vec())
        }
        request::WRITE => {
            let data = message.get(HEADER + 40..).unwrap_or_default();
            contents.iter_mut().skip(place).zip(data).for_each(|(to, from)| *to = *from);
            Ok([u32::try_from(bytes).unwrap_or(0), 0].map(u32::to_ne_bytes).concat())
        }
        request::RELEASE | request::FSYNC => Ok(Vec::new()),
        request::FORGET | request::BATCH_FORGET | request::INTERRUPT => return None,
        _ => Err(NO_SUCH_CALL),
    };
    let (error, body) = outcome.map_or_else(|error| (error, Vec::new()), |body| (0, body));
    let mut answer = u32::try_from(16 + body.len()).unwrap_or(0).to_ne_bytes().to_vec();
    answer.extend(error.to_ne_bytes());
    answer.extend(unique.to_ne_bytes());
    answer.extend(body);
    Some(answer)
}

/// `struct fuse_init_out` of version 7.31, which asks for nothing.
fn init() -> Vec<u8> {
    let mut out = [7, 31, 0, 0, 0, MAX_WRITE, 1, 0].map(u32::to_ne_bytes).concat();
    out.resize(64, 0);
    out
}

/// `struct fuse_attr`.
fn attributes(node: u64, bytes: usize) -> Vec<u8> {
    let (mode, bytes) = if node == ROOT { (ROOT_MODE, 0) } else { (FILE_MODE, bytes as u64) };
    let mut out = [node, bytes, bytes / 512, 0, 0, 0].map(u64::to_ne_bytes).concat();
    out.extend([0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].map(u32::to_ne_bytes).concat());
    out
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc::channel;

    use super::*;

    /// Needs root, as everything does that mounts.
    #[test]
    fn a_disk_answers_until_it_is_dead() {
        let disk = DeadDisk::mount(vec![7; 8192]).unwrap();
        assert_eq!(fs::read(disk.path()).unwrap(), vec![7; 8192]);
        assert!(fs::metadata(disk.directory().join("other")).is_err());
        disk.die();
        let (tells, told) = channel();
        let path = disk.path();
        thread::spawn(move || tells.send(fs::read(path).map(|bytes| bytes.len())));
        assert!(told.recv_timeout(Duration::from_millis(200)).is_err());
        disk.revive();
        assert_eq!(told.recv_timeout(Duration::from_secs(20)).unwrap().unwrap(), 8192);
    }
}
