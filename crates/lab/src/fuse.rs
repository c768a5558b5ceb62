//! A file system of this process (FUSE): one that lacks what others have, and reads slowly.
//!
//! It stands for FAT, exFAT, CIFS and others, of which a kernel may have none: no hard links, no
//! flags of a rename, no holes, a directory that cannot be synced. Files are kept in memory, in one
//! directory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{getegid, geteuid};
use tempfile::TempDir;

use crate::error::{Context, LabError, Result};

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
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const FSYNCDIR: u32 = 30;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const RENAME2: u32 = 45;

/// Version of the protocol: any kernel since 5.9 speaks it.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;

/// `FATTR_MODE` and `FATTR_SIZE`: what a `SETATTR` sets.
const SETS_MODE: u32 = 1;
const SETS_SIZE: u32 = 1 << 3;

/// `FOPEN_DIRECT_IO`: each read comes here.
const DIRECT: u32 = 1;

/// Bytes before what a request says, and between the size and the bytes of a write.
const HEAD_BYTES: usize = 40;
const WRITE_REST_BYTES: usize = 20;

/// Bytes of a write, at most, and room for one.
const MAX_WRITE: u32 = 128 << 10;
const ROOM: usize = (128 << 10) + 4096;

/// The directory, and the mode of each file's kind.
const ROOT: u64 = 1;
const DIRECTORY: u32 = 0o04_0700;
const REGULAR: u32 = 0o10_0000;

/// What the file system has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Has {
    /// Hard links.
    pub links: bool,
    /// `renameat2` with `RENAME_NOREPLACE`.
    pub rename_flags: bool,
}

/// The mounted file system, which goes with the value.
#[derive(Debug)]
pub struct Fuse {
    directory: TempDir,
    files: Arc<Files>,
}

#[derive(Debug)]
struct Files {
    has: Has,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    names: BTreeMap<String, u64>,
    inodes: BTreeMap<u64, Inode>,
    newest: u64,
    /// How long a read takes.
    delay: Duration,
    /// End of the read that went furthest among those that are as slow.
    slow_to: u64,
    furthest: u64,
}

#[derive(Debug, Default)]
struct Inode {
    mode: u32,
    links: u32,
    bytes: Vec<u8>,
}

impl Fuse {
    /// Mounts it.
    ///
    /// # Errors
    /// The kernel has no FUSE, or refuses: only root may mount.
    pub fn mount(has: Has) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("aerostat-fuse-").tempdir();
        let directory = directory.context(|| "make a temporary directory".to_owned())?;
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.context(|| "open /dev/fuse".to_owned())?;
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let fd = std::os::fd::AsRawFd::as_raw_fd(&device);
        let data = format!("fd={fd},rootmode=40000,user_id={uid},group_id={gid}");
        let data = std::ffi::CString::new(data).unwrap_or_default();
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("aerostat-test", directory.path(), "fuse", flags, data.as_c_str()).map_err(
            |error| LabError::Host {
                what: format!("mount a file system of a test: {error}"),
                advice: "run the test as root".to_owned(),
            },
        )?;
        let state = Mutex::new(State { newest: ROOT, ..State::default() });
        let files = Arc::new(Files { has, state });
        let served = Arc::clone(&files);
        thread::spawn(move || served.serve(device));
        Ok(Self { directory, files })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A file of these bytes.
    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.files.lock();
        let inode = state.make(name, 0o600);
        if let Some(inode) = state.inodes.get_mut(&inode) {
            inode.bytes = bytes;
        }
    }

    /// The names in it.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.files.lock().names.keys().cloned().collect()
    }

    /// Has each read below `to` bytes take so long.
    pub fn slow_down(&self, delay: Duration, to: u64) {
        let mut state = self.files.lock();
        (state.delay, state.slow_to) = (delay, to);
    }

    /// Where the last of the reads below [that limit](Self::slow_down) ended.
    #[must_use]
    pub fn furthest(&self) -> u64 {
        self.files.lock().furthest
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = unmount(self.directory.path(), UnmountFlags::DETACH);
    }
}

/// What a request says, read from its beginning.
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

/// An answer; an error where there is no memory of its bytes.
type Answer = std::result::Result<Vec<u8>, Errno>;

impl Files {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers until it is unmounted.
    fn serve(&self, mut device: File) {
        let mut request = vec![0; ROOM];
        loop {
            let len = match device.read(&mut request) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(_) => return,
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
            // Whoever asked may be gone.
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
                // The kernel has looked whether it is there.
                state.rename(&from, to)
            }
            RENAME => {
                words.u64();
                let (from, to) = (words.name(), words.name());
                state.rename(&from, to)
            }
            FSYNC | FLUSH | RELEASE | RELEASEDIR => Ok(Vec::new()),
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

    /// `struct fuse_entry_out` of what is there.
    fn entry(&mut self, node: u64) -> Vec<u8> {
        let head = [node, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
        [head, self.attributes(node).unwrap_or_default()].concat()
    }

    fn set(&mut self, node: u64, words: &mut Words<'_>) -> Answer {
        let (valid, _, _, size) = (words.u32(), words.u32(), words.u64(), words.u64());
        // The lock's owner, three times, and the nanoseconds of two of them.
        let _ = [words.u64(), words.u64(), words.u64(), words.u64(), words.u64()];
        // Those of the third.
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
        // Who has it open still reads it.
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
    [0, 0, DIRECT, 0].map(u32::to_ne_bytes).concat()
}
