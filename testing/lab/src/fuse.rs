//! A FUSE file system served by this process. It can lack features, be slow, and stop answering.
//!
//! It replaces FAT, exFAT, CIFS and others that a test machine's kernel may not have: no hard
//! links, no rename flags, no holes, a directory that cannot be synced. It also replaces a network
//! file system whose server is gone: while it is [dead](Fuse::die) it reads no request from the
//! kernel, so a caller blocks until it is revived, the caller is killed, or the file system is
//! dropped. Files are in memory, in one directory.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use rustix::process::{getegid, geteuid};

use crate::error::{Context, Result};

/// Between two polls for a request of the kernel.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

// Requests, `include/uapi/linux/fuse.h`.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const FSYNCDIR: u32 = 30;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const RENAME2: u32 = 45;

/// Protocol version, supported by every kernel since 5.9.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;

/// `FATTR_MODE` and `FATTR_SIZE`: valid fields of a `SETATTR`.
const SETS_MODE: u32 = 1;
const SETS_SIZE: u32 = 1 << 3;

/// `FOPEN_DIRECT_IO`: every read is a request. `FOPEN_NOFLUSH`: closing a file is no request, for
/// which the kernel would wait when it ends a process.
const DIRECT_IO: u32 = 1;
const NO_FLUSH: u32 = 1 << 5;

/// Bytes of a request's header, and between the size and the data of a write.
const HEAD_BYTES: usize = 40;
const WRITE_REST_BYTES: usize = 20;

/// Maximum bytes of a write, and size of the request buffer.
const MAX_WRITE: u32 = 128 << 10;
const BUFFER_BYTES: usize = (128 << 10) + 4096;

/// Inode number of the directory, and type bits of a directory and a file.
const ROOT: u64 = 1;
const DIRECTORY: u32 = 0o04_0700;
const REGULAR: u32 = 0o10_0000;

/// Features of the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Hard links.
    pub links: bool,
    /// `renameat2` with `RENAME_NOREPLACE`.
    pub rename_flags: bool,
}

impl Features {
    /// The features of a local file system.
    pub const ALL: Self = Self { links: true, rename_flags: true };
}

/// The mounted file system. Dropping it unmounts it, and pending requests fail.
#[derive(Debug)]
pub struct Fuse {
    mount: OwnedFd,
    files: Arc<Files>,
}

#[derive(Debug)]
struct Files {
    has: Features,
    state: Mutex<State>,
    dead: AtomicBool,
    stop: AtomicBool,
    /// Iterations of the serving thread, each of which reads `dead`.
    iterations: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    names: BTreeMap<String, u64>,
    inodes: BTreeMap<u64, Inode>,
    newest: u64,
    /// Duration of a read below `slow_to`.
    delay: Duration,
    /// Only reads below this offset are slow. `furthest` is the largest end offset among them.
    slow_to: u64,
    furthest: u64,
    /// Duration of a sync, whether one is under way, and how many will fail.
    sync_delay: Duration,
    syncs: bool,
    failing_syncs: u32,
}

#[derive(Debug, Default)]
struct Inode {
    mode: u32,
    links: u32,
    bytes: Vec<u8>,
}

impl Fuse {
    /// Mounts it detached. Processes of root reach it by [`path`](Self::path).
    ///
    /// # Errors
    /// The kernel has no FUSE, or this process is not root.
    pub fn mount(has: Features) -> Result<Self> {
        let what = || "mount a FUSE file system, which only root may".to_owned();
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags);
        let device = options.open("/dev/fuse").context(what)?;
        let options = [
            ("fd", device.as_raw_fd().to_string()),
            ("rootmode", format!("{DIRECTORY:o}")),
            ("user_id", geteuid().as_raw().to_string()),
            ("group_id", getegid().as_raw().to_string()),
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
        let files = Arc::new(Files {
            has,
            state: Mutex::new(State { newest: ROOT, ..State::default() }),
            dead: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            iterations: AtomicU64::new(0),
        });
        let served = Arc::clone(&files);
        thread::spawn(move || served.serve(&device));
        Ok(Self { mount, files })
    }

    /// Path of the directory, through `/proc/PID/fd`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.mount.as_raw_fd()).into()
    }

    /// Stops reading requests. Returns when the serving thread has seen it.
    pub fn die(&self) {
        self.files.dead.store(true, Ordering::SeqCst);
        let seen = self.files.iterations.load(Ordering::SeqCst);
        // Two, since the thread may have read `dead` just before.
        while self.files.iterations.load(Ordering::SeqCst) < seen + 2 {
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Answers pending and new requests again.
    pub fn revive(&self) {
        self.files.dead.store(false, Ordering::SeqCst);
    }

    /// Creates a file with these bytes.
    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.files.lock();
        let inode = state.make(name, 0o600);
        if let Some(inode) = state.inodes.get_mut(&inode) {
            inode.bytes = bytes;
        }
    }

    /// File names.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.files.lock().names.keys().cloned().collect()
    }

    /// Delays each read that starts below offset `to`.
    pub fn slow_down(&self, delay: Duration, to: u64) {
        let mut state = self.files.lock();
        (state.delay, state.slow_to) = (delay, to);
    }

    /// Delays each sync, also a running one. Later requests wait for it.
    pub fn slow_syncs(&self, delay: Duration) {
        self.files.lock().sync_delay = delay;
    }

    /// Waits until a [slow](Self::slow_syncs) sync is under way.
    pub fn wait_for_sync(&self) {
        while !self.files.lock().syncs {
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Fails the next `count` syncs. Like the kernel, it reports an error once.
    pub fn fail_syncs(&self, count: u32) {
        self.files.lock().failing_syncs = count;
    }

    /// Largest end offset of the reads below the [slow limit](Self::slow_down).
    #[must_use]
    pub fn furthest(&self) -> u64 {
        self.files.lock().furthest
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.files.stop.store(true, Ordering::SeqCst);
    }
}

/// Reads the fields of a request in order.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (bytes, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.bytes())
    }

    fn name(&mut self) -> String {
        let len = self.0.iter().position(|byte| *byte == 0).unwrap_or(self.0.len());
        let (name, rest) = self.0.split_at(len);
        self.0 = rest.get(1..).unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// Body of the answer, or its error.
type Answer = std::result::Result<Vec<u8>, Errno>;

impl Files {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers requests until the file system is dropped. Then the connection closes.
    fn serve(&self, mut device: &File) {
        let mut request = vec![0; BUFFER_BYTES];
        while !self.stop.load(Ordering::SeqCst) {
            self.iterations.fetch_add(1, Ordering::SeqCst);
            if self.dead.load(Ordering::SeqCst) {
                thread::sleep(POLL_INTERVAL);
                continue;
            }
            // There is no request, or its caller has died.
            let Ok(len) = device.read(&mut request) else {
                thread::sleep(POLL_INTERVAL);
                continue;
            };
            let mut head = Words(request.get(..len).unwrap_or_default());
            let (_, call, unique, node) = (head.u32(), head.u32(), head.u64(), head.u64());
            let body = request.get(HEAD_BYTES..len).unwrap_or_default();
            if matches!(call, FORGET | BATCH_FORGET | INTERRUPT) {
                continue;
            }
            let answer = self.answer(call, node, Words(body));
            let (error, body) = match answer {
                Ok(body) => (0, body),
                Err(errno) => (-errno.raw_os_error(), Vec::new()),
            };
            let len = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
            let head = [len.to_ne_bytes(), error.to_ne_bytes()].concat();
            // The caller may have died.
            let _ = device.write(&[head, unique.to_ne_bytes().to_vec(), body].concat());
        }
    }

    fn answer(&self, call: u32, node: u64, mut words: Words<'_>) -> Answer {
        let mut state = self.lock();
        match call {
            INIT => Ok(init()),
            LOOKUP => {
                let node = *state.names.get(&words.name()).ok_or(Errno::NOENT)?;
                Ok(state.entry(node))
            }
            GETATTR => Ok([vec![0; 16], state.attributes(node)?].concat()),
            SETATTR => state.set(node, &mut words),
            CREATE => {
                // Flags, then the mode.
                let (_, mode, _) = (words.u32(), words.u32(), words.u64());
                let node = state.make(&words.name(), mode & 0o7777);
                Ok([state.entry(node), opened()].concat())
            }
            OPEN | OPENDIR => Ok(opened()),
            READ => {
                let (_, offset, size) = (words.u64(), words.u64(), words.u32());
                let delay = state.delay_of(offset, size);
                drop(state);
                thread::sleep(delay);
                self.lock().read(node, offset, size)
            }
            WRITE => {
                let (_, offset, size) = (words.u64(), words.u64(), words.u32());
                let bytes = words.0.get(WRITE_REST_BYTES..).unwrap_or_default();
                state.write(node, offset, bytes)?;
                Ok([size.to_ne_bytes(), [0; 4]].concat())
            }
            UNLINK => state.unlink(&words.name()),
            LINK if !self.has.links => Err(Errno::PERM),
            LINK => {
                let (node, name) = (words.u64(), words.name());
                state.link(node, name)
            }
            RENAME2 if !self.has.rename_flags => Err(Errno::NOSYS),
            RENAME2 => {
                let (_, _) = (words.u64(), words.u64());
                let (from, to) = (words.name(), words.name());
                // The kernel has checked that the target does not exist.
                state.rename(&from, to)
            }
            RENAME => {
                words.u64();
                let (from, to) = (words.name(), words.name());
                state.rename(&from, to)
            }
            FSYNC => {
                state.syncs = true;
                drop(state);
                let began = Instant::now();
                while began.elapsed() < self.lock().sync_delay && !self.stop.load(Ordering::SeqCst)
                {
                    thread::sleep(POLL_INTERVAL);
                }
                self.lock().sync()
            }
            RELEASE | RELEASEDIR => Ok(Vec::new()),
            FSYNCDIR => Err(Errno::INVAL),
            _ => Err(Errno::NOSYS),
        }
    }
}

impl State {
    fn make(&mut self, name: &str, mode: u32) -> u64 {
        self.newest += 1;
        let inode = Inode { mode: REGULAR | mode, links: 1, bytes: Vec::new() };
        self.inodes.insert(self.newest, inode);
        self.names.insert(name.to_owned(), self.newest);
        self.newest
    }

    fn file(&mut self, node: u64) -> std::result::Result<&mut Inode, Errno> {
        self.inodes.get_mut(&node).ok_or(Errno::NOENT)
    }

    /// `struct fuse_attr`.
    fn attributes(&mut self, node: u64) -> Answer {
        let (mode, links, size) = match self.inodes.get(&node) {
            Some(inode) => (inode.mode, inode.links, inode.bytes.len() as u64),
            None if node == ROOT => (DIRECTORY, 2, 0),
            None => return Err(Errno::NOENT),
        };
        let long = [node, size, size.div_ceil(512), 0, 0, 0].map(u64::to_ne_bytes).concat();
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let short = [0, 0, 0, mode, links, uid, gid, 0, 4096, 0].map(u32::to_ne_bytes).concat();
        Ok([long, short].concat())
    }

    /// `struct fuse_entry_out`.
    fn entry(&mut self, node: u64) -> Vec<u8> {
        let head = [node, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
        [head, self.attributes(node).unwrap_or_default()].concat()
    }

    fn set(&mut self, node: u64, words: &mut Words<'_>) -> Answer {
        let (valid, _, _, size) = (words.u32(), words.u32(), words.u64(), words.u64());
        // The lock owner, three times, and the nanoseconds of two of them.
        let _ = [words.u64(), words.u64(), words.u64(), words.u64(), words.u64()];
        // Nanoseconds of the third, and the mode.
        let (_, mode) = (words.u32(), words.u32());
        let file = self.file(node)?;
        if valid & SETS_SIZE != 0 {
            file.bytes.resize(usize::try_from(size).map_err(|_| Errno::FBIG)?, 0);
        }
        if valid & SETS_MODE != 0 {
            file.mode = REGULAR | mode & 0o7777;
        }
        Ok([vec![0; 16], self.attributes(node)?].concat())
    }

    fn delay_of(&mut self, offset: u64, size: u32) -> Duration {
        if offset >= self.slow_to {
            return Duration::ZERO;
        }
        self.furthest = self.furthest.max(offset + u64::from(size));
        self.delay
    }

    fn sync(&mut self) -> Answer {
        self.syncs = false;
        let fails = self.failing_syncs > 0;
        self.failing_syncs = self.failing_syncs.saturating_sub(1);
        if fails { Err(Errno::IO) } else { Ok(Vec::new()) }
    }

    fn read(&mut self, node: u64, offset: u64, size: u32) -> Answer {
        let bytes = &self.file(node)?.bytes;
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        let range = place(offset)..place(offset.saturating_add(size.into()));
        Ok(bytes.get(range).unwrap_or_default().to_vec())
    }

    fn write(&mut self, node: u64, offset: u64, new: &[u8]) -> std::result::Result<(), Errno> {
        let bytes = &mut self.file(node)?.bytes;
        let start = usize::try_from(offset).map_err(|_| Errno::FBIG)?;
        let end = start.checked_add(new.len()).ok_or(Errno::FBIG)?;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes.get_mut(start..end).unwrap_or_default().copy_from_slice(new);
        Ok(())
    }

    fn unlink(&mut self, name: &str) -> Answer {
        let node = self.names.remove(name).ok_or(Errno::NOENT)?;
        // An open file stays readable.
        self.file(node)?.links -= 1;
        Ok(Vec::new())
    }

    fn link(&mut self, node: u64, name: String) -> Answer {
        if self.names.contains_key(&name) {
            return Err(Errno::EXIST);
        }
        self.file(node)?.links += 1;
        self.names.insert(name, node);
        Ok(self.entry(node))
    }

    fn rename(&mut self, from: &str, to: String) -> Answer {
        let node = self.names.remove(from).ok_or(Errno::NOENT)?;
        self.names.insert(to, node);
        Ok(Vec::new())
    }
}

/// `struct fuse_init_out`.
fn init() -> Vec<u8> {
    let mut words = vec![MAJOR, MINOR, 0, 0, 0, MAX_WRITE, 1];
    words.resize(16, 0);
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// `struct fuse_open_out`.
fn opened() -> Vec<u8> {
    [0, 0, DIRECT_IO | NO_FLUSH, 0].map(u32::to_ne_bytes).concat()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc::channel;

    use super::*;

    /// Needs root, like every mount.
    #[test]
    fn a_dead_file_system_answers_no_request_until_revived() {
        let fuse = Fuse::mount(Features::ALL).unwrap();
        fuse.put("file", vec![7; 8192]);
        let path = fuse.path().join("file");
        assert_eq!(fs::read(&path).unwrap(), vec![7; 8192]);
        assert!(fs::metadata(fuse.path().join("other")).is_err());
        fuse.die();
        let (sender, receiver) = channel();
        thread::spawn(move || sender.send(fs::read(path).map(|bytes| bytes.len())));
        assert!(receiver.recv_timeout(Duration::from_millis(200)).is_err());
        fuse.revive();
        assert_eq!(receiver.recv_timeout(Duration::from_secs(20)).unwrap().unwrap(), 8192);
    }
}
